"""How the CPU prefills under each sparse pattern: `plan(pattern, chunk)` of a file each."""

from importlib import import_module

from flux_vllm.attention_backend.cpu.prefill import Chunk, ChunkPrefill
from flux_vllm.patterns.base import SparsePattern


def plan_chunk(pattern: SparsePattern, chunk: Chunk) -> ChunkPrefill:
    """Plan a SPARSE chunk, by `plan` of the module that has the pattern's name."""
    module = import_module(f"flux_vllm.attention_backend.cpu.patterns.{pattern.name}")
    planned: ChunkPrefill = module.plan(pattern, chunk)
    return planned
