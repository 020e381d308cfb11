"""The block table of a cluster of SPARSE layers, for vLLM's KV cache manager."""

from collections.abc import Sequence
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from flux_vllm.kv.spec import FluxSpec


class FluxManager(SingleTypeKVCacheManager):
    """Gives back the blocks that neither sinks nor window hold."""

    most_blocks: int | None = None
    """Most blocks that a request holds, for admission; None where nobody said."""

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free as vLLM asks, if prefill allows it; else `FluxCoordinator` says when."""
        if self.kv_cache_spec.frees_in_prefill:
            self.free_middle(request_id, self.kv_cache_spec.freed_end(processed_computed_tokens))

    def free_middle(self, request_id: str, end: int) -> int:
        """Free a request's blocks from behind the sinks to `end`.

        Args:
            request_id: of the request.
            end: index of the first block that is kept.

        Returns: how many it freed now.
        """
        blocks = self.req_to_blocks.get(request_id, [])
        freed: list[KVCacheBlock] = []
        for index in range(min(end, len(blocks)) - 1, self.kv_cache_spec.sink_blocks - 1, -1):
            if blocks[index].is_null:
                break  # all before it were freed earlier
            freed.append(blocks[index])
            blocks[index] = self._null_block
        if freed:
            self.block_pool.free_blocks(freed)
        return len(freed)

    def get_num_blocks_to_allocate(
        self, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Count as vLLM does; to admit a whole prompt, what it holds at once is enough."""
        needed = super().get_num_blocks_to_allocate(*args, apply_admission_cap=False, **kwargs)
        if apply_admission_cap and self.most_blocks is not None:
            return min(needed, self.most_blocks)
        return needed

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        dcp_world_size: int = 1,
        pcp_world_size: int = 1,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """Find the longest prefix whose next token finds its keys: sinks, and the window before it.

        Where SPARSE prefill reads other keys too, every block of the prefix is needed.
        """
        assert isinstance(kv_cache_spec, FluxSpec)
        assert not drop_eagle_block, "draft models are refused at start"
        assert dcp_world_size == pcp_world_size == 1, "context parallelism is refused at start"
        size = kv_cache_spec.block_size
        assert alignment_tokens == size, "all groups have blocks of one size"
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        most = min(max_length // size, len(hashes))
        found: dict[int, Sequence[KVCacheBlock]] = {}

        def is_cached(index: int) -> bool:
            blocks = block_pool.get_cached_block(hashes[index], kv_cache_group_ids)
            if blocks is not None:
                found[index] = blocks
            return blocks is not None

        leading = min(most, kv_cache_spec.sink_blocks) if kv_cache_spec.frees_in_prefill else most
        run = next((index for index in range(leading) if not is_cached(index)), leading)
        end = most if run == leading else run
        index = end - 1
        while index >= max(run, kv_cache_spec.window_block(end * size)):
            if not is_cached(index):
                end = index  # the hit ends before it, so an earlier window is asked for
            index -= 1
        hit = tuple(
            [found[i][group] if i in found else block_pool.null_block for i in range(end)]
            for group in range(len(kv_cache_group_ids))
        )
        return hit, end * size
