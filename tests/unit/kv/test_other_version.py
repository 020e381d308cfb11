"""The same managers, groups and specs in vLLM 0.33, of which only the Python files are here.

Oracle: the tests of this folder, in a process that imports those files instead of the installed
vLLM.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

OTHER_VERSION = "0.33.0"
FILES = (
    "test_coordinator.py",
    "test_full_decode.py",
    "test_groups.py",
    "test_scheduler.py",
    "test_simulation.py",
    "test_spec.py",
)


def test_with_the_other_version():
    from tools.vllm_sources import vllm_sources

    path = os.pathsep.join([str(vllm_sources(OTHER_VERSION)), str(REPOSITORY)])
    folder = Path(__file__).parent
    arguments = [
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not slow",
        *(str(folder / name) for name in FILES),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": path, "VLLM_TARGET_DEVICE": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    assert "passed" in done.stdout
    assert "skipped" not in done.stdout
