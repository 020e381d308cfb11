"""`python -m flux_vllm.cli`, the same as `flux-vllm`."""

import sys

from flux_vllm.cli.commands import main

# Engine processes are spawned and import the parent's main module again: nothing may run then.
if __name__ == "__main__":
    sys.exit(main())
