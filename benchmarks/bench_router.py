"""Time pooling and routing at the Llama-3.1-8B shape, on one GPU: what a prefill step adds.

    python -m benchmarks.bench_router --out FILE.json

`bench_attention.py` says how times are taken.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

from benchmarks.bench_attention import (
    BLOCK_SIZE,
    DTYPE,
    HEAD_DIM,
    HEADS,
    POOL,
    SINK,
    WINDOW,
    record,
    write_rows,
)
from flux_vllm.attention_backend.kernels import query_sums
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
from flux_vllm.router.features import PromptSpan
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import choose_route, full_probability

LAYERS = 32


class Step:
    """A prefill step of equal prompts in one chunk, and the routers of all layers."""

    def __init__(self, rows: int, tokens: int, router: LayerRouter) -> None:
        cuda = torch.device("cuda")
        blocks = tokens // BLOCK_SIZE
        packed = pack_prompt_rows(
            [PromptSpan(0, tokens, tokens)] * rows, np.ones(rows, bool), np.arange(rows)
        )
        self.router, self.rows, self.packed = router, rows, packed
        self.table = (1 + torch.arange(rows * blocks)).view(rows, blocks).int().cuda()
        slots = self.table[:, :, None] * BLOCK_SIZE + torch.arange(BLOCK_SIZE).cuda()
        self.mapping = slots.flatten().long()
        self.step = PromptRowBuffers(
            torch.from_numpy(packed.rows).reshape(-1, COLUMNS).cuda(),
            torch.zeros(rows, dtype=torch.int32, device=cuda),
        )
        granules = rows * blocks + 1
        self.sums = torch.zeros(LAYERS, granules, HEAD_DIM, dtype=DTYPE, device=cuda)
        self.counts = torch.zeros(granules, dtype=torch.uint8, device=cuda)
        # More queries than the L2 cache holds, so that each call reads memory.
        sets = 4 if rows * tokens >= 2048 else 32
        self.queries = [
            torch.randn(rows * tokens, HEADS, HEAD_DIM, device=cuda).to(DTYPE) for _ in range(sets)
        ]
        self.means = torch.zeros(LAYERS, rows * tokens, HEAD_DIM, device=cuda)
        frequencies = 5e5 ** (-torch.arange(HEAD_DIM // 2, device=cuda) / (HEAD_DIM // 2))
        self.rotary = InverseRotary(HEAD_DIM, False, inv_freq=frequencies)
        self.space = pooling_workspace(LAYERS * rows, POOL, True, HEAD_DIM, cuda)
        self.hidden = router_workspace(LAYERS * rows, HEAD_DIM, cuda)
        self.pooled = torch.zeros(LAYERS * rows, HEAD_DIM, device=cuda)
        self.weights = router_weights(router, cuda)
        self.columns = torch.arange(LAYERS, dtype=torch.int32, device=cuda)
        self.tables = RouteTables(
            torch.zeros(64, LAYERS, dtype=torch.int8, device=cuda),
            torch.zeros(64, LAYERS, device=cuda),
        )
        lens = torch.full((rows,), tokens, dtype=torch.int32, device=cuda)
        starts = (torch.arange(rows + 1) * tokens).int().cuda()
        switches = torch.zeros(2, rows, dtype=torch.int32, device=cuda)
        self.switch = RowSwitch(lens, starts, *switches, SINK + WINDOW)
        self.slots = torch.arange(rows, device=cuda)
        self.sizes = {"block_size": BLOCK_SIZE, "pool_tokens": POOL}

    def count(self, _: int) -> None:
        update_counts(self.counts, self.mapping, len(self.mapping), self.packed, self.step)

    def update(self, layer: int) -> None:
        update_sums(
            self.queries[layer % len(self.queries)][None], self.sums[layer : layer + 1],
            self.mapping, self.step, self.space, self.rotary, self.packed, pool_tokens=POOL,
        )  # fmt: skip

    def pool(self, sums: torch.Tensor) -> None:
        pool_rows(
            sums, self.counts, self.table, self.step, self.space, self.pooled, self.rows,
            **self.sizes,
        )  # fmt: skip

    def update_and_pool(self, layer: int) -> None:
        self.update(layer)
        self.pool(self.sums[layer : layer + 1])

    def decide(self, layer: int) -> None:
        decide_routes(
            self.pooled, self.step.rows, self.rows, self.weights, layer, layer, 0.5, self.tables,
            self.switch, self.hidden,
        )  # fmt: skip

    @torch.no_grad()
    def decide_by_torch(self, layer: int) -> None:
        probability = full_probability(self.router(layer, self.pooled[: self.rows]))
        self.tables.full_probability[self.slots, layer] = probability
        self.tables.routes[self.slots, layer] = choose_route(probability, 0.5)

    def in_turn(self, layer: int) -> None:
        self.update_and_pool(layer)
        self.decide(layer)

    def keep_mean(self, layer: int) -> None:
        query = self.queries[layer % len(self.queries)]
        torch.mean(query, dim=1, dtype=torch.float32, out=self.means[layer])

    def at_once(self, layer: int) -> None:
        self.keep_mean(layer)
        if layer == LAYERS - 1:
            self.end(0)

    def end(self, _: int) -> None:
        update_sums(
            self.means[:, :, None], self.sums, self.mapping, self.step, self.space, self.rotary,
            self.packed, pool_tokens=POOL,
        )  # fmt: skip
        self.pool(self.sums)
        decide_layers(
            self.pooled, self.step.rows, self.rows, self.weights, self.columns, 0.5, self.tables,
            self.hidden,
        )  # fmt: skip


def main() -> None:
    """Time every part for a few batches."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    router = LayerRouter(LAYERS, HEAD_DIM).cuda()
    try:
        for rows, tokens in ((1, 512), (1, 2048), (1, 8192), (16, 512)):
            step, case = Step(rows, tokens, router), f"{rows}x{tokens}"
            record("update_counts, a step", case, step.count, 8)
            record("update_sums, a layer", case, step.update, LAYERS)
            for pairs in (16, 32):
                query_sums._PAIRS_AT_ONCE, default = pairs, query_sums._PAIRS_AT_ONCE
                record(f"update_sums, {pairs} pairs at once", case, step.update, LAYERS)
                query_sums._PAIRS_AT_ONCE = default
            record("update_and_pool, a layer", case, step.update_and_pool, LAYERS)
            record("decide_routes, a layer", case, step.decide, LAYERS)
            record("router by torch, a layer", case, step.decide_by_torch, LAYERS)
            record("pool and route, each layer", case, step.in_turn, LAYERS)
            record("pool and route, layers at once", case, step.at_once, LAYERS)
            record("mean over heads, a layer", case, step.keep_mean, LAYERS)
            record("all layers' sums, pools and routes", case, step.end, 4)
    finally:
        write_rows(args.out)


if __name__ == "__main__":
    main()
