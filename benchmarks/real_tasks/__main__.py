"""Entry point of `python -m benchmarks.real_tasks`."""

import sys

from benchmarks.real_tasks.cli import main

if __name__ == "__main__":
    sys.exit(main())
