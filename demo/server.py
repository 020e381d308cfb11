"""A vLLM server in a process group of its own: started, waited for, and stopped for certain."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import FrameType, TracebackType

LOG_TAIL_LINES = 25
_LEAVE_ON = (signal.SIGTERM, signal.SIGHUP)
# "(APIServer pid=7) INFO 11-22 08:08:05 [compilation.py:317] ": who, when and where.
_LOG_PREFIX = re.compile(r"^(\(\w+ pid=\d+\) *)?([A-Z]+ [\d-]+ [\d:]+ )?(\[[^]]*\] )?")


class DemoError(Exception):
    """Ends the demo with exit code 1; the message says what to look at."""


class Server:
    """`flux-vllm serve` on a free port of 127.0.0.1, to be used in a `with`.

    Args:
        arguments: what follows `flux-vllm serve`.
        log: file for the server's output.
        start_seconds: how long it may take to answer.
    """

    program = (sys.executable, "-m", "flux_vllm.cli")
    plain_progress_seconds = 30.0
    """Between lines of progress where the output is no terminal."""

    def __init__(self, arguments: Sequence[str], log: Path, start_seconds: float = 300) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self._command = ["serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]
        self._log = log
        self._start_seconds = start_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> "Server":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        offline = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
        with self._log.open("wb") as output:
            self._process = subprocess.Popen(
                [*self.program, *self._command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | offline,
                start_new_session=True,  # so that its engine processes end with it
            )
        try:
            self._wait_until_healthy()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def get(self, path: str) -> str:
        """Fetch a path of the server as text."""
        with urllib.request.urlopen(self.url + path, timeout=30) as response:
            text: str = response.read().decode()
        return text

    def log_tail(self) -> str:
        """Return the latest lines of the server's log."""
        lines = self._log.read_text(errors="replace").splitlines()
        return "\n".join(lines[-LOG_TAIL_LINES:])

    def _wait_until_healthy(self) -> None:
        begin = time.monotonic()
        shown = 0.0
        while True:
            waited = time.monotonic() - begin
            if self._process is not None and self._process.poll() is not None:
                raise DemoError(
                    f"the server ended with exit code {self._process.returncode} before it could "
                    f"answer. The end of its log ({self._log}):\n\n{self.log_tail()}"
                )
            if waited > self._start_seconds:
                raise DemoError(
                    f"the server did not answer within {self._start_seconds:.0f} s. The end of "
                    f"its log ({self._log}):\n\n{self.log_tail()}"
                )
            try:
                self.get("/health")
            except (urllib.error.URLError, OSError):
                shown = self._show_progress(waited, shown)
                time.sleep(0.5)
            else:
                _clear_line()
                return

    def _show_progress(self, waited: float, shown: float) -> float:
        """Show the log's latest line in place on a terminal; elsewhere only that it starts."""
        if sys.stdout.isatty():
            lines = self.log_tail().splitlines()
            latest = _LOG_PREFIX.sub("", lines[-1]) if lines else "loading vLLM"
            print(f"\r\033[K  {waited:3.0f} s  {latest[:68]}", end="", flush=True)
        elif waited - shown >= self.plain_progress_seconds:
            print(f"  starting for {waited:.0f} s; its log: {self._log}", flush=True)
            return waited
        return shown

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        _clear_line()
        try:
            if process.poll() is None:
                process.terminate()
                process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            print("  the server does not stop; ending its processes", flush=True)
        finally:
            # Engine processes outlive a server that was killed or crashed.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def leave_on_signals() -> None:
    """Stop servers on the way out when this process is asked to end (`timeout`, a closed shell)."""
    for number in _LEAVE_ON:
        if signal.getsignal(number) is not signal.SIG_IGN:  # as under `nohup`
            signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    for other in _LEAVE_ON:
        signal.signal(other, signal.SIG_IGN)  # a second one would cut the server's end short
    # As an exception, so that a server's `with` is left.
    sys.exit(128 + number)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _clear_line() -> None:
    if sys.stdout.isatty():
        print("\r\033[K", end="", flush=True)
