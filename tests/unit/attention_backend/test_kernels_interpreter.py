"""The Triton kernels' tests in Triton's interpreter, where there is no GPU.

`conftest.py` begins them, as processes of their own; this collects them.
"""

import pytest
import triton

from tests.helpers.interpreter_runs import InterpreterRuns

ALL_DESELECTED = 5  # pytest's exit status for a file with GPU tests alone


@pytest.mark.slow
@pytest.mark.skipif(triton.knobs.runtime.interpret, reason="this process is the interpreter's")
def test_kernels_in_the_interpreter(interpreter_runs: InterpreterRuns) -> None:
    results = interpreter_runs.results()
    for file, (status, output) in results.items():
        print(output)
        is_run = status == 0 and " passed" in output
        assert is_run or status == ALL_DESELECTED, f"{file.name}\n{output[-8000:]}"
    assert sum(status == 0 for status, _ in results.values()) >= 4
