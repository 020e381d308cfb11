"""Layers routed at once after a step, against layers that route one by one.

Both `GroupPooling`s see the same steps and the same queries. Oracle: the one whose layers route
themselves, which `test_kernels_pooling.py` holds to the float32 reference; the other may differ by
the order in which heads are added up, and sums of it by a last bit of bfloat16. Steps run in
inference mode and end outside of it, as vLLM's do.
"""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend import naive
from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.features import GRANULE_TOKENS
from flux_vllm.router.model import LayerRouter
from flux_vllm.runtime import FluxRuntime
from tests.unit.attention_backend.test_kernels_cases import DEVICES

pytestmark = [pytest.mark.vllm, pytest.mark.parametrize("device", DEVICES)]

LAYERS, HEADS, HEAD_DIM, BLOCK_SIZE, BLOCKS = 3, 2, 64, 32, 12
ENDS = pytest.mark.parametrize("pool_prefix", [True, False], ids=["both-ends", "latest-alone"])
INFO = RouterInfo(
    base_model="",
    num_layers=LAYERS,
    head_dim=HEAD_DIM,
    pool_tokens=20,
    sink_tokens=30,
    window_tokens=40,
)


def _rotary(base: float, device: torch.device) -> SimpleNamespace:
    pairs = HEAD_DIM // 2
    frequencies = base ** (-torch.arange(pairs, dtype=torch.float32, device=device) / pairs)
    return SimpleNamespace(
        rotary_dim=HEAD_DIM, interleaved=False, attention_scaling=1.0, inv_freq=frequencies
    )


class _Worker:
    """A runtime and its pooling over poisoned side tables."""

    def __init__(
        self, router: LayerRouter, info: RouterInfo, max_tokens: int, device: torch.device
    ) -> None:
        from flux_vllm.attention_backend.cuda.routing import GroupPooling

        self.runtime = FluxRuntime(
            FluxConfig(policy="router"),
            router,
            info,
            LAYERS,
            tuple(range(LAYERS)),
            1,  # the table grows
            device,
            lambda pooled: pooled,
        )
        rotaries = [_rotary(1e4, device), _rotary(5e5, device)]
        bindings = [LayerBinding(self.runtime, n, rotaries[n == 2]) for n in range(LAYERS)]
        with torch.inference_mode():
            self.pooling = GroupPooling(
                bindings,
                torch.empty(BLOCKS, 1, device=device),
                BLOCK_SIZE,
                3 * LAYERS,
                max_tokens,
            )
            buffers = (self.pooling._sums, self.pooling._pooled, self.pooling._mean_query)
            for buffer in (*buffers, *self.pooling._workspace, self.pooling._router_workspace):
                buffer.fill_(float("nan"))

    def step(self, context: Batch, metadata: SimpleNamespace, query: torch.Tensor) -> bool:
        """Run a step. Returns: whether its layers were routed at once."""
        views = ViewBuffers(len(context), 1, [*range(LAYERS)], 16, 0, 1, 0, query.device)
        with torch.inference_mode():
            self.runtime.begin_step(context)
            step = self.pooling.begin_step(self.runtime.current, metadata)
            for index in range(LAYERS if step is not None else 0):
                self.pooling.route(index, query[index], metadata, views, step)
        at_once = step is not None and step.mean_query is not None
        assert len(self.runtime._deferred) == at_once
        assert step is None or step.in_turn == (not at_once or context.is_warmup)
        self.runtime.end_step()
        assert not self.runtime._deferred
        return at_once


