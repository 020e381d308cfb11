"""A small simulated server: requests, chunks, a paged KV cache with prefix sharing and block reuse.

It keeps every token's feature by KV slot, so that pooling by definition is a look-up of positions.
Features are small whole numbers, exact in bfloat16 even summed over a granule.

Dimension legend: T tokens of a step, L layers, H head dim.
"""

import random
from collections import OrderedDict
from dataclasses import dataclass, field

import numpy as np
import torch

from flux_vllm.router.features import PromptSpan
from flux_vllm.router.state import QuerySums
from tests.helpers.reference_router import pooled_positions

STALE = 1_000_000
"""A block id that no cache has: fills table tails, which nothing may read."""


@dataclass
class Request:
    """One request of the simulation."""

    tokens: list[int]
    prompt_len: int
    final_len: int
    """Tokens at which it ends."""
    computed: int = 0
    blocks: list[int] = field(default_factory=list)


@dataclass
class Step:
    """One step as the server would hand it to QuerySums, and the pooled vectors by definition."""

    spans: list[PromptSpan]
    routed: np.ndarray
    slots: np.ndarray
    slot_mapping: torch.Tensor
    block_table: torch.Tensor
    query: torch.Tensor
    """[L, T, H]: all tokens of the batch, mean over heads."""
    expected: torch.Tensor
    """[L, routed rows, H]."""


