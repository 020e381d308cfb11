"""The routers' memory: routes by request slot, and query sums by KV block under awkward schedules.

Oracle: `paged_server`, which keeps every token's feature by KV slot and pools positions one by one
as DESIGN.md, section 3, says. The side tables start as NaN. Pinned: a row may read a block that a
later row of the same step writes; a reused block forgets its former owner; generated tokens add
to no sum; table tails and padding are never read.
"""

import numpy as np
import pytest
import torch

from flux_vllm.router.features import PromptSpan
from flux_vllm.router.route import Route
from flux_vllm.router.state import QuerySums, RouteTable
from tests.unit.router.paged_server import STALE, PagedServer, Step, run

CPU = torch.device("cpu")


def check(server: PagedServer, sums: QuerySums, step: Step | None) -> Step:
    assert step is not None
    found = run(sums, step, server.pool_tokens, server.pool_prefix)
    torch.testing.assert_close(found, step.expected, rtol=1e-5, atol=1e-5)
    assert not sums.sums[:, : server.block_size // 16].any(), "the null block was written"
    assert not sums.counts[: server.block_size // 16].any()
    return step


def tokens(count: int, first: int = 0) -> list[int]:
    return list(range(first, first + count))


class TestRandomSchedules:
    @pytest.mark.parametrize("block_size", [16, 32, 128], ids=lambda b: f"B{b}")
    @pytest.mark.parametrize("pool", [16, 24, 100], ids=lambda p: f"pool{p}")
    @pytest.mark.parametrize(
        ("seed", "pool_prefix"),
        [(0, True), (1, True), (2, False)],
        ids=["both-ends-0", "both-ends-1", "latest-alone"],
    )
    def test_pooled_by_definition(
        self, block_size: int, pool: int, seed: int, pool_prefix: bool
    ) -> None:
        """Chunks, prefix hits, generation, second turns, aborts, preemption, reused blocks."""
        server = PagedServer(
            seed, block_size, pool, num_blocks=6 + 1500 // block_size, pool_prefix=pool_prefix
        )
        draw, sums = server.random, server.new_sums()
        texts = [tokens(draw.randint(1, 300), 1000 * i) for i in range(3)]
        pooled = 0
        for _ in range(150):
            if len(server.requests) < 4 and draw.random() < 0.7:
                text = draw.choice(texts)
                prompt = text[: draw.randint(1, len(text))] + [draw.randrange(10**6)] * draw.choice(
                    [0, 0, 1, 15, 40]
                )
                server.admit(prompt, draw.choice([1, 3, 20]))
            elif server.requests and draw.random() < 0.1:
                server.preempt(draw.choice(server.requests))
            elif server.requests and draw.random() < 0.1:
                request = draw.choice(server.requests)
                texts[draw.randrange(3)] = list(request.tokens)  # its second turn comes later
                server.end(request)
            step = server.step(chunk=draw.choice([1, 7, 16, 33, 64, 200]), unrouted_share=0.2)
            if step is not None:
                pooled += int(check(server, sums, step).routed.sum())
        assert pooled > 50, "the schedule pooled too little to mean anything"
        assert server.reused_blocks > 5
        assert server.preemptions > 2

    def test_the_schedules_share_blocks_within_a_step(self) -> None:
        """What the random schedules are meant to contain is there."""
        server = PagedServer(3, 16, 16, num_blocks=40)
        sums = server.new_sums()
        text = tokens(64)
        for extra in (1000, 2000, 3000):
            server.admit([*text, extra], 1)
        check(server, sums, server.step(chunk=64))
        assert server.shared_in_step > 0


class TestQuerySums:
    @pytest.mark.parametrize("order", [[0, 1], [1, 0]], ids=["writer-first", "reader-first"])
    def test_reader_of_a_block_written_in_the_same_step(self, order: list[int]) -> None:
        """The second request begins at token 32, on blocks whose tokens the first computes now."""
        sums = QuerySums(1, 8, 16, 2, CPU)
        sums.sums[:, 1:] = float("nan")
        writer, reader = PromptSpan(0, 40, 40), PromptSpan(32, 5, 37)
        queries = [torch.randint(-8, 9, (40, 2)).float(), torch.randint(-8, 9, (5, 2)).float()]
        tables = [[3, 1, 5], [3, 1, 7]]
        slots = [
            torch.cat([torch.arange(48, 64), torch.arange(16, 32), torch.arange(80, 88)]),
            torch.arange(112, 117),
        ]
        plan = sums.begin_step(
            [(writer, reader)[i] for i in order],
            np.array([True, True]),
            np.array([4, 9])[order],
            torch.cat([slots[i] for i in order]),
            torch.tensor([tables[i] for i in order], dtype=torch.int32),
            pool_tokens=64,
        )
        query = torch.cat([queries[i] for i in order])
        pooled = sums.update_and_pool(0, plan, query[plan.tokens])
        expected = [queries[0].mean(0), torch.cat([queries[0][:32], queries[1]]).mean(0)]
        torch.testing.assert_close(pooled, torch.stack([expected[i] for i in order]))
        assert plan.routed_slots.tolist() == [[4, 9][i] for i in order]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
    @pytest.mark.parametrize("bad", [0, 1])
    def test_a_broken_row_stays_alone(self, bad: int, value: float) -> None:
        """NaN in one request's queries, now or in earlier chunks, reaches no other request."""
        sums = QuerySums(1, 8, 16, 2, CPU)
        features = torch.randint(-8, 9, (2, 40, 2)).float()
        features[bad] = value
        tables = torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32)
        for start, stop in ((0, 23), (23, 40)):  # the second chunk begins within a granule
            positions = torch.arange(start, stop)
            slots = tables[:, positions // 16] * 16 + positions % 16
            plan = sums.begin_step(
                [PromptSpan(start, stop - start, 40)] * 2,
                np.array([True, True]),
                np.array([0, 1]),
                slots.flatten().long(),
                tables,
                pool_tokens=32,
            )
            pooled = sums.update_and_pool(0, plan, features[:, start:stop].flatten(0, 1))
            assert not pooled[bad].isfinite().any()
        # The edge at position 8 lies in a granule of an earlier chunk: it rounds outward to 0.
        good = features[1 - bad]
        expected = torch.cat([good[:32], good]).mean(dim=0)
        torch.testing.assert_close(pooled[1 - bad], expected)

    def test_reused_block_forgets_its_owner(self) -> None:
        """A second request's short prompt in a block that was full before: 5 tokens, not 16."""
        sums = QuerySums(1, 3, 16, 1, CPU)
        for span, value in ((PromptSpan(0, 16, 16), 8.0), (PromptSpan(0, 5, 5), 1.0)):
            plan = sums.begin_step(
                [span],
                np.array([True]),
                np.array([0]),
                torch.arange(16, 16 + span.scheduled),
                torch.tensor([[1, STALE]], dtype=torch.int32),
                pool_tokens=16,
            )
            query = torch.full((span.scheduled, 1), value)
            assert sums.update_and_pool(0, plan, query).item() == value
        assert sums.counts.tolist() == [0, 5, 0]
        assert sums.sums[0, 1].item() == 5.0

    def test_generated_tokens_reset_and_add_nothing(self) -> None:
        """A decode token at a granule's first slot clears what another request left there."""
        sums = QuerySums(1, 3, 16, 1, CPU)
        sums.sums[0, 1:], sums.counts[1:] = 7.0, 16
        for position in range(16, 19):
            plan = sums.begin_step(
                [PromptSpan(position, 1, 16)],
                np.array([False]),
                np.array([0]),
                torch.tensor([16 + position]),
                torch.tensor([[1, 2]], dtype=torch.int32),
                pool_tokens=16,
            )
            assert len(plan.tokens) == len(plan.written) == len(plan.routed_slots) == 0
            assert sums.update_and_pool(0, plan, torch.empty(0, 1)).shape == (0, 1)
        assert sums.counts.tolist() == [0, 16, 0]
        assert sums.sums[0, :, 0].tolist() == [0.0, 7.0, 0.0]

    def test_reset_layers_forgets_in_every_layer(self) -> None:
        """A decode step that begins a granule, in one call for all layers."""
        sums = QuerySums(3, 4, 32, 8, CPU)
        sums.sums.fill_(7)
        spans = [PromptSpan(computed=48, scheduled=1, prompt_len=40)]
        table = torch.tensor([[2, 3]], dtype=torch.int32)
        step = sums.begin_step(
            spans, np.array([False]), np.array([0]), torch.tensor([3 * 32 + 16]), table, 16
        )
        sums.reset_layers(step)
        written = 3 * 2 + 1
        assert (sums.sums[:, written] == 0).all()
        kept = [granule for granule in range(8) if granule != written]
        assert (sums.sums[:, kept] == 7).all()

    def test_recomputed_outputs_add_nothing(self) -> None:
        """A resumed request's chunk runs past its prompt: only the prompt's 20 tokens count."""
        sums = QuerySums(1, 4, 16, 1, CPU)
        plan = sums.begin_step(
            [PromptSpan(0, 40, 20)],
            np.array([False]),
            np.array([0]),
            torch.arange(16, 56),
            torch.tensor([[1, 2, 3]], dtype=torch.int32),
            pool_tokens=16,
        )
        assert plan.tokens.tolist() == list(range(20))
        sums.update_and_pool(0, plan, torch.ones(20, 1))
        assert sums.counts.tolist() == [0, 16, 4, 0]
        assert sums.sums[0, :, 0].tolist() == [0.0, 16.0, 4.0, 0.0]

    def test_rows_without_tokens_and_padding(self) -> None:
        """Rows of no tokens and slots of -1 behind the batch read and write nothing."""
        sums = QuerySums(1, 3, 16, 1, CPU)
        before = sums.sums.clone()
        plan = sums.begin_step(
            [PromptSpan(0, 0, 0), PromptSpan(0, 3, 3), PromptSpan(0, 0, 0)],
            np.array([False, True, False]),
            np.array([0, 1, 2]),
            torch.tensor([32, 33, 34, -1, -1, -1]),
            torch.tensor([[STALE], [2], [STALE]], dtype=torch.int32),
            pool_tokens=16,
        )
        pooled = sums.update_and_pool(0, plan, torch.tensor([[1.0], [2.0], [6.0]]))
        assert pooled.tolist() == [[3.0]]
        assert torch.equal(sums.sums[:, :2], before[:, :2])
        assert sums.counts.tolist() == [0, 0, 3]

    def test_layers_do_not_mix(self) -> None:
        sums = QuerySums(3, 2, 16, 1, CPU)
        plan = sums.begin_step(
            [PromptSpan(0, 4, 4)],
            np.array([True]),
            np.array([0]),
            torch.arange(16, 20),
            torch.tensor([[1]], dtype=torch.int32),
            pool_tokens=16,
        )
        for layer in (2, 0, 1):
            query = torch.full((4, 1), float(layer))
            assert sums.update_and_pool(layer, plan, query).item() == layer
        assert sums.sums[:, 1, 0].tolist() == [0.0, 4.0, 8.0]

    def test_one_token_chunks_equal_one_chunk(self) -> None:
        """A prompt fed token by token is pooled as at once, but for the granules' outward edges."""
        features = torch.randint(-8, 9, (50, 2)).float()
        pooled = []
        for chunk in (1, 50):
            sums = QuerySums(1, 4, 32, 2, CPU)
            for start in range(0, 50, chunk):
                plan = sums.begin_step(
                    [PromptSpan(start, chunk, 50)],
                    np.array([True]),
                    np.array([0]),
                    torch.arange(32 + start, 32 + start + chunk),
                    torch.tensor([[1, 2]], dtype=torch.int32),
                    pool_tokens=100,  # all of the prompt, so that no edge is rounded
                )
                last = sums.update_and_pool(0, plan, features[start : start + chunk])
            pooled.append(last)
        torch.testing.assert_close(pooled[0], pooled[1])

    def test_size(self) -> None:
        sums = QuerySums(5, 7, 128, 64, CPU)
        assert sums.sums.shape == (5, 56, 64)
        assert sums.sums.dtype == torch.bfloat16
        assert sums.counts.shape == (56,)
        assert sums.counts.dtype == torch.uint8


class TestRouteTable:
    def test_slots_are_kept(self) -> None:
        table = RouteTable(2, 4, CPU)
        first = table.acquire(["a", "b"])
        assert len(set(first.tolist())) == 2
        assert first.dtype == np.int64
        again = table.acquire(["c", "b", "a"])  # rows come in another order each step
        assert again[[2, 1]].tolist() == first.tolist()
        assert table.slot("c") == again[0]
        assert table.slot("d") is None
        assert len(table) == 3

    def test_new_requests_are_undecided(self) -> None:
        table = RouteTable(3, 2, CPU)
        (slot,) = table.acquire(["a"])
        assert table.routes[slot].tolist() == [Route.UNDECIDED] * 3
        assert table.full_probability[slot].isnan().all()
        assert table.settled_prompt_len[slot] == 0

    def test_reuse_starts_undecided(self) -> None:
        table = RouteTable(2, 1, CPU)
        (slot,) = table.acquire(["a"])
        table.routes[slot] = torch.tensor([0, 1], dtype=torch.int8)
        table.full_probability[slot] = 0.3
        table.settled_prompt_len[slot] = 17
        table.release(["a"])
        assert len(table) == 0
        assert table.acquire(["b"]).tolist() == [slot]
        assert table.routes[slot].tolist() == [Route.UNDECIDED] * 2
        assert table.full_probability[slot].isnan().all()
        assert table.settled_prompt_len[slot] == 0

    def test_used_slots_wait_until_none_is_free(self) -> None:
        """Then all are cleaned together, and the table need not grow."""
        table = RouteTable(2, 4, CPU)
        used = table.acquire(["a", "b"])
        table.routes[used] = int(Route.SPARSE)
        table.release(["a", "b"])
        assert not set(used) & set(table.acquire(["c", "d"]))
        assert set(table.acquire(["e", "f"])) == set(used)
        assert (table.routes == Route.UNDECIDED).all()
        assert len(table.routes) == 4

    @pytest.mark.parametrize("names", ["b", "ca", "cba"])
    def test_of_slots(self, names: str) -> None:
        table = RouteTable(2, 3, CPU)
        slots = table.acquire("abc")
        table.routes[slots] = torch.tensor([[0, 1], [1, 0], [1, 1]], dtype=torch.int8)
        table.full_probability[slots] = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
        routes, probability = table.of_slots(table.acquire(names))
        expected = {"a": [0, 1], "b": [1, 0], "c": [1, 1]}
        assert routes.tolist() == [expected[name] for name in names]
        first = {"a": 0.1, "b": 0.3, "c": 0.5}
        assert probability[:, 0].tolist() == pytest.approx([first[name] for name in names])

    def test_fixed_routes_are_there_from_the_start(self) -> None:
        table = RouteTable(2, 1, CPU)
        table.acquire(["a"])
        table.fix([int(Route.SPARSE), int(Route.FULL)])
        slots = table.acquire(["a", "b", "c"])
        table.release(["b"])
        assert table.routes[slots].tolist() == [[Route.SPARSE, Route.FULL]] * 3
        assert table.routes[table.acquire(["d"])].tolist() == [[Route.SPARSE, Route.FULL]]

    def test_known_requests_keep_their_routes(self) -> None:
        table = RouteTable(2, 3, CPU)
        (slot,) = table.acquire(["a"])
        table.routes[slot] = torch.tensor([0, 1], dtype=torch.int8)
        table.settled_prompt_len[slot] = 17
        slots = table.acquire(["b", "a", "c"])
        assert slots[1] == slot
        assert table.routes[slot].tolist() == [0, 1]
        assert table.settled_prompt_len[slot] == 17

    @pytest.mark.parametrize("capacity", [1, 2, 5], ids=lambda c: f"S{c}")
    def test_growth_keeps_what_is_there(self, capacity: int) -> None:
        table = RouteTable(1, capacity, CPU)
        slots = {}
        for index in range(40):
            name = f"r{index}"
            (slot,) = table.acquire([name])
            assert table.routes[slot].tolist() == [Route.UNDECIDED]
            slots[name] = int(slot)
            table.routes[slot] = index % 2
            table.full_probability[slot] = index / 40
            table.settled_prompt_len[slot] = index + 1
        assert len(set(slots.values())) == 40
        for index, (name, slot) in enumerate(slots.items()):
            assert table.slot(name) == slot
            assert table.routes[slot].tolist() == [index % 2]
            assert table.full_probability[slot].item() == pytest.approx(index / 40)
            assert table.settled_prompt_len[slot] == index + 1
        assert len(table.routes) == len(table.full_probability) == len(table.settled_prompt_len)

    def test_growth_within_one_step(self) -> None:
        table = RouteTable(2, 1, CPU)
        slots = table.acquire([f"r{i}" for i in range(7)])
        assert sorted(slots.tolist()) == sorted(set(slots.tolist()))
        assert (table.routes[torch.from_numpy(slots)] == Route.UNDECIDED).all()

    def test_slots_are_not_used_up(self) -> None:
        table = RouteTable(2, 4, CPU)
        for index in range(1000):
            table.acquire([f"{index}-{row}" for row in range(4)])
            table.release([f"{index}-{row}" for row in (2, 0, 3, 1)])
        assert len(table) == 0
        assert len(table.settled_prompt_len) == 4

    def test_release_of_unknown_requests(self) -> None:
        table = RouteTable(2, 2, CPU)
        table.acquire(["a"])
        table.release(["never seen", "a", "a"])
        assert len(table) == 0
        assert len(set(table.acquire(["b", "c"]).tolist())) == 2
