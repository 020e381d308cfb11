"""The block table of a cluster of layers that can be SPARSE, for vLLM's KV cache manager."""

from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock, resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import KVCacheSpec

from flux_vllm.kv.hits import longest_hit
from flux_vllm.kv.spec import FluxSpec


class FluxManager(SingleTypeKVCacheManager):
    """Gives back the blocks of SPARSE requests that neither sinks nor window hold.

    Serving goes through `FluxCoordinator`, which frees and looks hits up for all groups at once.
    `remove_skipped_blocks` and `find_longest_cache_hit` serve vLLM's own coordinator, with which
    that one is compared.
    """

    most_blocks: int | None = None
    """Most blocks that a SPARSE request holds, for admission; None where nobody said."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sparse_requests: set[str] = set()
        """Requests for which all layers of a cluster that waits for routes are SPARSE."""

    def is_sparse(self, request_id: str) -> bool:
        """Say whether all layers are known to be SPARSE for a request."""
        return not self.kv_cache_spec.waits_for_routes or request_id in self.sparse_requests

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free as vLLM asks, if prefill allows it."""
        if self.kv_cache_spec.frees_in_prefill and self.is_sparse(request_id):
            self.free_middle(request_id, self.kv_cache_spec.freed_end(processed_computed_tokens))

    def free_middle(self, request_id: str, end: int) -> int:
        """Free a request's blocks from behind the sinks to `end`.

        Args:
            request_id: of the request.
            end: index of the first block that is kept.

        Returns: how many of them nobody else holds: the pool has these back.
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
        return sum(block.ref_cnt == 0 for block in freed)

    def get_num_blocks_to_allocate(
        self, request_id: str, *args: Any, apply_admission_cap: bool = False, **kwargs: Any
    ) -> int:
        """Count as vLLM does; to admit a whole SPARSE prompt, what it holds at once is enough."""
        needed = super().get_num_blocks_to_allocate(
            request_id, *args, apply_admission_cap=False, **kwargs
        )
        if apply_admission_cap and self.most_blocks is not None and self.is_sparse(request_id):
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
        """Find the longest prefix that serves any request, whatever its routes will be."""
        assert isinstance(kv_cache_spec, FluxSpec)
        assert not drop_eagle_block, "draft models are refused at start"
        assert dcp_world_size == pcp_world_size == 1, "context parallelism is refused at start"
        size = kv_cache_spec.block_size
        assert alignment_tokens == size, "all groups have blocks of one size"
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, size)
        waits = kv_cache_spec.waits_for_routes
        tables, end = longest_hit(
            hashes,
            min(max_length // size, len(hashes)),
            block_pool,
            kv_cache_spec,
            sparse=[] if waits else kv_cache_group_ids,
            full=kv_cache_group_ids if waits else [],
        )
        return tuple(tables[group] for group in kv_cache_group_ids), end * size
