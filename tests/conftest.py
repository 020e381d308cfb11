"""What all tests share: marks, seeds, kernels without a GPU, NaN in new memory, a real model."""

import gc
import importlib
import os
import random
import signal
import sys
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
SAMPLE_MODEL = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
SEED = 20260404

# What is imported stays: to look through all of it for garbage, again and again, takes longer than
# importing it.
gc.disable()

# Engine processes inherit these: nothing may ask a hub, and nothing is reported anywhere.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
# The tests' models are tiny: a second thread only spins beside the first (eight times slower on a
# busy machine of two cores).
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Drafts by n-grams would give all of the process's OpenMP regions numba's number of threads.
os.environ.setdefault("NUMBA_NUM_THREADS", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
# Interpreters that tests start read tests/helpers/startup/sitecustomize.py.
_STARTUP = str(REPOSITORY / "tests" / "helpers" / "startup")
os.environ["PYTHONPATH"] = os.pathsep.join(
    [_STARTUP, *filter(None, [os.environ.get("PYTHONPATH")])]
)


def _missing_gpu() -> str:
    """Say why GPU tests cannot run here; empty where they can."""
    if find_spec("torch") is None:
        return "needs a CUDA GPU; torch is not installed here"
    import torch

    return "" if torch.cuda.is_available() else "needs a CUDA GPU; this machine has none"


def _interpret_kernels() -> None:
    """Where there is no GPU, let Triton's interpreter run the kernels.

    Triton chooses when it is imported; the processes that tests start choose for themselves, and
    one that compiles kernels says TRITON_INTERPRET=0.
    """
    if os.environ.get("TRITON_INTERPRET") == "0":
        return
    if find_spec("triton") is None or not _missing_gpu():
        return
    os.environ["TRITON_INTERPRET"] = "1"
    triton = importlib.import_module("triton")
    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]
    importlib.import_module("tests.helpers.interpreter").patch_language_once()


_interpret_kernels()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests without a GPU `cpu`; skip, saying why, what this machine cannot run."""
    gpu_reason: str | None = None
    for item in items:
        if item.get_closest_marker("gpu") is None:
            item.add_marker(pytest.mark.cpu)
        else:
            gpu_reason = _missing_gpu() if gpu_reason is None else gpu_reason
            if gpu_reason:
                item.add_marker(pytest.mark.skip(reason=gpu_reason))
        if item.get_closest_marker("vllm") is not None and find_spec("vllm") is None:
            item.add_marker(pytest.mark.skip(reason="needs vLLM; it is not installed here"))


def pytest_collection_finish() -> None:
    """Collect garbage from now on, and never among what was imported."""
    gc.freeze()
    gc.enable()


def pytest_unconfigure() -> None:
    """Let the interpreter find its garbage when it ends; extensions report the rest as leaks."""
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """Take back the signals that a program under test took over.

    A pool ends its workers by SIGTERM, once: one that inherits a handler in Python may miss it.
    """
    former = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in former.items():
        if handler is not None:  # None: not Python's
            signal.signal(number, handler)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Give every test the same random numbers, whatever ran before it."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.fixture(autouse=True)
def _poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill memory that flux_vllm asks for uninitialised with NaN: an unwritten output shows."""
    if "torch" not in sys.modules:
        return
    torch = sys.modules["torch"]
    # torch remembers, once, which functions `with torch.device(...)` applies to: the real ones.
    importlib.import_module("torch.utils._device")._device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(original: Callable[..., Any]) -> Callable[..., Any]:
    is_compiling = sys.modules["torch"].compiler.is_dynamo_compiling

    def empty(*args: Any, **kwargs: Any) -> Any:
        tensor = original(*args, **kwargs)
        if is_compiling():  # a look at the caller would break vLLM's compiled graphs
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.split(".")[0] == "flux_vllm" and tensor.is_floating_point():
            tensor.fill_(float("nan"))
        return tensor

    return empty


@pytest.fixture(scope="session")
def sample_model() -> Path:
    """Give the folder of SmolLM2-135M-Instruct and its router, made once and kept in `models/`."""
    from flux_vllm.cli.sample_model import make_sample_model

    make_sample_model(SAMPLE_MODEL)
    return SAMPLE_MODEL
