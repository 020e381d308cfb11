"""An engine's process that is stopped while others are timed. Oracle: the kernel's own word."""

import time
from multiprocessing import get_context
from pathlib import Path

import pytest

from benchmarks.engine_process import Engine


def _state(engine: Engine) -> str:
    """Return the process's state: T is stopped."""
    status = Path(f"/proc/{engine._process.pid}/stat").read_text()
    return status.rpartition(")")[2].split()[0]


def _wait_for(engine: Engine, stopped: bool) -> None:
    for _ in range(100):
        if (_state(engine) == "T") == stopped:
            return
        time.sleep(0.02)
    pytest.fail(f"expected stopped: {stopped}, found state {_state(engine)}")


def test_pause_and_resume() -> None:
    engine = Engine.__new__(Engine)
    engine._is_ready = True
    engine._process = get_context("spawn").Process(target=time.sleep, args=(60,))
    engine._process.start()
    try:
        engine.pause()
        _wait_for(engine, stopped=True)
        engine.resume()
        _wait_for(engine, stopped=False)
    finally:
        engine._process.kill()
        engine._process.join()
