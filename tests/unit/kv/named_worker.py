"""A worker without a model, for vLLM's real scheduler: keys and values are names of prefixes.

Every token writes the name of its prefix into the slot that its group's table gives it, and every
query checks that the keys which its layers read are the names of its own prefixes. Free blocks that
no hit can find lose their names before each step. Routes are decided in a request's first step and
sent with its output.
"""

import random
from dataclasses import dataclass, field
from typing import Any

from vllm.v1.outputs import ModelRunnerOutput

from flux_vllm.router.route import Route
from tests.unit.kv.keys_read import KeysRead


@dataclass
class _Row:
    """A request, as the worker knows it."""

    tokens: list[int]
    prompt_len: int
    routes: list[int]
    tables: list[list[int]] = field(default_factory=list)
    prefill_end: int = 0
    is_new: bool = True


class NamedWorker:
    """Runs steps.

    Args:
        scheduler: vLLM's, of ours.
        block_size: tokens a block.
        sink_tokens: of SPARSE groups.
        window_tokens: of SPARSE groups.
        is_local: whether SPARSE prefill reads sinks and window alone.
        full_decode_tokens: of an answer, for which SPARSE decode reads everything.
        chooser: of routes and tokens.
    """

    def __init__(
        self,
        scheduler: Any,
        block_size: int,
        sink_tokens: int,
        window_tokens: int,
        is_local: bool,
        full_decode_tokens: int,
        chooser: random.Random,
    ) -> None:
        self.pool = scheduler.kv_cache_manager.block_pool
        self.block_size = block_size
        self.keys_read = KeysRead(
            block_size, sink_tokens, window_tokens, is_local, full_decode_tokens
        )
        self.chooser = chooser
        self.rows: dict[str, _Row] = {}
        self._groups = len(scheduler.kv_cache_config.kv_cache_groups)
        self._names: dict[tuple[int, int], int] = {}
        self._slots: dict[tuple[int, int], tuple[int, int]] = {}

    def execute(self, output: Any) -> ModelRunnerOutput:
        """Run what the scheduler gave out."""
        self._forget_free_blocks()
        for name in output.finished_req_ids:
            self.rows.pop(name, None)
        starts = self._take_up(output)
        names = list(output.num_scheduled_tokens)
        prefixes = {
            name: self._write(self.rows[name], starts[name], output.num_scheduled_tokens[name])
            for name in names
        }
        sampled, decided = [], {}
        for name in names:
            row, end = self.rows[name], starts[name] + output.num_scheduled_tokens[name]
            for position in {starts[name], end - 1}:
                self._read(name, row, position, prefixes[name])
            if row.is_new:
                decided[name], row.is_new = row.routes, False
            sampled.append([])
            if end == len(row.tokens):
                sampled[-1].append(self.chooser.randrange(1000))
                row.tokens.append(sampled[-1][0])
        result = ModelRunnerOutput(names, {n: i for i, n in enumerate(names)}, sampled)
        result.flux_routes = decided
        return result

    def _take_up(self, output: Any) -> dict[str, int]:
        """Take up a step's requests. Returns: the first position of each."""
        starts = {}
        for new in output.scheduled_new_reqs:
            routes = self.chooser.choices([Route.SPARSE, Route.FULL], [6, 4], k=self._groups)
            row = _Row(list(new.prompt_token_ids), len(new.prompt_token_ids), routes)
            row.tables = [list(ids) for ids in new.block_ids]
            row.prefill_end = row.prompt_len
            self.rows[new.req_id] = row
            starts[new.req_id] = new.num_computed_tokens
        cached = output.scheduled_cached_reqs
        for index, name in enumerate(cached.req_ids):
            row, ids = self.rows[name], cached.new_block_ids[index]
            starts[name] = cached.num_computed_tokens[index]
            if name in cached.resumed_req_ids:
                del row.tokens[row.prompt_len + cached.num_output_tokens[index] :]
                row.prefill_end = max(row.prompt_len, len(row.tokens))
                row.tables = [list(table) for table in ids]
            elif ids is not None:
                for table, new_ids in zip(row.tables, ids, strict=True):
                    table.extend(new_ids)
        return starts

    def _forget_free_blocks(self) -> None:
        for block in self.pool.blocks:
            if block.ref_cnt == 0 and block.block_hash is None:
                for offset in range(self.block_size):
                    self._slots.pop((block.block_id, offset), None)

    def _write(self, row: _Row, start: int, length: int) -> list[int]:
        """Write a row's keys. Returns: the names of all its prefixes."""
        prefixes: list[int] = []
        for token in row.tokens[: start + length]:
            key = (prefixes[-1] if prefixes else -1, token)
            prefixes.append(self._names.setdefault(key, len(self._names)))
        for group, table in enumerate(row.tables):
            for position in range(start, start + length):
                block, offset = divmod(position, self.block_size)
                assert table[block], "a token's own slot lies in the null block"
                self._slots[table[block], offset] = (group, prefixes[position])
        return prefixes

    def _read(self, name: str, row: _Row, position: int, prefixes: list[int]) -> None:
        is_prefill = position < row.prefill_end
        for group, table in enumerate(row.tables):
            is_sparse = row.routes[group] == Route.SPARSE
            for key in self.keys_read.of(position, row.prompt_len, is_prefill, is_sparse):
                block, offset = divmod(key, self.block_size)
                found = self._slots.get((table[block], offset))
                assert found == (group, prefixes[key]), (
                    f"group {group}, query {position} of {name}: key {key} in block "
                    f"{table[block]} is {found}"
                )
