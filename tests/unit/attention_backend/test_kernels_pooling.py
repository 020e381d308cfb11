"""Query sums and pooling on the GPU against `flux_vllm.router` and the naive oracle.

A story of several engine steps is played on both: chunked prompts, a prefix shared within a step,
generated text, blocks that change hands. Sums are bfloat16, so they are compared within its last
bit; tokens of the step itself count exactly.
"""

from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from flux_vllm.attention_backend import naive
from flux_vllm.attention_backend.kernels.pooling import pool_rows, pooling_workspace
from flux_vllm.attention_backend.kernels.prompt_rows import (
    COLUMNS,
    PromptRowBuffers,
    pack_prompt_rows,
    update_counts,
)
from flux_vllm.attention_backend.kernels.query_sums import InverseRotary, update_sums
from flux_vllm.attention_backend.kernels.router_mlp import (
    RouteTables,
    RowSwitch,
    decide_layers,
    decide_routes,
    router_weights,
    router_workspace,
)
from flux_vllm.attention_backend.kernels.trigonometry import cos_sin
from flux_vllm.router.features import PromptSpan
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.state import QuerySums
from tests.unit.attention_backend.test_kernels_cases import DEVICES

POOL = 20
"""Not a multiple of 16: edges round."""
ENDS = pytest.mark.parametrize("pool_prefix", [True, False], ids=["both-ends", "latest-alone"])


@dataclass
class Request:
    """A request of the story: its blocks, and its queries before RoPE once they are known."""

    prompt_len: int
    blocks: list[int]
    computed: int = 0
    mean_query: list[torch.Tensor] = field(default_factory=list)
    has_sum: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Model:
    heads: int = 3
    head_dim: int = 64
    rotary_dim: int = 64
    interleaved: bool = False
    attention_scaling: float = 1.0
    block_size: int = 32
    by_table: bool = False

    @property
    def inv_freq(self) -> torch.Tensor:
        pairs = self.rotary_dim // 2
        return 10_000.0 ** (-torch.arange(pairs, dtype=torch.float32) / pairs)

    def inverse(self, device: str) -> InverseRotary:
        if not self.by_table:
            return InverseRotary(
                self.rotary_dim,
                self.interleaved,
                inv_freq=self.inv_freq.to(device),
                attention_scaling=self.attention_scaling,
            )
        angle = torch.arange(400.0)[:, None] * self.inv_freq
        cos, sin = (f(angle) / self.attention_scaling for f in (torch.cos, torch.sin))
        return InverseRotary(
            self.rotary_dim, self.interleaved, cos=cos.to(device), sin=sin.to(device)
        )


MODELS = [
    Model(),
    Model(interleaved=True, heads=9, block_size=16),
    Model(head_dim=96, rotary_dim=32, heads=1),
    Model(head_dim=128, rotary_dim=128, heads=10, attention_scaling=1.3, block_size=128),
    Model(head_dim=80, rotary_dim=80, interleaved=True, by_table=True, attention_scaling=0.7),
]


