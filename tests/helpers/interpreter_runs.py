"""Test files run in Triton's interpreter, each in a process of its own, beside other tests.

The interpreter has to be chosen before Triton is imported, and vLLM imports Triton. The processes
take what the others leave of the machine.
"""

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class InterpreterRuns:
    """Runs files two at a time, from its making on, in the order given."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._processes: list[subprocess.Popen[str]] = []
        # Now: tests beside change them for a while.
        self._python = sys.executable
        self._environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
        self._pool = ThreadPoolExecutor(2)
        self._futures = {file: self._pool.submit(self._run, file) for file in files}

    def _run(self, file: Path) -> tuple[int, str]:
        command = [self._python, "-m", "pytest", "-q", "-m", "not gpu", "-p", "no:cacheprovider"]
        process = subprocess.Popen(
            ["nice", "-n", "19", *command, str(file)],
            cwd=REPOSITORY,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._processes.append(process)
        output, _ = process.communicate()
        return process.returncode, output

    def results(self) -> dict[Path, tuple[int, str]]:
        """Wait for all files: exit status and output of each."""
        return {file: future.result() for file, future in self._futures.items()}

    def stop(self) -> None:
        """End what still runs."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for process in self._processes:
            process.kill()
