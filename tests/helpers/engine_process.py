"""What engines of a process share, prepared so that the next one starts soon."""

import functools
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock


def prepare_process() -> None:
    """Prepare this process for eager engines; again does nothing."""
    _override_kernels_once()
    _keep_transformers_classes()
    _inspect_models_here()
    _count_ranks_eagerly()


@contextmanager
def no_freezing() -> Iterator[None]:
    """Let vLLM put nothing out of the garbage collector's sight, nor all of it back.

    It freezes all objects once an engine has started, and thaws all as it ends: garbage is then
    looked for among whatever was ever imported, half a second and more each time.
    """
    with mock.patch.object(gc, "freeze"), mock.patch.object(gc, "unfreeze"):
        yield


def _override_kernels_once() -> None:
    """Let the process's first engine alone put C++ kernels in the place of Triton's.

    vLLM 0.32 looks through all modules for them at each start, and falls over numba's, which
    speculative decoding imports.
    """
    from vllm.platforms import current_platform

    platform = type(current_platform)
    register = platform.register_triton_kernel_overrides
    if not hasattr(register, "cache_info"):
        platform.register_triton_kernel_overrides = staticmethod(functools.cache(register))


def _keep_transformers_classes() -> None:
    """Leave the classes of transformers' own models as they are, for references to be made of.

    vLLM prepares those that it runs for torch.compile, in place and for the whole process, and they
    then ask for its configuration. Engines here are eager.
    """
    from vllm.model_executor.models.transformers import base

    base.support_torch_compile = lambda **_: lambda kind: kind


def _inspect_models_here() -> None:
    """Ask a model's class what it supports in this process, which imports it anyway.

    vLLM starts another for that, lest CUDA be initialised.
    """
    from vllm.model_executor.models import registry

    registry._run_in_subprocess = lambda question: question()


def _count_ranks_eagerly() -> None:
    """Do not compile what counts a token's rank among all, which each process would do anew."""
    from vllm.v1.sample import sampler
    from vllm.v1.sample.ops import logprobs

    compiled = logprobs.batched_count_greater_than
    sampler.batched_count_greater_than = compiled._torchdynamo_orig_callable