class Story:
    """Plays steps on the kernels, on `QuerySums`, and keeps what the oracle needs."""

    def __init__(self, model: Model, device: str, pool_prefix: bool) -> None:
        self.model, self.device, self.pool_prefix = model, device, pool_prefix
        self.generator = torch.Generator().manual_seed(0)
        args = (2, 40, model.block_size, model.head_dim)
        self.expected = QuerySums(*args, torch.device("cpu"))
        actual = QuerySums(*args, torch.device("cpu"))
        self.sums = actual.sums[1].to(device).fill_(float("nan"))
        self.counts = actual.counts.to(device)
        self.workspace = pooling_workspace(
            8, POOL, pool_prefix, model.head_dim, torch.device(device)
        )
        for buffer in self.workspace:
            buffer.fill_(float("nan"))
        self.pooled_step = PromptRowBuffers(
            torch.zeros(8, COLUMNS, dtype=torch.int32, device=device),
            torch.full((8,), 99, dtype=torch.int32, device=device),
        )

    def step(self, requests: list[Request], scheduled: list[int], routed: list[bool]) -> None:
        model = self.model
        spans, slot_mapping, mean_query, query = [], [], [], []
        width = 12
        table = torch.randint(40, (len(requests), width), generator=self.generator).int()
        for row, (request, tokens) in enumerate(zip(requests, scheduled, strict=True)):
            spans.append(PromptSpan(request.computed, tokens, request.prompt_len))
            table[row, : len(request.blocks)] = torch.tensor(request.blocks)
            position = torch.arange(request.computed, request.computed + tokens)
            block = table[row, position // model.block_size].long()
            slot_mapping.append(block * model.block_size + position % model.block_size)
            # An offset, so that a sum that lost or gained a token shows.
            raw = 1 + torch.randn(tokens, model.heads, model.head_dim, generator=self.generator)
            rotated = naive.rotate(
                raw, position, model.inv_freq, model.interleaved, model.attention_scaling
            )
            query.append(rotated)
            exact = naive.unrotate(
                rotated, position, model.inv_freq, model.interleaved, model.attention_scaling
            ).mean(dim=1)
            prompt = max(0, spans[-1].known_end - request.computed)
            mean_query.append(exact[:prompt])
            request.mean_query += list(exact)
            request.has_sum += [True] * prompt + [False] * (tokens - prompt)
        slots = np.arange(len(requests))[::-1].copy()
        # Padding after the batch, as in a piecewise graph: slot -1, queries never read.
        all_slots = torch.cat([*slot_mapping, torch.full((5,), -1)])
        poison = torch.full((5, model.heads, model.head_dim), float("nan"))
        all_queries = torch.cat([*query, poison])
        step = self.expected.begin_step(
            spans, np.array(routed), slots, all_slots, table, POOL, self.pool_prefix
        )
        expected = self.expected.update_and_pool(1, step, torch.cat(mean_query))
        pooled = self.play(spans, np.array(routed), slots, all_slots, table, all_queries)
        self.compare(requests, spans, routed, expected, pooled)
        for request, tokens in zip(requests, scheduled, strict=True):
            request.computed += tokens

    def play(self, spans, routed, slots, slot_mapping, table, query) -> torch.Tensor:
        device, model = self.device, self.model
        packed = pack_prompt_rows(spans, routed, slots)
        rows = len(packed.rows)
        self.pooled_step.rows[:rows] = torch.from_numpy(packed.rows).to(device)
        slot_mapping, table = slot_mapping.to(device), table.to(device)
        tokens = sum(span.scheduled for span in spans)
        update_counts(self.counts, slot_mapping, tokens, packed, self.pooled_step)
        pooled = torch.full((8, model.head_dim), float("nan"), device=device)
        update_sums(
            query[None].to(device),
            self.sums[None],
            slot_mapping,
            self.pooled_step,
            self.workspace,
            model.inverse(device),
            packed,
            pool_tokens=POOL,
        )
        pool_rows(
            self.sums[None],
            self.counts,
            table,
            self.pooled_step,
            self.workspace,
            pooled,
            rows,
            block_size=model.block_size,
            pool_tokens=POOL,
        )
        order = packed.rows[:, 4].astype(bool)
        assert pooled[:rows][torch.from_numpy(~order)].isnan().all()
        return pooled[:rows][torch.from_numpy(order)].cpu()

    def compare(self, requests, spans, routed, expected, pooled) -> None:
        counts = self.counts.cpu()
        assert torch.equal(counts, self.expected.counts)
        held = counts > 0
        # A sum is rounded to bfloat16 twice at most (once a chunk), and the interpreter truncates
        # where a GPU rounds: two last bits. One token more or less would be 2**-4.
        torch.testing.assert_close(
            self.sums.cpu()[held], self.expected.sums[1][held], rtol=2**-6, atol=1e-2
        )
        torch.testing.assert_close(pooled, expected, rtol=2**-6, atol=2e-3)
        chosen = [index for index, chosen in enumerate(routed) if chosen]
        for index, vector in zip(chosen, pooled, strict=True):
            request, span = requests[index], spans[index]
            known = torch.stack(request.mean_query[: span.known_end])
            exact = naive.pool(
                known,
                torch.tensor(request.has_sum[: span.known_end]),
                span.computed,
                POOL,
                pool_prefix=self.pool_prefix,
            )
            torch.testing.assert_close(vector, exact, rtol=2**-6, atol=4e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", MODELS, ids=str)
@ENDS
def test_update_then_pool_over_several_steps(device: str, model: Model, pool_prefix: bool) -> None:
    story = Story(model, device, pool_prefix)
    size = model.block_size

    def blocks(first: int, tokens: int) -> list[int]:
        return list(range(first, first - (-tokens // size)))

    short = Request(1, blocks(1, 60))
    chunked = Request(115, blocks(5, 125))
    # Both have their first chunk now; one ends within a granule.
    story.step([short, chunked], [1, 37], [True, True])
    # Generated text follows the one-token prompt; the other goes on from the middle of a granule.
    story.step([chunked, short], [53, 30], [True, False])
    # Ends its prompt, and a request joins that shares its first block in the same step.
    shared = Request(2 * size + 3, [chunked.blocks[0], *blocks(15, 2 * size + 10)], computed=size)
    shared.mean_query = [*chunked.mean_query[:size]]
    shared.has_sum = [True] * min(size, 90) + [False] * (size - 90)
    if size <= 90:
        story.step([shared, short, chunked], [size + 1, 1, 25], [True, False, True])
        story.step([shared, chunked], [2, 1], [True, False])
    else:
        story.step([short, chunked], [1, 25], [False, True])
        story.step([chunked], [1], [False])
    # Everything changes hands; the new prompt's sums must not see the old ones.
    for request in (short, chunked):
        request.blocks = []
    fresh = Request(50, list(range(30, 0, -1))[: -(-50 // size)])
    story.step([fresh], [16], [True])
    story.step([fresh], [17], [True])
    story.step([fresh], [17], [True])


@pytest.mark.parametrize("device", DEVICES)
@ENDS
def test_update_then_pool_of_a_prefix_computed_in_the_same_step(
    device: str, pool_prefix: bool
) -> None:
    """The row that reads the shared block comes first; its sums are another row's of this step."""
    story = Story(Model(), device, pool_prefix)
    first = Request(70, [3, 4, 5])
    second = Request(45, [3, 6], computed=32)
    # What the first row's queries will be: the story draws the table, then rows in turn.
    state = story.generator.get_state()
    torch.randint(40, (2, 12), generator=story.generator)
    torch.randn(13, 3, 64, generator=story.generator)
    first_queries = 1 + torch.randn(70, 3, 64, generator=story.generator)
    story.generator.set_state(state)
    second.mean_query = list(first_queries.mean(dim=1)[:32])
    second.has_sum = [True] * 32
    story.step([second, first], [13, 70], [True, True])


@triton.jit
def _cos_sin_kernel(angle, cos, sin, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    c, s = cos_sin(tl.load(angle + i))
    tl.store(cos + i, c)
    tl.store(sin + i, s)


@pytest.mark.parametrize("device", DEVICES)
def test_cos_sin_of_large_angles(device: str) -> None:
    # The interpreter has no fused multiply-add: large angles lose bits there.
    largest, bound = (1e6, 3e-7) if device == "cuda" else (100.0, 1e-5)
    angle = torch.cat([torch.linspace(0, largest, 4000), torch.linspace(0, 7, 96)])
    cos, sin = torch.empty(2, 4096, device=device)
    _cos_sin_kernel[(1,)](angle.to(device), cos, sin, BLOCK=4096)
    for actual, expected in ((cos, angle.double().cos()), (sin, angle.double().sin())):
        assert (actual.cpu().double() - expected).abs().max() < bound


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("model", [MODELS[0], MODELS[4]], ids=str)
@ENDS
def test_layers_at_once_from_mean_queries_equal_layers_in_turn(
    device: str, model: Model, pool_prefix: bool
) -> None:
    """Averaging over heads before the rotation is undone changes the last bits, no more."""
    torch.manual_seed(0)
    layers, heads, head_dim, cuda = 3, 5, model.head_dim, torch.device(device)
    spans = [PromptSpan(0, 23, 40), PromptSpan(8, 1, 9), PromptSpan(16, 30, 46)]
    packed = pack_prompt_rows(spans, np.array([True, False, True]), np.array([2, 0, 1]))
    rows = len(packed.rows)
    table = torch.tensor([[1, 2, 0], [3, 0, 0], [4, 5, 6]], dtype=torch.int32, device=device)
    positions = [torch.arange(span.computed, span.computed + span.scheduled) for span in spans]
    mapping = torch.cat(
        [table[row].cpu().long()[p // 16] * 16 + p % 16 for row, p in enumerate(positions)]
    ).to(device)
    # An offset, so that a mean that lost or gained a head shows.
    query = 1 + torch.randn(layers, len(mapping), heads, head_dim, device=device)
    step = PromptRowBuffers(
        torch.from_numpy(packed.rows).to(device),
        torch.zeros(rows, dtype=torch.int32, device=device),
    )
    counts = torch.zeros(7, dtype=torch.uint8, device=device)
    update_counts(counts, mapping, len(mapping), packed, step)
    sums = torch.zeros(2, layers, 7, head_dim, dtype=torch.bfloat16, device=device)
    pooled = torch.full((2, layers * rows, head_dim), float("nan"), device=device)
    rotary, router = model.inverse(device), LayerRouter(layers, head_dim)
    weights, hidden = router_weights(router, cuda), router_workspace(layers * rows, head_dim, cuda)
    results = []
    for at_once in (False, True):
        tables = RouteTables(
            torch.full((4, layers), -1, dtype=torch.int8, device=device),
            torch.full((4, layers), float("nan"), device=device),
        )
        entries = layers * rows if at_once else rows
        space = pooling_workspace(entries, POOL, pool_prefix, head_dim, cuda)
        for buffer in space:
            buffer.fill_(float("nan"))
        lens = torch.tensor([[23, 10, 46], [23, 24, 54]], dtype=torch.int32, device=device)
        switch = RowSwitch(lens[0], torch.nn.functional.pad(lens[1], (1, 0)), *lens.clone(), 30)
        for part in [slice(0, 3)] if at_once else [slice(n, n + 1) for n in range(layers)]:
            some = query[part].mean(dim=2, keepdim=True) if at_once else query[part]
            update_sums(some, sums[int(at_once), part], mapping, step, space, rotary, packed,
                        pool_tokens=POOL)  # fmt: skip
            out = pooled[int(at_once), part.start * rows :]
            pool_rows(sums[int(at_once), part], counts, table, step, space, out, rows,
                      block_size=16, pool_tokens=POOL)  # fmt: skip
            if at_once:
                columns = torch.arange(layers, dtype=torch.int32, device=device)
                decide_layers(out, step.rows, rows, weights, columns, 0.5, tables, hidden)
            else:
                decide_routes(out, step.rows, rows, weights, part.start, part.start, 0.5, tables,
                              switch, hidden)  # fmt: skip
        results.append(tables)
    routed = [0, 2, 3, 5, 6, 8]
    torch.testing.assert_close(pooled[0][routed], pooled[1][routed], rtol=2**-7, atol=2e-3)
    torch.testing.assert_close(sums[0], sums[1], rtol=2**-7, atol=1e-2)
    in_turn, at_once = results
    assert torch.equal(in_turn.routes, at_once.routes)
    assert (in_turn.routes[1:3] >= 0).all()
    assert (in_turn.routes[[0, 3]] == -1).all()
    torch.testing.assert_close(
        in_turn.full_probability[1:3], at_once.full_probability[1:3], rtol=1e-3, atol=1e-3
    )
