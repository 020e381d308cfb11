"""The demo's parts that need no engine: its counters, its text, its server's life and death."""

import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from demo.counters import Counters
from demo.server import DemoError, Server
from demo.setting import serve_arguments, shell_line
from flux_vllm.cli.sample_model import SMOLLM2

BEFORE = """\
# HELP flux_route_decisions_total Routes chosen.
# TYPE flux_route_decisions_total counter
flux_route_decisions_total{layer="0",model_name="m",route="full"} 3.0
flux_route_decisions_total{layer="0",model_name="m",route="sparse"} 0.0
flux_route_decisions_total{layer="2",model_name="m",route="full"} 1.0
flux_route_decisions_total{layer="2",model_name="m",route="sparse"} 2.0
# TYPE flux_attended_tokens_total counter
flux_attended_tokens_total{model_name="m",phase="prefill"} 100.0
flux_attended_tokens_total{model_name="m",phase="decode"} 10.0
# TYPE flux_context_tokens_total counter
flux_context_tokens_total{model_name="m",phase="prefill"} 100.0
flux_context_tokens_total{model_name="m",phase="decode"} 10.0
# TYPE flux_unrouted_rows_total counter
flux_unrouted_rows_total{model_name="m"} 0.0
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 0.0
"""
AFTER = (
    BEFORE.replace('route="full"} 3.0', 'route="full"} 4.0')
    .replace('route="sparse"} 2.0', 'route="sparse"} 3.0')
    .replace(
        'attended_tokens_total{model_name="m",phase="prefill"} 100',
        'attended_tokens_total{model_name="m",phase="prefill"} 140',
    )
    .replace(
        'context_tokens_total{model_name="m",phase="prefill"} 100',
        'context_tokens_total{model_name="m",phase="prefill"} 300',
    )
)

# Answers /health and says in its log that it runs; a child of it outlives it unless it is killed.
FAKE_SERVER = """\
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"healthy")
http.server.HTTPServer(("127.0.0.1", int(sys.argv[-1])), Handler).serve_forever()
"""


SLOW_SERVER = """\
import time
while True:
    print("(APIServer pid=1) INFO raw text of the log", flush=True)
    time.sleep(0.2)
"""


def test_counters_of_one_request() -> None:
    counters = Counters.parse(AFTER).since(Counters.parse(BEFORE))
    assert counters.routes(4) == [1, -1, 0, -1]
    assert counters.saving("prefill") == pytest.approx(0.8)
    assert counters.saving("decode") == 0.0
    assert counters.unrouted_rows == 0


def test_serve_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = serve_arguments(tmp_path / "models" / "small one")
    assert arguments[:3] == ["models/small one", "--served-model-name", SMOLLM2.name]
    assert serve_arguments(Path("/elsewhere"))[0] == "/elsewhere"
    line = shell_line(arguments)
    assert line.startswith("'models/small one' \\\n")
    assert shlex.split(line.replace("\\\n", "")) == arguments


@pytest.mark.slow
def test_long_text_holds_the_code_word_once(sample_model: Path) -> None:
    from demo.long_text import CODE_WORD, CODE_WORD_SENTENCE, text_with_code_word

    text, tokens, before = text_with_code_word(sample_model)
    assert 3000 <= tokens <= 4000
    assert 600 < before < tokens - 600
    assert text.count(CODE_WORD) == text.count(CODE_WORD_SENTENCE) == 1


def _is_running(process: int) -> bool:
    try:
        # A killed process stays as a zombie until its adoptive parent looks.
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_server_ends_with_all_its_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Server, "program", (sys.executable, "-c", FAKE_SERVER))
    with Server([], tmp_path / "log", start_seconds=30) as server:
        assert server.get("/health") == "healthy"
        child = int(server.log_tail().split()[1])
        assert _is_running(child)
    assert _has_ended(child)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_server_ends_with_a_program_that_is_asked_to_end(
    tmp_path: Path, number: signal.Signals
) -> None:
    """Asked twice, as by `timeout` and a closed shell, while the server takes its time."""
    slow = (
        "import os, signal, time\n"
        "def end(*given):\n"
        "    os.write(1, b' asked to end')\n"
        "    time.sleep(1)\n"
        "    os._exit(0)\n"
        "signal.signal(signal.SIGTERM, end)\n"
    )
    program = f"""
import signal, sys, time
from pathlib import Path
from demo.server import Server, leave_on_signals
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under `nohup` it would be ignored
leave_on_signals()
Server.program = (sys.executable, "-c", {slow + FAKE_SERVER!r})
with Server([], Path({str(tmp_path / "log")!r}), start_seconds=30) as server:
    print(server.log_tail().split()[1], flush=True)
    time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = int(process.stdout.readline())
        assert _is_running(child)
        process.send_signal(number)
        until = time.monotonic() + 30
        while b"asked to end" not in (tmp_path / "log").read_bytes():
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + number
    assert _has_ended(child)


def test_a_signal_that_is_ignored_stays_so() -> None:
    program = """
import signal
from demo.server import leave_on_signals
signal.signal(signal.SIGHUP, signal.SIG_IGN)
leave_on_signals()
print(signal.getsignal(signal.SIGHUP) == signal.SIG_IGN, callable(signal.getsignal(15)))
"""
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert found.stdout.split() == [b"True", b"True"]


def _has_ended(process: int) -> bool:
    deadline = time.monotonic() + 10
    while _is_running(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not _is_running(process)


def test_server_that_dies_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Server, "program", (sys.executable, "-c", "print('the reason'); raise SystemExit(7)")
    )
    with (
        pytest.raises(DemoError, match=r"(?s)exit code 7 .*the reason"),
        Server([], tmp_path / "log"),
    ):
        pass


def test_progress_without_a_terminal_is_no_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Server, "program", (sys.executable, "-c", SLOW_SERVER))
    monkeypatch.setattr(Server, "plain_progress_seconds", 1.0)
    with pytest.raises(DemoError), Server([], tmp_path / "log", start_seconds=2.5):
        pass
    lines = capsys.readouterr().out.splitlines()
    assert 1 <= len(lines) <= 2
    assert all(line.endswith(f" s; its log: {tmp_path / 'log'}") for line in lines)


def test_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "program", (sys.executable, "-c", "import time; time.sleep(600)"))
    server = Server([], tmp_path / "log", start_seconds=1)
    with pytest.raises(DemoError, match="did not answer within 1 s"), server:
        pass
