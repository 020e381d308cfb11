"""Run the Triton kernels' tests in Triton's interpreter, where there is no GPU.

The interpreter has to be chosen before Triton is imported, and vLLM imports Triton: so each file
runs in a process of its own, two at a time.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent
ALL_DESELECTED = 5  # pytest's exit status for a file with GPU tests alone


def _run(file: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    return subprocess.run(
        [*command, str(file)],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="this process is the interpreter's")
def test_kernels_in_the_interpreter() -> None:
    files = [file for file in HERE.glob("test_kernels_*.py") if file != Path(__file__)]
    longest = ("test_kernels_patterns.py", "test_kernels_prefill.py")
    files.sort(key=lambda file: file.name not in longest)  # those first
    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(_run, files))
    for file, done in zip(files, results, strict=True):
        print(done.stdout)
        accepted = done.returncode == 0 or done.returncode == ALL_DESELECTED
        assert accepted, f"{file.name}\n{done.stdout[-6000:]}{done.stderr[-2000:]}"
    assert sum(" passed" in done.stdout for done in results) >= 4
