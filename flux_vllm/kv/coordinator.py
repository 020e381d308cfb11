"""vLLM's coordinator of KV cache groups with all groups taken at once, and told what to free.

Groups of flux hold equal blocks for the same tokens, so most steps of a request need a look at one
of them: nothing changes until its next block begins.
"""

from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from flux_vllm.kv.manager import FluxManager
from flux_vllm.metrics.kv_report import KVReport


class FluxCoordinator:
    """Stands before a coordinator of vLLM's in the calls that every step makes for every request.

    Args:
        stock: vLLM's, with a `FluxManager` among its managers and all blocks of one size.
        max_in_flight_tokens: most tokens that are scheduled but not yet processed.
        max_model_len: most tokens of a request.
        report: counts what is freed; None counts nothing.
    """

    def __init__(
        self,
        stock: KVCacheCoordinator,
        max_in_flight_tokens: int,
        max_model_len: int,
        report: KVReport | None = None,
    ) -> None:
        self._managers = stock.single_type_managers
        self._first = self._managers[0]
        self._sparse = tuple(m for m in self._managers if isinstance(m, FluxManager))
        self._spec = self._sparse[0].kv_cache_spec
        self._no_blocks: tuple[tuple[KVCacheBlock, ...], ...] = ((),) * len(self._managers)
        self._prefill_end: dict[str, int] = {}
        """By request: its prompt's length, or the tokens it computes again after a preemption."""
        self._report = report
        self._stock = stock
        self._num_to_allocate = stock.get_num_blocks_to_allocate
        self._allocate = stock.allocate_new_blocks
        self._cache = stock.cache_blocks
        self._free = stock.free
        self._pop = stock.pop_blocks_for_free
        for manager in self._sparse:
            manager.most_blocks = self._spec.most_blocks(max_in_flight_tokens, max_model_len)

    def install(self) -> None:
        """Take the calls over."""
        for name in (
            "remove_skipped_blocks",
            "get_num_blocks_to_allocate",
            "allocate_new_blocks",
            "cache_blocks",
            "free",
            "pop_blocks_for_free",
        ):
            setattr(self._stock, name, getattr(self, name))

    def sparse_groups(self, request_id: str) -> tuple[FluxManager, ...]:
        """Return the managers of the groups whose layers are all SPARSE for a request."""
        del request_id  # the same for all of them
        return self._sparse

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int | None = None,
    ) -> None:
        """Free what a request's SPARSE layers no longer read; FULL ones keep everything."""
        del num_prompt_tokens  # a resumed request computes more than its prompt again
        if not self._spec.frees_in_prefill:
            # Model runner V2 takes the last recomputed token for prefill too.
            prefill_end = self._prefill_end.get(request_id)
            if prefill_end is None or processed_computed_tokens <= prefill_end:
                return
        end = self._spec.freed_end(processed_computed_tokens)
        freed = 0
        for manager in self.sparse_groups(request_id):
            count = manager.free_middle(request_id, end)
            if not count:
                break  # all of them hold blocks of the same tokens
            freed += count
        if freed and self._report is not None:
            self._report.freed(freed)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        *,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
        **others: Any,
    ) -> int:
        """Count the blocks that a request lacks for so many tokens, over all groups."""
        held = self._first.req_to_blocks.get(request_id)
        if not held:
            self._prefill_end[request_id] = prefill_end
        elif not apply_admission_cap:
            return len(self._managers) * max(cdiv(num_tokens, self._spec.block_size) - len(held), 0)
        return self._num_to_allocate(
            request_id=request_id,
            num_tokens=num_tokens,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
            **others,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Give a request the blocks that it lacks for so many tokens, in every group."""
        held = self._first.req_to_blocks.get(request_id, ())
        if cdiv(num_tokens, self._spec.block_size) <= len(held):
            return self._no_blocks
        return self._allocate(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Let a request's full blocks be hit, in every group."""
        tokens = self._stock.get_num_cacheable_tokens(num_computed_tokens, 0)
        if tokens // self._spec.block_size > self._first.num_cached_block.get(
            request.request_id, 0
        ):
            self._cache(request, num_computed_tokens)

    def free(self, request_id: str) -> None:
        """Free all that a request holds: it ended or is preempted."""
        self._forget(request_id)
        self._free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take all that a request holds, for the caller to free."""
        self._forget(request_id)
        return self._pop(request_id)

    def _forget(self, request_id: str) -> None:
        self._prefill_end.pop(request_id, None)
        if self._report is None or not self._first.req_to_blocks.get(request_id):
            return
        tables = [manager.req_to_blocks.get(request_id, ()) for manager in self._managers]
        self._report.held(sum(not block.is_null for table in tables for block in table))
