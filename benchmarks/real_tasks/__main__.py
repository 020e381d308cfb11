"""Evaluation on real tasks through the served engine.

    python -m benchmarks.real_tasks run --model M --eval EVAL_FOLDER --out RUN_FOLDER \\
        --variant flash_attn --variant full --variant sparse --variant static:0-6 \\
        --variant router:ROUTER@0.3,0.5,0.7 --flux '{"router": "ROUTER"}'

answers LongBench, needles, GSM8K and chains of thought under every variant, measures agreement with
full attention's own answers, and joins everything in RUN_FOLDER. Each engine is a `vllm serve` of
its own; `answer` is one engine's part, `join` the last step, and both can be called by themselves.
docs/REAL_TASKS.md explains what is measured.
"""

import sys

from benchmarks.real_tasks.cli import main

if __name__ == "__main__":
    sys.exit(main())
