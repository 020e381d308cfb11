"""The router's networks and decisions on the GPU, against `LayerRouter` and `choose_route`."""

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.kernels.prompt_rows import pack_prompt_rows
from flux_vllm.attention_backend.kernels.router_mlp import (
    RouterWeights,
    RouteTables,
    RowSwitch,
    decide_routes,
    router_weights,
    router_workspace,
)
from flux_vllm.router.features import PromptSpan
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route, choose_route, full_probability
from tests.unit.attention_backend.test_kernels_cases import DEVICES


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("head_dim", [64, 96])
def test_decide_routes_matches_the_layer_router(device: str, head_dim: int) -> None:
    torch.manual_seed(0)
    layers, layer, column = 3, 2, 4
    router = LayerRouter(layers, head_dim)
    pooled = torch.randn(5, head_dim)
    expected = full_probability(router(layer, pooled)).detach()
    threshold = expected.sort().values[1:3].mean().item()
    spans = [PromptSpan(10 * i, 7 + i, 100) for i in range(6)]
    spans[3] = PromptSpan(100, 1, 100)  # decodes: no prompt row
    routed = np.array([True, True, False, False, True, True])
    packed = pack_prompt_rows(spans, routed, np.array([5, 4, 3, 2, 1, 0]))
    tables = RouteTables(
        torch.full((6, 6), -1, dtype=torch.int8, device=device),
        torch.full((6, 6), float("nan"), device=device),
    )
    lens = torch.tensor([0] + [span.scheduled for span in spans])
    seq_lens = torch.tensor([span.computed + span.scheduled for span in spans])
    switch = RowSwitch(
        seq_lens.int().to(device),
        lens.cumsum(0).int().to(device),
        torch.full((6,), -7, dtype=torch.int32, device=device),
        torch.full((6,), -7, dtype=torch.int32, device=device),
        25,
    )
    weights = router_weights(router, torch.device(device))
    assert isinstance(weights, RouterWeights)
    packed_rows = torch.from_numpy(packed.rows).to(device)
    space = router_workspace(5, head_dim, torch.device(device))
    # The last of a row's programs decides: once more and again would show a race.
    for _ in range(1 if device == "cpu" else 200):
        tables.routes.fill_(-1)
        decide_routes(
            pooled.to(device),
            packed_rows,
            len(packed.rows),
            weights,
            layer,
            column,
            threshold,
            tables,
            switch,
            space,
        )
        assert torch.equal(packed_rows.cpu(), torch.from_numpy(packed.rows))
        assert (tables.routes[[5, 4, 1, 0], column] >= 0).all()
    wanted = {0: 0, 1: 1, 4: 3, 5: 4}  # batch row to prompt row
    chosen = choose_route(expected, threshold)
    assert {Route.FULL, Route.SPARSE} == {Route(int(chosen[row])) for row in wanted.values()}
    for batch_row, row in wanted.items():
        slot = 5 - batch_row
        probability = tables.full_probability[slot, column].cpu()
        torch.testing.assert_close(probability, expected[row], rtol=1e-5, atol=1e-6)
        assert tables.routes[slot, column] == chosen[row]
        apart = chosen[row] == Route.SPARSE and int(seq_lens[batch_row]) > 25
        tokens = spans[batch_row].scheduled
        assert switch.full_seqused_q[batch_row] == (0 if apart else tokens)
        assert switch.sparse_seqused_q[batch_row] == (tokens if apart else 0)
    untouched = [3, 2]
    assert (tables.routes[untouched] == -1).all()
    assert (tables.routes[:, :column] == -1).all()
    assert (switch.full_seqused_q[[2, 3]] == -7).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bias", [(0.0, "nan"), ("inf", 0.0), (0.0, "inf"), ("-inf", "inf")])
def test_decide_routes_makes_logits_that_are_not_finite_full(device: str, bias: tuple) -> None:
    router = LayerRouter(1, 64).requires_grad_(False)
    router.linear("head.4")[1][0] = torch.tensor([float(value) for value in bias])
    pooled = torch.randn(1, 64)
    assert full_probability(router(0, pooled)).isnan().all()
    packed = pack_prompt_rows([PromptSpan(0, 9, 9)], np.array([True]), np.array([0]))
    tables = RouteTables(
        torch.full((1, 1), -1, dtype=torch.int8, device=device),
        torch.zeros((1, 1), device=device),
    )
    switch = RowSwitch(
        *(torch.tensor(values, dtype=torch.int32, device=device) for values in ([9], [0, 9])),
        *(torch.full((1,), -7, dtype=torch.int32, device=device) for _ in range(2)),
        4,
    )
    decide_routes(
        pooled.to(device), torch.from_numpy(packed.rows).to(device), 1,
        router_weights(router, torch.device(device)), 0, 0, 0.5, tables, switch,
        router_workspace(1, 64, torch.device(device)),
    )  # fmt: skip
    assert tables.full_probability.isnan().all()
    assert tables.routes.item() == Route.FULL
    assert (switch.full_seqused_q.item(), switch.sparse_seqused_q.item()) == (9, 0)
