"""The GPU tests' helper that makes kernels new to Triton: by kernels that no GPU has to run."""

import sys
from types import ModuleType

import pytest
from triton.runtime.jit import JITFunction

from tests.helpers.kernel_cache import forget_kernels


def _kernel() -> None: ...


def test_compiled_kernels_of_the_package_alone_are_forgotten(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compiled = {}
    for name in ("ours", "ours.kernels", "ours_not", "others"):
        module = ModuleType(name)
        compiled[name] = module.kernel = JITFunction(_kernel)
        compiled[name].device_caches[0] = ({"key": "kernel"},)
        monkeypatch.setitem(sys.modules, name, module)
    forget_kernels("ours")
    left = [name for name, kernel in compiled.items() if kernel.device_caches]
    assert left == ["ours_not", "others"]
