"""A scheduler and a worker around vLLM's real KVCacheManager, with prefixes for keys and values.

Every token of a request writes the name of its prefix into the slot that its group's table gives
it, and every query checks that the keys which its layers read are the names of its own prefixes:
freed too early, shared wrongly or hit without being there shows as a wrong name. The worker's
tables only grow, as vLLM's do, so ids of freed blocks stay in them.
"""

import random
from collections import Counter, deque
from dataclasses import dataclass, field

from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request, RequestStatus

from flux_vllm.router.route import Route
from tests.unit.kv.keys_read import KeysRead

CHUNK_TOKENS = 96


@dataclass
class Live:
    """One request."""

    request: Request
    outputs: int
    prefixes: list[int] = field(default_factory=list)
    tables: list[list[int]] = field(default_factory=list)
    """The worker's, by group."""
    life: int = 0
    """Grows with each preemption."""
    prefill_end: int = 0
    unsampled: int = 0
    """Steps in flight that will give a token."""
    sparse: list[bool] = field(default_factory=list)
    """By group: what its layers are for this request."""
    is_known: bool = False
    """Whether the scheduler knows its routes."""
    freed_to: list[int] = field(default_factory=list)
    """By group: blocks up to which all behind the sinks should be null."""


@dataclass(frozen=True)
class Row:
    """One request's part of a step."""

    live: Live
    life: int
    start: int
    length: int
    tables: list[list[int]]
    is_prefill: bool

    @property
    def prompt_len(self) -> int:
        """Tokens of the request's prompt."""
        return self.live.request.num_prompt_tokens


class Simulation:
    """Runs random requests.

    Args:
        manager: vLLM's, its coordinator taken over or not.
        is_sparse: by KV cache group; None where it differs by request, and is known to the
            scheduler with the output of its first step.
        block_size: tokens a block.
        sink_tokens: of SPARSE groups.
        window_tokens: of SPARSE groups.
        is_local: whether prefill of SPARSE groups reads sinks and window alone.
        lag: steps in flight while the next one is scheduled: 1 is asynchronous scheduling.
        seed: of everything random.
        full_decode_tokens: of an answer, for which SPARSE groups read everything.
    """

    def __init__(
        self,
        manager: KVCacheManager,
        is_sparse: list[bool | None],
        block_size: int,
        sink_tokens: int,
        window_tokens: int,
        is_local: bool,
        lag: int,
        seed: int,
        full_decode_tokens: int = 0,
    ) -> None:
        init_none_hash(sha256)
        self.manager = manager
        self.is_sparse = is_sparse
        self.block_size = block_size
        self.sink_tokens = sink_tokens
        self.window_tokens = window_tokens
        self.is_local = is_local
        self.full_decode_tokens = full_decode_tokens
        self.keys_read = KeysRead(
            block_size, sink_tokens, window_tokens, is_local, full_decode_tokens
        )
        self.lag = lag
        self.chooser = random.Random(seed)
        self.running: list[Live] = []
        self.waiting: deque[Live] = deque()
        self.finished: list[list[int]] = []
        self.documents = [self._tokens(400) for _ in range(2)]
        self.counts: Counter[str] = Counter()
        self._names: dict[tuple[int, int], int] = {}
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}
        self._in_flight: deque[tuple[list[Row], list[int]]] = deque()
        self._hasher = get_request_block_hasher(block_size, sha256)
        self._numbers = iter(range(10**6))

    def _tokens(self, length: int) -> list[int]:
        return [self.chooser.randrange(1000) for _ in range(length)]

    def add(self, prompt: list[int], outputs: int) -> Live:
        """Queue a request."""
        request = Request(
            f"request-{next(self._numbers)}",
            prompt,
            SamplingParams(max_tokens=outputs, ignore_eos=True),
            None,
            block_hasher=self._hasher,
        )
        live = Live(request, outputs)
        live.sparse = [
            self.chooser.random() < 0.6 if sparse is None else sparse for sparse in self.is_sparse
        ]
        live.freed_to = [0] * len(self.is_sparse)
        self.waiting.append(live)
        return live

    def add_random(self) -> None:
        """Queue a document's beginning and a question, or a question about an earlier answer."""
        if self.finished and self.chooser.random() < 0.4:
            known = self.chooser.choice(self.finished)
        else:
            known = self.chooser.choice(self.documents)[: self.chooser.randrange(400)]
        self.add(known + self._tokens(self.chooser.randrange(1, 40)), self.chooser.randrange(1, 90))

    def step(self) -> None:
        """Schedule a step, and run what is no longer in flight."""
        self.manager.new_step_starts()
        rows = [row for live in list(self.running) if (row := self._schedule_running(live))]
        rows = [row for row in rows if row.life == row.live.life]  # not preempted by a later one
        while self.waiting and len(self.running) < 8:
            row = self._admit(self.waiting[0])
            if row is None:
                break
            self.running.append(self.waiting.popleft())
            rows.append(row)
        self.check_blocks()
        pool = self.manager.block_pool
        poisoned = [b.block_id for b in pool.blocks if b.ref_cnt == 0 and b.block_hash is None]
        self._in_flight.append((rows, poisoned))
        while len(self._in_flight) > self.lag:
            self._run(*self._in_flight.popleft())

    def _schedule_running(self, live: Live) -> Row | None:
        if live not in self.running:
            return None  # preempted for the sake of one before it
        request = live.request
        length = request.num_tokens + live.unsampled - request.num_computed_tokens
        length = min(length, CHUNK_TOKENS)
        if length <= 0 or request.num_output_tokens + live.unsampled >= live.outputs:
            return None
        while True:
            self._expect(live, request.num_computed_tokens)
            blocks = self.manager.allocate_slots(request, length)
            if blocks is not None:
                break
            victim = self.running[-1]
            self.preempt(victim)
            if victim is live:
                return None
        return self._scheduled(live, blocks.get_block_ids(), length)

    def _admit(self, live: Live) -> Row | None:
        request = live.request
        hit, hit_tokens, _ = self.manager.get_computed_blocks(request)
        length = min(request.num_tokens - hit_tokens, CHUNK_TOKENS)
        new = self.manager.allocate_slots(
            request, length, hit_tokens, hit, full_sequence_must_fit=True
        )
        if new is None:
            return None
        live.tables = [[] for _ in self.is_sparse]
        live.prefill_end = max(request.num_prompt_tokens, request.num_tokens)
        lacks_middle = self.is_local and not self.full_decode_tokens
        skipped = self._block_of_window(hit_tokens) if lacks_middle else 0
        live.freed_to = [skipped * self._gives_back(live, i) for i in range(len(self.is_sparse))]
        request.num_computed_tokens = hit_tokens
        request.status = RequestStatus.RUNNING
        if hit_tokens:
            self.counts["hits"] += 1
            self.counts["null_hits"] += any(b.is_null for group in hit.blocks for b in group)
        return self._scheduled(live, self.manager.get_block_ids(request.request_id), length)

    def _scheduled(self, live: Live, new_ids: tuple[list[int], ...], length: int) -> Row:
        request = live.request
        for table, ids in zip(live.tables, new_ids, strict=True):
            table.extend(ids)
        start = request.num_computed_tokens
        request.num_computed_tokens += length
        request.num_in_flight_tokens += length
        if request.num_computed_tokens >= request.num_tokens + live.unsampled:
            live.unsampled += 1
        tables = [list(table) for table in live.tables]
        return Row(live, live.life, start, length, tables, start < live.prefill_end)

    def preempt(self, live: Live) -> None:
        """Take a request's blocks; it waits to compute all its tokens again."""
        self.counts["preemptions"] += 1
        self.running.remove(live)
        self.manager.free(live.request)
        live.request.status = RequestStatus.PREEMPTED
        live.request.num_computed_tokens = 0
        live.life += 1
        live.unsampled = 0
        live.freed_to = [0] * len(self.is_sparse)
        self.waiting.appendleft(live)

    def finish(self, live: Live) -> None:
        """End a request."""
        self.running.remove(live)
        if hasattr(self.manager, "flux"):
            self.manager.flux.forget(live.request.request_id)
        self.manager.free(live.request)
        live.life += 1
        self.finished.append(list(live.request.all_token_ids))

    def _run(self, rows: list[Row], poisoned: list[int]) -> None:
        for block in poisoned:
            for offset in range(self.block_size):
                self._slots.pop((block, offset), None)
        for row in rows:
            self._write(row)
        for row in rows:
            positions = range(row.start, row.start + row.length)
            for position in {positions[0], positions[-1], self.chooser.choice(positions)}:
                self._read(row, position)
        for row in rows:
            self._learn(row.live)
            self._sample(row)

    def _gives_back(self, live: Live, group: int) -> bool:
        """Say whether the scheduler knows that a group is SPARSE for a request."""
        return live.sparse[group] and (self.is_sparse[group] is not None or live.is_known)

    def _learn(self, live: Live) -> None:
        """Tell the scheduler a request's routes, with its first output."""
        if live.is_known or not (live in self.running or live in self.waiting):
            return
        live.is_known = True
        if None in self.is_sparse:
            routes = [Route.SPARSE if sparse else Route.FULL for sparse in live.sparse]
            self.manager.flux.settle(live.request.request_id, routes)

    def _write(self, row: Row) -> None:
        tokens, prefixes = row.live.request.all_token_ids, row.live.prefixes
        for position in range(len(prefixes), row.start + row.length):
            key = (prefixes[-1] if prefixes else -1, tokens[position])
            prefixes.append(self._names.setdefault(key, len(self._names)))
        for group, table in enumerate(row.tables):
            for position in range(row.start, row.start + row.length):
                block, offset = divmod(position, self.block_size)
                assert table[block], "a token's own slot lies in the null block"
                self._slots[table[block], offset] = (group, prefixes[position])

    def _read(self, row: Row, position: int) -> None:
        for group, table in enumerate(row.tables):
            is_sparse = row.live.sparse[group]
            for key in self.keys_read.of(position, row.prompt_len, row.is_prefill, is_sparse):
                block, offset = divmod(key, self.block_size)
                found = self._slots.get((table[block], offset))
                assert found == (group, row.live.prefixes[key]), (
                    f"group {group}, query {position} of {row.live.request.request_id}: key {key} "
                    f"in block {table[block]} is {found}"
                )

    def _sample(self, row: Row) -> None:
        live, request = row.live, row.live.request
        request.num_in_flight_tokens -= row.length
        if row.life != live.life or row.start + row.length < request.num_tokens:
            return
        request.append_output_token_ids(self.chooser.randrange(1000))
        live.unsampled -= 1
        if request.num_output_tokens >= live.outputs or self.chooser.random() < 0.005:
            self.finish(live)

    def _block_of_window(self, position: int) -> int:
        return max(0, position - self.window_tokens + 1) // self.block_size

    def _expect(self, live: Live, computed: int) -> None:
        """Note what a request should hold from now on, by the formula of docs/KV_MEMORY.md."""
        processed = computed - live.request.num_in_flight_tokens
        past = max(live.request.num_prompt_tokens, live.prefill_end - 1)
        early = self.full_decode_tokens
        is_late = not early or processed >= live.request.num_prompt_tokens + early
        if is_late and (self.is_local or processed > past):
            end = self._block_of_window(processed - max(self.block_size, 128))
            for group, freed_to in enumerate(live.freed_to):
                if self._gives_back(live, group):
                    live.freed_to[group] = max(freed_to, end)

    def check_blocks(self) -> None:
        """Check every block's references, and which blocks each request holds."""
        pool = self.manager.block_pool
        managers = self.manager.coordinator.single_type_managers
        references: Counter[int] = Counter()
        for manager in managers:
            for blocks in manager.req_to_blocks.values():
                references.update(block.block_id for block in blocks if not block.is_null)
        free = [block.block_id for block in pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free))
        assert not references.keys() & set(free), "a block is free and referenced"
        assert len(free) + len(references) + 1 == len(pool.blocks), "a block is lost"
        for block in pool.blocks[1:]:
            assert block.ref_cnt == references[block.block_id]
        sink_blocks = max(1, -(-self.sink_tokens // self.block_size))
        for live in self.running:
            for manager, freed_to in zip(managers, live.freed_to, strict=True):
                blocks = manager.req_to_blocks[live.request.request_id]
                null = [index for index, block in enumerate(blocks) if block.is_null]
                freed = range(sink_blocks, freed_to)
                assert null == list(freed), (live.request.request_id, null, freed)
                self.counts["null"] += len(null)

    def run(self, steps: int) -> None:
        """Run random requests, then let all that are there end."""
        for _ in range(steps):
            if self.chooser.random() < 0.25:
                self.add_random()
            if self.running and self.chooser.random() < 0.03:
                self.preempt(self.chooser.choice(self.running))
            if self.running and self.chooser.random() < 0.03:
                self.finish(self.chooser.choice(self.running))
            if self.chooser.random() < 0.05:
                blocks = range(1, len(self.manager.block_pool.blocks))
                self.manager.evict_blocks(set(self.chooser.sample(blocks, 10)))
            self.step()
        while self.running or self.waiting:
            self.step()
        while self._in_flight:
            self._run(*self._in_flight.popleft())
