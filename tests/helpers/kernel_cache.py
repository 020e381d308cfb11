"""What Triton keeps of our kernels in a process."""

import sys

from triton.runtime.jit import JITFunction


def forget_kernels(package: str = "flux_vllm") -> None:
    """Make every kernel of a package new to Triton again, as in a process that begins.

    A kernel that an engine before this one compiled would not show, whether this one compiles it
    at its start or too late.
    """
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == package:
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