class _Pair:
    """The worker under test, and the one whose layers route one by one."""

    def __init__(self, device: str, pool_prefix: bool = True) -> None:
        torch.manual_seed(0)
        self.device = torch.device(device)
        router = LayerRouter(LAYERS, HEAD_DIM).requires_grad_(False).to(device)
        info = dataclasses.replace(INFO, pool_prefix=pool_prefix)
        self.at_once, self.in_turn = (_Worker(router, info, n, self.device) for n in (1000, 0))
        self.computed: dict[str, int] = {}

    def step(
        self,
        *rows: tuple[str, int, int, list[int]],
        at_once: bool = True,
        null: str = "",
        padding: int = 0,
        is_warmup: bool = False,
    ) -> torch.Tensor:
        """Run (request, tokens, prompt tokens, blocks) rows on both.

        Args:
            rows: a request's context goes on from its last step.
            at_once: what the worker under test should do.
            null: a request whose slots are -1.
            padding: tokens past the batch, with slots -1 and queries NaN.
            is_warmup: whether the requests are vLLM's own.

        Returns: [L, tokens, N, H] the queries of all layers.
        """
        names = tuple(row[0] for row in rows)
        scheduled, prompts = (np.array([row[i] for row in rows]) for i in (1, 2))
        computed = np.array([self.computed.get(name, 0) for name in names])
        table = torch.full((len(rows), 4), BLOCKS + 5, dtype=torch.int32)  # stale tails
        slots = []
        for index, (name, tokens, _, blocks) in enumerate(rows):
            table[index, : len(blocks)] = torch.tensor(blocks)
            position = torch.arange(computed[index], computed[index] + tokens)
            found = table[index, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE
            slots.append(torch.full_like(found, -1) if name == null else found)
            self.computed[name] = int(computed[index]) + tokens
        slots.append(torch.full((padding,), -1))
        total = int(scheduled.sum())
        query = 1 + torch.randn(LAYERS, total + padding, HEADS, HEAD_DIM).bfloat16()
        query[:, total:] = float("nan")
        metadata = SimpleNamespace(
            num_actual_tokens=total + padding,
            slot_mapping=torch.cat(slots).to(self.device),
            block_table=table.to(self.device),
            seq_lens=torch.from_numpy(computed + scheduled).int().to(self.device),
            query_start_loc=torch.tensor([0, *scheduled.cumsum()]).int().to(self.device),
        )
        query = query.to(self.device)
        is_prefill = computed < prompts
        context = Batch(names, prompts, computed, scheduled, is_prefill, is_warmup)
        assert self.at_once.step(context, metadata, query) == at_once
        assert not self.in_turn.step(context, metadata, query)
        self.compare(names)
        return query

    def compare(self, names: tuple[str, ...]) -> None:
        found, expected = self.at_once.pooling, self.in_turn.pooling
        assert torch.equal(found._counts, expected._counts)
        held = expected._counts > 0
        # Two last bits: a sum is rounded once a chunk, and the interpreter truncates.
        torch.testing.assert_close(
            found._sums[:, held], expected._sums[:, held], rtol=2**-6, atol=1e-2
        )
        tables = self.at_once.runtime.table, self.in_turn.runtime.table
        slots = [[table.slot(name) for name in names] for table in tables]
        assert slots[0] == slots[1]
        probability = [table.full_probability[slots[0]] for table in tables]
        torch.testing.assert_close(*probability, rtol=1e-3, atol=1e-3, equal_nan=True)
        clear = (probability[1] - 0.5).abs() > 2e-3  # a tie may fall either way
        assert clear.any()
        assert torch.equal(*(table.routes[slots[0]][clear] for table in tables))

    def count_of(self, block: int) -> list[int]:
        granules = BLOCK_SIZE // GRANULE_TOKENS
        return self.at_once.pooling._counts[block * granules : (block + 1) * granules].tolist()


@ENDS
def test_chunks_generated_text_and_blocks_that_change_hands(device: str, pool_prefix: bool) -> None:
    pair = _Pair(device, pool_prefix)
    pair.step(("a", 21, 65, [3, 4, 5]), ("b", 30, 30, [6, 7]))
    pair.step(("b", 1, 30, [6, 7]), ("a", 30, 65, [3, 4, 5]), padding=3)  # from inside a granule
    # Decode writes a granule's first slot: nothing of it counts.
    pair.step(("b", 2, 30, [6, 7]), at_once=False)
    assert pair.count_of(7) == [0, 0]
    pair.step(("a", 14, 65, [3, 4, 5]), ("b", 15, 30, [6, 7]))
    assert pair.count_of(5) == [1, 0]
    for worker in (pair.at_once, pair.in_turn):
        worker.runtime.finish(["a"])
    pair.step(("c", 40, 40, [5, 3]))
    assert pair.count_of(5) + pair.count_of(3) == [16, 16, 8, 16]


@ENDS
def test_rows_that_share_a_block_computed_in_the_same_step(device: str, pool_prefix: bool) -> None:
    pair = _Pair(device, pool_prefix)
    pair.computed["hit"] = BLOCK_SIZE
    pair.step(("hit", 9, 41, [2, 8]), ("first", 33, 33, [2, 9]))
    # And one whose prefix was computed before, with the same length as a request in decode.
    pair.computed["later"] = BLOCK_SIZE
    pair.step(("first", 1, 33, [2, 9]), ("later", 3, 35, [2, 10]))


def test_recomputed_generation_after_a_preemption(device: str) -> None:
    """The rows' generated tokens are prefill, and no part of the prompt."""
    pair = _Pair(device)
    pair.step(("a", 50, 20, [1, 2]))
    assert pair.count_of(1) + pair.count_of(2) == [16, 4, 0, 0]
    pair.computed["a"] = 0
    pair.step(("a", 55, 20, [7, 8]), ("new", 2, 2, [1]))
    assert pair.count_of(7) + pair.count_of(8) == [16, 4, 0, 0]
    assert pair.count_of(1) == [2, 4]


def test_each_layer_undoes_its_own_rotation(device: str) -> None:
    pair = _Pair(device)
    query = pair.step(("a", 16, 16, [1])).float().cpu()
    for layer, base in enumerate((1e4, 1e4, 5e5)):
        frequencies = _rotary(base, torch.device("cpu")).inv_freq
        before = naive.unrotate(query[layer], torch.arange(16), frequencies, False, 1.0)
        expected = before.mean(dim=1).sum(dim=0)
        for worker in (pair.at_once, pair.in_turn):
            found = worker.pooling._sums[layer, BLOCK_SIZE // GRANULE_TOKENS].cpu().float()
            torch.testing.assert_close(found, expected, rtol=2**-7, atol=1e-2)


def test_rows_without_slots_write_nothing(device: str) -> None:
    pair = _Pair(device)
    pair.step(("none", 20, 20, [0]), ("a", 17, 17, [1]), null="none")
    assert pair.at_once.pooling._sums[:, :2].isnan().all()  # as it was poisoned
    assert pair.count_of(0) == [0, 0]
    assert pair.count_of(1) == [16, 1]


def test_long_or_many_rows_route_layer_by_layer(device: str) -> None:
    pair = _Pair(device)
    pair.step(("long", 71, 90, [1, 2, 3]), at_once=False)  # past sinks and window
    pair.step(("a", 40, 40, [4, 5]), ("b", 31, 31, [6]), at_once=False)  # more than are kept
    four = [(name, 3, 3, [block]) for name, block in zip("wxyz", range(7, 11), strict=True)]
    pair.step(*four, at_once=False)  # more rows than the workspace holds for all layers
    pair.step(*[(name, 3, 3, [block]) for name, block in zip("stu", (7, 8, 9), strict=True)])


def test_abandoned_step_leaves_nothing_to_do(device: str) -> None:
    pair = _Pair(device)
    runtime = pair.at_once.runtime
    runtime.defer(lambda: pytest.fail("abandoned work was done"))
    runtime.abandon_step()
    runtime.do_deferred()


@ENDS
def test_fixed_nbytes_holds_what_is_allocated(device: str, pool_prefix: bool) -> None:
    pooling = _Pair(device, pool_prefix).at_once.pooling
    held = [
        *pooling._step, *pooling._workspace, pooling._pooled, pooling._router_workspace,
        pooling._mean_query, *pooling._weights.hidden, *pooling._weights.joint,
        *pooling._weights.head_2, *pooling._weights.head_4,
    ]  # fmt: skip
    nbytes = sum(tensor.numel() * tensor.element_size() for tensor in held)
    assert pooling._workspace.parts.shape[1] == (2 if pool_prefix else 1)
    assert pooling._mean_query.shape == (LAYERS, 70, HEAD_DIM)
    stated = pooling.fixed_nbytes(pooling._runtime, 3 * LAYERS, 1000)
    assert 0.6 * stated < nbytes <= stated


def test_warmup_compiles_both_ways(device: str) -> None:
    pair = _Pair(device)
    pair.step(("warm", 20, 20, [1]), is_warmup=True)
    pair.step(("a", 21, 21, [1]))  # what the warm-up left is no part of it
    assert pair.count_of(1) == [16, 5]
