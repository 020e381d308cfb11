"""Run the Triton kernels' tests in Triton's interpreter, where there is no GPU.

The interpreter has to be chosen before Triton is imported, and vLLM imports Triton: so they run in
a process of their own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import triton

HERE = Path(__file__).parent


@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="this process is the interpreter's")
def test_kernels_in_the_interpreter() -> None:
    files = sorted(str(file) for file in HERE.glob("test_kernels_*.py") if file != Path(__file__))
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *files],
        cwd=HERE.parents[2],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout
