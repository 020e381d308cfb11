"""Pins the reference's pooled features and router network.

Oracles: the query vectors of a plain transformers model, and `nn.Sequential`.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from tests.helpers.models import (
    random_prompt,
    write_random_router,
    write_tiny_llama,
    write_tiny_qwen3,
)
from tests.helpers.reference import FULL, SPARSE, ReferenceModel, ReferenceRouter, SparsePattern

PATTERN = SparsePattern(sink_tokens=20, window_tokens=50, block_size=16)
MIXED = [SPARSE, FULL, FULL, SPARSE]


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Keep torch to one thread: products this small lose more to waiting than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    write = {"llama": write_tiny_llama, "qwen3": write_tiny_qwen3}[request.param]
    return write(tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def model(family: Path) -> ReferenceModel:
    return ReferenceModel(family)


@pytest.fixture(scope="module")
def router(tmp_path_factory: pytest.TempPathFactory) -> ReferenceRouter:
    path = write_random_router(
        tmp_path_factory.mktemp("router"), num_layers=4, head_dim=32, pool_tokens=40
    )
    return ReferenceRouter.load(path)


@pytest.mark.parametrize("length", [1, 30, 50, 51, 200])
def test_pools_pre_rope_queries_of_transformers(
    family: Path, model: ReferenceModel, router: ReferenceRouter, length: int
) -> None:
    """A prompt's ends at their own positions, each token attending to those before it."""
    prompt = random_prompt(length, seed=8)
    ends = ReferenceRouter(
        router.tensors,
        router.metadata | {"pools": '["tail:7", "head:5", "ends:10"]', "probe": "[20, 30]"},
    )
    positions = list(range(length))
    if length > 50:
        positions = positions[:20] + positions[-30:]
    plain = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(plain.model.layers):
        source = getattr(block.self_attn, "q_norm", block.self_attn.q_proj)

        def keep(_module: nn.Module, _inputs: tuple, out: torch.Tensor, layer: int = layer) -> None:
            seen[layer] = out.detach().reshape(len(positions), 8, 32).mean(dim=1)

        source.register_forward_hook(keep)
    # Positions with a gap look like packed sequences to transformers, unless a mask is given.
    mask = torch.ones(len(positions), len(positions), dtype=torch.bool).tril()[None, None]
    plain(
        torch.tensor([[prompt[p] for p in positions]]),
        position_ids=torch.tensor([positions]),
        attention_mask=mask,
    )
    pooled = ends.pooled(model, prompt)
    for layer in range(4):
        first, latest = seen[layer][:10], seen[layer][-10:]
        expected = [seen[layer][-7:], seen[layer][:5], torch.cat([first, latest])]
        for pool, tokens in zip(pooled[layer], expected, strict=True):
            torch.testing.assert_close(pool, tokens.mean(dim=0), atol=1e-4, rtol=0)


def test_context_layers_come_after_a_layers_own(model: ReferenceModel, router) -> None:
    metadata = router.metadata | {"pools": '["tail:7", "head:5"]', "context_layers": "[2, 0]"}
    seeing = ReferenceRouter(router.tensors, metadata)
    prompt = random_prompt(30, seed=9)
    pooled = seeing.pooled(model, prompt).flatten(1)
    features = seeing.features(model, prompt)
    for layer in range(4):
        expected = torch.cat([pooled[layer], pooled[2], pooled[0]])
        assert torch.equal(features[layer], expected)


def test_router_equals_a_sequential(router: ReferenceRouter) -> None:
    d = 32
    features = nn.Sequential(nn.Linear(d, 8 * d), nn.SiLU(), nn.Linear(8 * d, 2 * d))
    head = nn.Sequential(
        nn.Linear(2 * d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d), nn.SiLU(), nn.Linear(d, 2)
    )
    network = nn.ModuleDict({"features": features, "head": head})
    pooled = torch.randn(5, d, generator=torch.Generator().manual_seed(0))
    for layer in range(4):
        prefix = f"layers.{layer}."
        own = {n.removeprefix(prefix): t for n, t in router.tensors.items() if prefix in n}
        network.load_state_dict(own)
        with torch.no_grad():
            expected = head(features(pooled))
        torch.testing.assert_close(router.logits(layer, pooled), expected)


def test_threshold_and_given_routes(model: ReferenceModel, router: ReferenceRouter) -> None:
    run = partial(model.run, random_prompt(200, seed=11), pattern=PATTERN, router=router)
    assert run(threshold=0.0).routes == [FULL] * 4
    assert run(threshold=1.1).routes == [SPARSE] * 4
    given = run([140, 60], routes=MIXED, num_decode=2)
    assert all(step.routes == MIXED for step in given.steps)
    probabilities = router.p_full(model, given.prompt)
    logits = [router.logits(i, row) for i, row in enumerate(router.features(model, given.prompt))]
    for layer in range(4):
        expected = float(logits[layer].softmax(dim=-1)[FULL])
        assert float(probabilities[layer]) == pytest.approx(expected)
    assert torch.equal(given.p_full, probabilities)


def test_full_until_the_context_outgrows_sinks_and_window(model: ReferenceModel, router) -> None:
    """The file says 32 and 128."""
    request = model.run(
        random_prompt(157, seed=3), pattern=PATTERN, router=router, threshold=1.1, num_decode=6
    )
    assert [step.routes == [FULL] * 4 for step in request.steps] == [True] * 4 + [False] * 2
    long = model.run(
        random_prompt(161, seed=3), [9, 152], pattern=PATTERN, router=router, threshold=1.1
    )
    assert [step.routes for step in long.steps] == [[SPARSE] * 4] * 2
