"""Runs the kernels in Triton's interpreter beside the unit tests, which leave a core free.

They begin with this folder's first test, after those of whole engines, and are collected last.
"""

from pathlib import Path

import pytest
import triton

from tests.helpers.interpreter_runs import InterpreterRuns

HERE = Path(__file__).parent
COLLECTING = "test_kernels_in_the_interpreter"
LONGEST = ("test_kernels_patterns.py",)
RUNS = pytest.StashKey[InterpreterRuns]()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Collect the runs after everything else."""
    items.sort(key=lambda item: item.name == COLLECTING)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Start the runs before this folder's first test, where the one that collects is chosen."""
    if triton.knobs.runtime.interpret or RUNS in item.config.stash:
        return
    chosen = [other for other in item.session.items if other.name == COLLECTING]
    if not chosen:
        return
    files = [file for file in HERE.glob("test_kernels_*.py") if file != chosen[0].path]
    files.sort(key=lambda file: (file.name not in LONGEST, file.name))
    item.config.stash[RUNS] = InterpreterRuns(files)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """End what an interrupted session left."""
    runs = session.config.stash.get(RUNS, None)
    if runs is not None:
        runs.stop()


@pytest.fixture
def interpreter_runs(request: pytest.FixtureRequest) -> InterpreterRuns:
    """Give the runs begun with the session."""
    return request.config.stash[RUNS]
