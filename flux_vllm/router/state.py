"""What the routers remember between steps: routes by request, query sums by KV block.

Dimension legend: S request slots, L layers, R requests, T prompt tokens of this step, H head dim.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from flux_vllm.router.features import (
    GRANULE_TOKENS,
    PoolingPlan,
    PromptSpan,
    physical_granules,
    plan_pooling,
)
from flux_vllm.router.route import Route


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy a small array to the device without waiting for it."""
    tensor = torch.from_numpy(array)
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(array: np.ndarray, target: torch.Tensor) -> None:
    """Copy a small array into a tensor of its shape and dtype without waiting for the device."""
    tensor = torch.from_numpy(array)
    target.copy_(tensor if target.device.type == "cpu" else tensor.pin_memory(), non_blocking=True)


class RouteTable:
    """The routes of every live request, by slot; a request keeps its slot until it ends.

    Free slots hold the default routes, so that taking one needs no work on the device: what ended
    requests leave is cleaned when no slot is free, for all of them together.

    Args:
        num_layers: layers of the model.
        capacity: slots to begin with; the table doubles when they run out (preempted requests
            keep theirs, so more than vLLM's max_num_seqs can be live).
        device: where the routes are used.
    """

    def __init__(self, num_layers: int, capacity: int, device: torch.device) -> None:
        self.num_layers = num_layers
        self.device = device
        self.routes = torch.empty(0, num_layers, dtype=torch.int8, device=device)
        self.full_probability = torch.empty(0, num_layers, device=device)
        self.settled_prompt_len = np.zeros(0, dtype=np.int64)
        """[S] length of the prompt that the routes were settled for; 0 while they are open."""
        self._default = torch.full(
            (num_layers,), int(Route.UNDECIDED), dtype=torch.int8, device=device
        )
        self._slots: dict[str, int] = {}
        self._free: list[int] = []
        self._used: list[int] = []
        self._grow(capacity)

    def __len__(self) -> int:
        return len(self._slots)

    def slot(self, request_id: str) -> int | None:
        """Return a request's slot, or None for a request that has none."""
        return self._slots.get(request_id)

    def fix(self, routes: list[int]) -> None:
        """Give every request, live or to come, these routes: [num_layers] `Route` values."""
        self._default = torch.tensor(routes, dtype=torch.int8, device=self.device)
        self.routes[:] = self._default

    def acquire(self, request_ids: Iterable[str]) -> np.ndarray:
        """Return the requests' slots [R] int64, giving new requests one with default routes."""
        slots = []
        for request_id in request_ids:
            slot = self._slots.get(request_id)
            if slot is None:
                if not self._free:
                    self._clean()
                if not self._free:
                    self._grow(2 * len(self.settled_prompt_len))
                slot = self._slots[request_id] = self._free.pop()
                self.settled_prompt_len[slot] = 0
            slots.append(slot)
        return np.array(slots, dtype=np.int64)

    def release(self, request_ids: Iterable[str]) -> None:
        """Take back the slots of requests that ended; unknown requests are passed over."""
        for request_id in request_ids:
            slot = self._slots.pop(request_id, None)
            if slot is not None:
                self._used.append(slot)

    def of_slots(self, slots: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the routes and P(FULL) of some slots, views where it is one: [P, L], [P, L]."""
        if len(slots) == 1:  # by far the most frequent, and without launches
            one = slice(int(slots[0]), int(slots[0]) + 1)
            return self.routes[one], self.full_probability[one]
        index = to_device(slots, self.device)
        return self.routes[index], self.full_probability[index]

    # The table may have grown in one of vLLM's steps, which make tensors in inference mode.
    @torch.inference_mode()
    def _clean(self) -> None:
        """Make the slots that were taken back free, with default routes."""
        if not self._used:
            return
        index = to_device(np.array(self._used, dtype=np.int64), self.device)
        self.routes[index] = self._default
        self.full_probability.index_fill_(0, index, float("nan"))
        self._free.extend(self._used)
        self._used = []

    def _grow(self, capacity: int) -> None:
        old = len(self.settled_prompt_len)
        routes = self._default.repeat(capacity, 1)
        probability = torch.full((capacity, self.num_layers), float("nan"), device=self.device)
        routes[:old] = self.routes
        probability[:old] = self.full_probability
        self.routes, self.full_probability = routes, probability
        self.settled_prompt_len = np.pad(self.settled_prompt_len, (0, capacity - old))
        self._free.extend(range(capacity - 1, old - 1, -1))


@dataclass(frozen=True, slots=True)
class QuerySumPlan:
    """One step's reads and writes of the query sums, the same for every layer."""

    tokens: torch.Tensor
    """[T] int64: this step's prompt tokens, as rows of the query."""
    reset: torch.Tensor
    """int64: granules whose first slot this step writes."""
    written: torch.Tensor
    """int64: distinct granules this step adds prompt tokens to."""
    segment: torch.Tensor
    """[T] int64: index into `written` of each prompt token."""
    routed_slots: torch.Tensor
    """[R] int64: route-table slots of the requests to route."""
    pooling: PoolingPlan
    granules: torch.Tensor
    """int64: physical granules of `pooling.granules`."""
    straddled: torch.Tensor
    """int64: physical granules of `pooling.straddled`."""
    pooled_tokens: torch.Tensor
    """[R, 1] float32: tokens that make up each pooled vector."""


class QuerySums:
    """Sums of pre-RoPE queries by granule of 16 KV slots, for the layers of one KV cache group.

    Memory: layers * num_blocks * (block_size / 16) * head_dim * 2 bytes, and a byte a granule.

    Args:
        num_layers: layers of the group.
        num_blocks: blocks of the KV cache.
        block_size: tokens a block, a multiple of 16.
        head_dim: H.
        device: that of the KV cache.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        head_dim: int,
        device: torch.device,
    ) -> None:
        self.block_size = block_size
        granules = num_blocks * (block_size // GRANULE_TOKENS)
        self.sums = torch.zeros(num_layers, granules, head_dim, dtype=torch.bfloat16, device=device)
        self.counts = torch.zeros(granules, dtype=torch.uint8, device=device)
        """Prompt tokens in each granule's sum."""

    def begin_step(
        self,
        spans: list[PromptSpan],
        routed: np.ndarray,
        slots: np.ndarray,
        slot_mapping: torch.Tensor,
        block_table: torch.Tensor,
        pool_tokens: int,
        pool_prefix: bool = True,
    ) -> QuerySumPlan:
        """Plan this step and update the token counts.

        Args:
            spans: all requests of the batch, in row order; the query holds their tokens in turn.
            routed: [rows] bool, the requests to route in this step.
            slots: [rows] int64, route-table slots.
            slot_mapping: [tokens] int64, KV slot of each token, -1 for padding.
            block_table: [rows, M] int32.
            pool_tokens: tokens pooled at an end of a prompt.
            pool_prefix: whether a prompt's first tokens are pooled too.

        Returns: QuerySumPlan, for `add` and `pool` of every layer.
        """
        tokens: list[torch.Tensor] = []
        offsets = []
        start = total = 0
        for span in spans:
            prompt = max(0, span.known_end - span.computed)
            offsets.append(total)
            tokens.append(torch.arange(start, start + prompt))
            total += prompt
            start += span.scheduled
        token_index = torch.cat(tokens) if tokens else torch.empty(0, dtype=torch.int64)
        in_use = slot_mapping[:start]
        reset = in_use[(in_use >= 0) & (in_use % GRANULE_TOKENS == 0)] // GRANULE_TOKENS
        written, segment = torch.unique_consecutive(
            in_use[token_index] // GRANULE_TOKENS, return_inverse=True
        )
        rows = np.flatnonzero(routed)
        table = block_table[torch.from_numpy(rows)]
        pooling = plan_pooling(
            [spans[row] for row in rows],
            [offsets[row] for row in rows],
            pool_tokens,
            table.shape[1] * self.block_size // GRANULE_TOKENS,
            pool_prefix,
        )
        granules = physical_granules(pooling.granules.items, table, self.block_size)
        straddled = physical_granules(pooling.straddled.items, table, self.block_size)
        pooled_tokens = torch.zeros(len(rows))
        pooling.straddled.add_to(pooled_tokens, self.counts[straddled])
        self.counts[reset] = 0
        self.counts.index_add_(0, written, torch.bincount(segment).to(torch.uint8))
        pooling.tokens.add_to(pooled_tokens, torch.ones(len(pooling.tokens.rows)))
        pooling.granules.add_to(pooled_tokens, self.counts[granules])
        return QuerySumPlan(
            tokens=token_index,
            reset=reset,
            written=written,
            segment=segment,
            routed_slots=torch.from_numpy(slots[rows]),
            pooling=pooling,
            granules=granules,
            straddled=straddled,
            pooled_tokens=pooled_tokens.clamp(min=1)[:, None],
        )

    def reset_layers(self, step: QuerySumPlan) -> None:
        """Reset, in all layers, the granules that a step without prompt tokens writes over.

        Such a step needs no `update_and_pool`.
        """
        self.sums[:, step.reset] = 0

    def update_and_pool(
        self, index: int, step: QuerySumPlan, mean_query: torch.Tensor
    ) -> torch.Tensor:
        """Add this step's queries to one layer's sums, then pool the requests to route.

        Args:
            index: the layer's index within the group.
            step: of `begin_step`.
            mean_query: [T, H] float32, pre-RoPE query averaged over heads, prompt tokens only.

        Returns: pooled_query_features [R, H] float32.
        """
        sums = self.sums[index]
        plan = step.pooling
        pooled = mean_query.new_zeros(len(step.pooled_tokens), mean_query.shape[1])
        plan.straddled.add_to(pooled, sums[step.straddled])
        sums[step.reset] = 0
        if len(step.written):
            added = mean_query.new_zeros(len(step.written), mean_query.shape[1])
            added.index_add_(0, step.segment, mean_query)
            sums[step.written] = (sums[step.written].float() + added).to(sums.dtype)
        plan.tokens.add_to(pooled, mean_query[plan.tokens.items])
        plan.granules.add_to(pooled, sums[step.granules])
        return pooled / step.pooled_tokens
