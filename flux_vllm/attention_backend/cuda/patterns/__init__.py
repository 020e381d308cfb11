"""How CUDA prefills under each sparse pattern: `plan` and `nbytes` of a file each."""

from importlib import import_module
from types import ModuleType

import torch

from flux_vllm.attention_backend.cuda.calls import BatchPrefill
from flux_vllm.batch import Batch
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns.base import SparsePattern


def plan_batch(pattern: SparsePattern, batch: Batch, device: torch.device) -> BatchPrefill:
    """Plan a batch; rows with decode, FULL or short prefill are in it too.

    Raises: UnsupportedConfigurationError: the pattern is for the CPU alone.
    """
    planned: BatchPrefill = _module(pattern).plan(pattern, batch, device)
    return planned


def prefill_nbytes(
    pattern: SparsePattern, num_heads: int, max_tokens: int, max_len: int, head_nbytes: int
) -> int:
    """Return the most memory that a `BatchPrefill` holds beside the KV cache, if not little.

    Args:
        pattern: of SPARSE layers.
        num_heads: query heads of this rank.
        max_tokens: of a step.
        max_len: tokens of the longest request.
        head_nbytes: of one head's vector.
    """
    nbytes: int = _module(pattern).nbytes(pattern, num_heads, max_tokens, max_len, head_nbytes)
    return nbytes


def long_contexts(pattern: SparsePattern, max_len: int) -> list[int]:
    """Return tokens of long requests, one for each kernel that they have to themselves.

    Args:
        pattern: of SPARSE layers.
        max_len: tokens of the longest request.
    """
    lengths: list[int] = _module(pattern).long_contexts(max_len)
    return lengths


def _module(pattern: SparsePattern) -> ModuleType:
    name = f"flux_vllm.attention_backend.cuda.patterns.{pattern.name}"
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise UnsupportedConfigurationError(
            f"sparse pattern {pattern.name!r}: expected one that runs on CUDA, found one for the "
            "CPU alone; choose another sparse_pattern"
        ) from None