class PagedServer:
    """Runs requests through a cache of `num_blocks` blocks; block 0 is the null block.

    Args:
        seed: of every choice.
        block_size: tokens a block.
        pool_tokens: tokens pooled at an end.
        num_blocks: of the cache.
        pool_prefix: whether the first tokens are pooled, beside the latest.
    """

    layers, head_dim = 2, 3

    def __init__(
        self,
        seed: int,
        block_size: int,
        pool_tokens: int,
        num_blocks: int,
        pool_prefix: bool = True,
    ) -> None:
        self.random = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.block_size = block_size
        self.pool_tokens, self.pool_prefix = pool_tokens, pool_prefix
        self.free = list(range(1, num_blocks))
        self.random.shuffle(self.free)
        self.users = [0] * num_blocks
        self.cached: OrderedDict[tuple[int, ...], int] = OrderedDict()  # oldest first
        slots = num_blocks * block_size
        self.features = torch.full((self.layers, slots, self.head_dim), float("nan"))
        self.is_prompt = torch.zeros(slots, dtype=torch.bool)
        self.requests: list[Request] = []
        self.reused_blocks = self.shared_in_step = self.preemptions = 0
        self._used: set[int] = set()
        self._hashed_now: set[int] = set()

    def admit(self, tokens: list[int], generate: int) -> Request:
        """Start a request."""
        request = Request(list(tokens), len(tokens), len(tokens) + generate)
        self.requests.append(request)
        return request

    def end(self, request: Request) -> None:
        """Finish or abort a request; its full blocks stay cached until they are needed."""
        self._drop_blocks(request)
        self.requests.remove(request)

    def preempt(self, request: Request) -> None:
        """Take a request's blocks away; it starts again with what it has generated."""
        self.preemptions += 1
        self._drop_blocks(request)

    def _drop_blocks(self, request: Request) -> None:
        for block in request.blocks:
            self.users[block] -= 1
            if self.users[block] == 0 and block not in self.cached.values():
                self.free.append(block)
        request.blocks, request.computed = [], 0

    def _take_block(self) -> int | None:
        if not self.free:
            for prefix, block in self.cached.items():
                if self.users[block] == 0:
                    del self.cached[prefix]
                    self.free.append(block)
                    break
            else:
                return None
        block = self.free.pop(self.random.randrange(len(self.free)))
        self.reused_blocks += block in self._used
        self._used.add(block)
        self.users[block] += 1
        return block

    def _hit_prefix(self, request: Request) -> None:
        size = self.block_size
        for end in range(size, len(request.tokens), size):
            block = self.cached.get(tuple(request.tokens[:end]))
            if block is None:
                break
            self.users[block] += 1
            self.shared_in_step += block in self._hashed_now
            request.blocks.append(block)
            request.computed = end

    def _schedule(self, request: Request, most: int) -> int:
        """Give a request blocks for up to `most` tokens; full blocks are shared from now on."""
        if request.computed == 0:
            self._hit_prefix(request)
        scheduled = min(most, len(request.tokens) - request.computed)
        end = request.computed + scheduled
        while len(request.blocks) * self.block_size < end:
            block = self._take_block()
            if block is None:
                break
            request.blocks.append(block)
        scheduled = min(end, len(request.blocks) * self.block_size) - request.computed
        for index in range((request.computed + scheduled) // self.block_size):
            prefix = tuple(request.tokens[: (index + 1) * self.block_size])
            if prefix not in self.cached:
                self.cached[prefix] = request.blocks[index]
                self._hashed_now.add(request.blocks[index])
        return scheduled

    def step(self, chunk: int, unrouted_share: float = 0.0) -> Step | None:
        """Run one step over all requests, in random order, each with up to `chunk` tokens."""
        self._hashed_now = set()
        scheduled: list[tuple[Request, int]] = []
        for request in self.random.sample(self.requests, len(self.requests)):
            count = self._schedule(request, self.random.randint(1, chunk))
            if count:
                scheduled.append((request, count))
        if not scheduled:
            return None
        self.random.shuffle(scheduled)  # a row may come before the one whose blocks it shares
        step = self._describe(scheduled, unrouted_share)
        step.expected = self._pool(scheduled, step.routed)
        for request, count in scheduled:
            request.computed += count
            if request.computed == len(request.tokens):
                if len(request.tokens) >= request.final_len:
                    self.end(request)
                else:
                    request.tokens.append(self.random.randrange(1_000_000))
        return step

    def _describe(self, scheduled: list[tuple[Request, int]], unrouted_share: float) -> Step:
        width = max(len(request.blocks) for request, _ in scheduled) + 2
        table = torch.full((len(scheduled), width), STALE, dtype=torch.int32)
        slot_mapping, query = [], []
        for row, (request, count) in enumerate(scheduled):
            table[row, : len(request.blocks)] = torch.tensor(request.blocks, dtype=torch.int32)
            positions = torch.arange(request.computed, request.computed + count)
            slots = self._slots(request, positions)
            assert not self._is_shared(request, positions)
            drawn = torch.randint(
                -8, 9, (self.layers, count, self.head_dim), generator=self.generator
            ).float()
            self.features[:, slots] = drawn
            self.is_prompt[slots] = positions < request.prompt_len
            slot_mapping.append(slots)
            query.append(drawn)
        padding = torch.full((3,), -1)
        routed = [
            request.computed < request.prompt_len and self.random.random() >= unrouted_share
            for request, _ in scheduled
        ]
        return Step(
            spans=[PromptSpan(r.computed, count, r.prompt_len) for r, count in scheduled],
            routed=np.array(routed),
            slots=np.arange(len(scheduled))[::-1].copy(),
            slot_mapping=torch.cat([*slot_mapping, padding]),
            block_table=table,
            query=torch.cat(query, dim=1),
            expected=torch.empty(0),
        )

    def _is_shared(self, request: Request, positions: torch.Tensor) -> bool:
        blocks = {request.blocks[p // self.block_size] for p in positions.tolist()}
        return any(self.users[block] > 1 and block not in self._hashed_now for block in blocks)

    def _slots(self, request: Request, positions: torch.Tensor) -> torch.Tensor:
        blocks = torch.tensor(request.blocks)[positions // self.block_size]
        return blocks * self.block_size + positions % self.block_size

    def _pool(self, scheduled: list[tuple[Request, int]], routed: np.ndarray) -> torch.Tensor:
        """Pool by definition, every row's tokens of this step written already."""
        pooled = []
        for (request, count), wanted in zip(scheduled, routed, strict=True):
            if not wanted:
                continue
            end = request.computed + count
            slots = self._slots(request, torch.arange(end))
            positions = pooled_positions(
                request.computed,
                end,
                request.prompt_len,
                self.pool_tokens,
                self.is_prompt[slots],
                self.pool_prefix,
            )
            pooled.append(self.features[:, slots[positions]].mean(dim=1))
        if not pooled:
            return torch.empty(self.layers, 0, self.head_dim)
        return torch.stack(pooled, dim=1)

    def new_sums(self) -> QuerySums:
        """Make the side tables under test, filled with NaN outside the null block."""
        sums = QuerySums(
            self.layers, len(self.users), self.block_size, self.head_dim, torch.device("cpu")
        )
        sums.sums[:, self.block_size // 16 :] = float("nan")
        sums.counts[self.block_size // 16 :] = 99
        return sums


def run(sums: QuerySums, step: Step, pool_tokens: int, pool_prefix: bool = True) -> torch.Tensor:
    """Give one step to the side tables. Returns: [L, routed rows, H]."""
    plan = sums.begin_step(
        step.spans,
        step.routed,
        step.slots,
        step.slot_mapping,
        step.block_table,
        pool_tokens,
        pool_prefix,
    )
    assert plan.routed_slots.tolist() == step.slots[step.routed].tolist()
    return torch.stack(
        [
            sums.update_and_pool(layer, plan, step.query[layer][plan.tokens])
            for layer in range(len(step.query))
        ]
    )
