"""Begins the kernels' runs in Triton's interpreter before the first test: they take minutes."""

from pathlib import Path

import pytest
import triton

from tests.helpers.interpreter_runs import InterpreterRuns

HERE = Path(__file__).parent
COLLECTING = "test_kernels_in_the_interpreter"
LONGEST = ("test_kernels_patterns.py", "test_kernels_at_once.py")
RUNS = pytest.StashKey[InterpreterRuns]()


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the runs where the test that collects them is chosen."""
    items = [item for item in session.items if item.name == COLLECTING]
    if session.config.option.collectonly or not items or triton.knobs.runtime.interpret:
        return
    files = [file for file in HERE.glob("test_kernels_*.py") if file != items[0].path]
    files.sort(key=lambda file: (file.name not in LONGEST, file.name))
    session.config.stash[RUNS] = InterpreterRuns(files)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what an interrupted session left."""
    runs = session.config.stash.get(RUNS, None)
    if runs is not None:
        runs.stop()


@pytest.fixture
def interpreter_runs(request: pytest.FixtureRequest) -> InterpreterRuns:
    """Give the runs begun with the session."""
    return request.config.stash[RUNS]
