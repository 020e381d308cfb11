"""Look on at a running engine's probes from within its process."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch


@contextmanager
def around_probes(watch: Callable[[Any], AbstractContextManager[None]]) -> Iterator[None]:
    """Enter a context around each call of vLLM's model that a probe makes.

    Args:
        watch: makes the context, from the `RunnerModelCall` that is called.
    """
    from flux_vllm.routing.model_call import RunnerModelCall

    call = RunnerModelCall.__call__

    def watched(self: RunnerModelCall, *arguments: Any) -> None:
        with watch(self):
            call(self, *arguments)

    with patch.object(RunnerModelCall, "__call__", watched):
        yield


def cache_memory(vllm_config: Any) -> list[torch.Tensor]:
    """Copy all that an engine keeps of its requests: each memory's bytes."""
    caches: dict[int, torch.UntypedStorage] = {}
    for layer in vllm_config.compilation_config.static_forward_context.values():
        kept = getattr(layer, "kv_cache", [])  # experts are there too
        for tensor in kept if isinstance(kept, list | tuple) else [kept]:
            storage = tensor.untyped_storage()
            caches[storage.data_ptr()] = storage
    return [torch.tensor([], dtype=torch.uint8).set_(s).clone() for s in caches.values()]
