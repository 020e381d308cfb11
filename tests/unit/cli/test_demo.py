"""The demo's parts that need no engine: its counters, its text, its server's life and death."""

import json
import sys
import time
from pathlib import Path

import pytest

from demo.counters import Counters
from demo.server import DemoError, Server
from demo.setting import MODEL_NAME, Setting

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


def test_counters_of_one_request() -> None:
    counters = Counters.parse(AFTER).since(Counters.parse(BEFORE))
    assert counters.routes(4) == [1, -1, 0, -1]
    assert counters.saving("prefill") == pytest.approx(0.8)
    assert counters.saving("decode") == 0.0
    assert counters.unrouted_rows == 0


def test_setting_without_router_is_static(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("demo.setting.PACKAGED_ROUTERS", tmp_path / "none")
    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 30}))
    setting = Setting.choose(tmp_path)
    assert setting.flux["policy"] == "static"
    sparse = setting.flux["sparse_layers"]
    assert isinstance(sparse, list)
    assert len(sparse) == 18
    assert not {7, 8, 18, 20, 21, 23} & set(sparse)
    assert "policy static" in setting.explanation
    arguments = setting.serve_arguments(tmp_path)
    assert arguments[:3] == [str(tmp_path), "--served-model-name", MODEL_NAME]
    assert json.loads(arguments[arguments.index("--additional-config") + 1]) == {
        "flux": setting.flux
    }


def test_setting_prefers_a_router(tmp_path: Path) -> None:
    from flux_vllm.router.checkpoint import RouterInfo, write_router
    from flux_vllm.router.model import LayerRouter

    (tmp_path / "config.json").write_text(json.dumps({"num_hidden_layers": 2}))
    info = RouterInfo(
        base_model="m", num_layers=2, head_dim=8, pool_tokens=16, sink_tokens=3, window_tokens=77
    )
    write_router(tmp_path, LayerRouter(2, 8), info)
    setting = Setting.choose(tmp_path)
    assert setting.flux == {"router": str(tmp_path)}
    assert "latest 77 tokens" in setting.explanation


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
    deadline = time.monotonic() + 10
    while _is_running(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _is_running(child)


def test_server_that_dies_shows_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Server, "program", (sys.executable, "-c", "print('the reason'); raise SystemExit(7)")
    )
    with (
        pytest.raises(DemoError, match=r"(?s)exit code 7 .*the reason"),
        Server([], tmp_path / "log"),
    ):
        pass


def test_server_that_never_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Server, "program", (sys.executable, "-c", "import time; time.sleep(600)"))
    server = Server([], tmp_path / "log", start_seconds=1)
    with pytest.raises(DemoError, match="did not answer within 1 s"), server:
        pass
