"""vLLM's coordinator of KV cache groups with all groups taken at once, and told what to free.

Groups of flux hold equal blocks for the same tokens, so most steps of a request need a look at one
of them: nothing changes until its next block begins.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from vllm.utils.math_utils import cdiv
from vllm.v1.core.kv_cache_coordinator import KVCacheCoordinator
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, resolve_block_hashes
from vllm.v1.request import Request

from flux_vllm.kv.hits import longest_hit
from flux_vllm.kv.manager import FluxManager
from flux_vllm.metrics.kv_report import KVReport
from flux_vllm.router.route import Route


@dataclass(slots=True)
class _Live:
    """A request that holds blocks, or asks for its first ones."""

    prefill_end: int
    """Its prompt's length; after a preemption, of what it computes again all but the newest."""
    freed_end: int = 0
    """Blocks up to which its SPARSE groups have given back."""
    given_back: int = 0
    """Blocks that would be held besides, had it given nothing back."""
    is_admitted: bool = False
    had_room: bool = True
    """Whether it would have been admitted had all others kept their blocks."""


class FluxCoordinator:
    """Stands before a coordinator of vLLM's in the calls that every step makes for every request.

    Until a request's routes are known it is taken for FULL in all clusters that wait for them: in
    what it is admitted for, in the prefixes that serve it, and in what it holds.

    Args:
        stock: vLLM's, with a `FluxManager` among its managers and all blocks of one size.
        group_layers: of each group, indices of its layers.
        max_in_flight_tokens: most tokens that are scheduled but not yet processed.
        max_model_len: most tokens of a request.
        report: counts what is freed; None counts nothing.
    """

    def __init__(
        self,
        stock: KVCacheCoordinator,
        group_layers: Sequence[Sequence[int]],
        max_in_flight_tokens: int,
        max_model_len: int,
        report: KVReport | None = None,
    ) -> None:
        self._managers = stock.single_type_managers
        self._first = self._managers[0]
        self._freeing = tuple(m for m in self._managers if isinstance(m, FluxManager))
        self._waiting = tuple(m for m in self._freeing if m.kv_cache_spec.waits_for_routes)
        self._spec = self._freeing[0].kv_cache_spec
        self._group_layers = group_layers
        self._no_blocks: tuple[tuple[KVCacheBlock, ...], ...] = ((),) * len(self._managers)
        self._live: dict[str, _Live] = {}
        self._given_back = 0
        self._report = report
        self._stock = stock
        self._pool = stock.block_pool
        self._num_to_allocate = stock.get_num_blocks_to_allocate
        self._allocate = stock.allocate_new_blocks
        self._cache = stock.cache_blocks
        self._free = stock.free
        self._pop = stock.pop_blocks_for_free
        self._asking = ""
        """The request for which a hit is looked up; nobody's routes are known."""
        for manager in self._freeing:
            manager.most_blocks = self._spec.most_blocks(max_in_flight_tokens, max_model_len)

    def install(self) -> "FluxCoordinator":
        """Take the calls over; returns itself."""
        for name in (
            "remove_skipped_blocks",
            "get_num_blocks_to_allocate",
            "allocate_new_blocks",
            "cache_blocks",
            "find_longest_cache_hit",
            "free",
            "pop_blocks_for_free",
        ):
            setattr(self._stock, name, getattr(self, name))
        return self

    # Routes.

    def settle(self, request_id: str, routes: Sequence[int] | np.ndarray) -> None:
        """Take up a request's routes, one `Route` value a layer of the model."""
        for manager in self._waiting:
            layers = self._group_layers[manager.kv_cache_group_id]
            if all(routes[layer] == Route.SPARSE for layer in layers):
                manager.sparse_requests.add(request_id)
        live = self._live.get(request_id)
        if live is not None:
            live.freed_end = 0  # these groups have given nothing back yet

    def forget(self, request_id: str) -> None:
        """Forget the routes of a request that ended; a preempted one keeps them."""
        for manager in self._waiting:
            manager.sparse_requests.discard(request_id)

    def look_up(
        self, get_computed_blocks: Callable, request: Request, *args: Any, **kwargs: Any
    ) -> Any:
        """Look a request's hit up by its routes: vLLM asks a coordinator for nobody's."""
        self._asking = request.request_id
        try:
            return get_computed_blocks(request, *args, **kwargs)
        finally:
            self._asking = ""

    # What vLLM calls.

    def remove_skipped_blocks(
        self,
        request_id: str,
        processed_computed_tokens: int,
        num_prompt_tokens: int,
    ) -> None:
        """Free what a request's SPARSE layers no longer read; FULL ones keep everything."""
        live = self._live.get(request_id)
        if live is None or not live.is_admitted:
            return
        if processed_computed_tokens < self._spec.whole_until(num_prompt_tokens, live.prefill_end):
            return
        end = self._spec.freed_end(processed_computed_tokens)
        if end <= live.freed_end:
            return
        live.freed_end = end
        freed = sum(
            manager.free_middle(request_id, end)
            for manager in self._freeing
            if manager.is_sparse(request_id)
        )
        live.given_back += freed
        self._given_back += freed
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
        if held and not apply_admission_cap:
            return len(self._managers) * max(cdiv(num_tokens, self._spec.block_size) - len(held), 0)
        asked = {"request_id": request_id, "num_tokens": num_tokens, "prefill_end": prefill_end}
        needed = self._num_to_allocate(apply_admission_cap=apply_admission_cap, **asked, **others)
        if not held and apply_admission_cap:
            live = self._live[request_id] = _Live(prefill_end)
            free = self._pool.get_num_free_blocks()
            if self._report is not None and needed <= free:  # else it waits, and asks again
                whole = self._num_to_allocate(**asked, **others)
                live.had_room = whole <= free - self._given_back
        elif not held and request_id not in self._live:
            self._live[request_id] = _Live(prefill_end)
        return needed

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, *args: Any, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Give a request the blocks that it lacks for so many tokens, in every group."""
        live = self._live[request_id]
        if not live.is_admitted:
            self._admit(request_id, live)
        held = self._first.req_to_blocks.get(request_id, ())
        if cdiv(num_tokens, self._spec.block_size) <= len(held):
            return self._no_blocks
        return self._allocate(request_id, num_tokens, *args, **kwargs)

    def cache_blocks(self, request: Request, num_computed_tokens: int) -> None:
        """Let a request's full blocks be hit, in every group."""
        if not self._first.enable_caching:
            return
        tokens = self._stock.get_num_cacheable_tokens(num_computed_tokens, 0)
        if tokens // self._spec.block_size > self._first.num_cached_block.get(
            request.request_id, 0
        ):
            self._cache(request, num_computed_tokens)

    def find_longest_cache_hit(
        self, block_hashes: list[BlockHash], max_cache_hit_length: int
    ) -> tuple[tuple[list[KVCacheBlock], ...], int, int]:
        """Find the longest prefix that serves the asking request; see `longest_hit`.

        Returns: the blocks of each group, tokens, and 0: what vLLM's own groups that forget may
            have missed.
        """
        size = self._spec.block_size
        hashes = resolve_block_hashes(block_hashes, self._pool.hash_block_size, size)
        sparse: list[int] = []
        full: list[int] = []
        for group, manager in enumerate(self._managers):
            is_sparse = isinstance(manager, FluxManager) and manager.is_sparse(self._asking)
            (sparse if is_sparse else full).append(group)
        tables, end = longest_hit(
            hashes,
            min(max_cache_hit_length // size, len(hashes)),
            self._pool,
            self._spec,
            sparse=sparse,
            full=full,
        )
        return tuple(tables[group] for group in range(len(tables))), end * size, 0

    def free(self, request_id: str) -> None:
        """Free all that a request holds: it ended or is preempted."""
        self._leave(request_id)
        self._free(request_id)

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """Take all that a request holds, for the caller to free."""
        self._leave(request_id)
        return self._pop(request_id)

    def _admit(self, request_id: str, live: _Live) -> None:
        """Count a request that gets its first blocks; it may lack those between hits."""
        live.is_admitted = True
        live.given_back = sum(
            block.is_null
            for manager in self._freeing
            for block in manager.req_to_blocks.get(request_id, ())
        )
        self._given_back += live.given_back
        if self._report is not None and not live.had_room:
            self._report.admitted()

    def _leave(self, request_id: str) -> None:
        live = self._live.pop(request_id, None)
        if live is None or not live.is_admitted:
            return
        self._given_back -= live.given_back
        if self._report is not None:
            tables = [manager.req_to_blocks.get(request_id, ()) for manager in self._managers]
            self._report.held(sum(not block.is_null for table in tables for block in table))
