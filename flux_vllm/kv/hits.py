"""The longest cached prefix that serves a request, by which KV cache groups are SPARSE for it."""

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock

from flux_vllm.kv.spec import FluxSpec


def longest_hit(
    hashes: BlockHashList,
    most: int,
    pool: BlockPool,
    spec: FluxSpec,
    *,
    sparse: list[int],
    full: list[int],
) -> tuple[dict[int, list[KVCacheBlock]], int]:
    """Find the longest prefix whose next token finds its keys in every group.

    A FULL group needs every block of it. A SPARSE one needs the sinks and the window before the
    prefix's end, or every block too where SPARSE prefill or an answer's first tokens read others.

    Args:
        hashes: of a request's full blocks.
        most: blocks that may be hit.
        pool: that holds them.
        spec: of the groups that can be SPARSE.
        sparse: ids of the SPARSE groups.
        full: ids of the others.

    Returns: by group id the blocks of the prefix, the null block where none is needed; and how
        many they are.
    """
    tables = {group: [pool.null_block] * most for group in (*full, *sparse)}

    def take(index: int, groups: list[int]) -> bool:
        blocks = pool.get_cached_block(hashes[index], groups)
        if blocks is None:
            return False
        for group, block in zip(groups, blocks, strict=True):
            tables[group][index] = block
        return True

    end = most
    if full:
        end = next((index for index in range(end) if not take(index, full)), end)
    if sparse:
        leading = min(end, spec.sink_blocks) if spec.frees_in_prefill else end
        run = next((index for index in range(leading) if not take(index, sparse)), leading)
        end = end if run == leading else run
        index = end - 1
        while index >= max(run, spec.window_block(end * spec.block_size)):
            if not take(index, sparse):
                end = index  # the hit ends before it, so an earlier window is asked for
            index -= 1
    return {group: table[:end] for group, table in tables.items()}, end
