"""Pins the reference's pooled features and router network.

Oracles: the pooling of DESIGN.md section 3 as a loop over tokens, the query vectors of a plain
transformers model, and `nn.Sequential`.
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
from tests.helpers.reference_router import pooled_positions

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


def _pooled_by_definition(
    features: torch.Tensor,
    start: int,
    end: int,
    prompt_len: int,
    pool: int,
    has_sum: list[bool],
    pool_prefix: bool = True,
) -> torch.Tensor:
    """Pool features [end, H] by asking of every token how often it counts."""
    known = min(end, prompt_len)
    total, count = torch.zeros(features.shape[1], dtype=torch.float64), 0
    ends = [(0, min(pool, known))] * pool_prefix + [(max(0, known - pool), known)]
    for low, high in ends:
        stored = {p // 16 for p in range(low, high) if p < start}
        for p in range(end):
            exact = p >= start and low <= p < high
            if exact or (p < start and p // 16 in stored and has_sum[p]):
                total, count = total + features[p].double(), count + 1
    return (total / count).float()


@pytest.mark.parametrize("prefix", [True, False], ids=["both-ends", "latest-alone"])
@pytest.mark.parametrize("pool", [1, 16, 20, 40, 100])
@pytest.mark.parametrize(
    ("start", "end", "prompt_len"),
    [
        (0, 1, 1),
        (0, 17, 17),
        (0, 50, 300),
        (50, 100, 100),
        (64, 80, 80),
        (97, 194, 300),
        (48, 49, 49),
        (160, 230, 220),
        (300, 301, 301),
    ],
)
def test_pooled_positions_equal_the_written_definition(
    start: int, end: int, prompt_len: int, pool: int, prefix: bool
) -> None:
    generator = torch.Generator().manual_seed(start + end)
    features = torch.randn(end, 8, generator=generator)
    generated = [20 <= p < 45 or 100 <= p < 130 for p in range(end)]
    for has_sum in ([True] * end, [not g for g in generated]):
        positions = pooled_positions(start, end, prompt_len, pool, torch.tensor(has_sum), prefix)
        expected = _pooled_by_definition(features, start, end, prompt_len, pool, has_sum, prefix)
        torch.testing.assert_close(features[positions].mean(dim=0), expected)


def test_request_pools_pre_rope_queries_of_transformers(
    family: Path, model: ReferenceModel, router: ReferenceRouter
) -> None:
    prompt = random_prompt(64, seed=8)
    plain = AutoModelForCausalLM.from_pretrained(family, dtype=torch.float32)
    seen: dict[int, torch.Tensor] = {}
    for layer, block in enumerate(plain.model.layers):
        source = getattr(block.self_attn, "q_norm", block.self_attn.q_proj)

        def keep(_module: nn.Module, _inputs: tuple, out: torch.Tensor, layer: int = layer) -> None:
            seen[layer] = out.detach().reshape(64, 8, 32).mean(dim=1)

        source.register_forward_hook(keep)
    plain(torch.tensor([prompt]))
    # A window over the whole prompt makes both routes the same, so that no route changes a feature.
    wide = SparsePattern(0, 100, 16)
    for chunks in ([64], [21, 43]):
        record = model.run(prompt, chunks, pattern=wide, router=router).steps[-1]
        for layer in range(4):
            # 40 tokens at each end; an earlier chunk's reach to position 32 from 24, and past 21.
            ends = torch.cat([seen[layer][:40], seen[layer][24:]])
            torch.testing.assert_close(record.pooled[layer], ends.mean(dim=0), atol=1e-4, rtol=0)
            p_full = router.p_full(layer, record.pooled[layer])
            assert float(record.p_full[layer]) == pytest.approx(p_full)
            assert record.routes[layer] == (FULL if p_full >= 0.5 else SPARSE)


def test_pooling_keeps_whole_granules_of_earlier_steps(
    model: ReferenceModel, router: ReferenceRouter
) -> None:
    first = model.run(random_prompt(70, seed=9), pattern=PATTERN, router=router, num_decode=40)
    prompt = first.tokens + random_prompt(30, seed=10)
    chunks = [40, 4]
    second = model.run(
        prompt, chunks, pattern=PATTERN, router=router, history=first.history.first(96)
    )
    has_sum = second.history.has_sum.tolist()
    assert has_sum == [True] * 70 + [False] * 26 + [True] * 44
    for record in second.steps:
        end = record.start + record.length
        for layer in range(4):
            features = second.history.features[layer][:end]
            expected = _pooled_by_definition(features, record.start, end, 140, 40, has_sum)
            torch.testing.assert_close(record.pooled[layer], expected)


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
        p_full = float(expected[0].softmax(dim=-1)[1])
        assert router.p_full(layer, pooled[0]) == pytest.approx(p_full, rel=1e-4)


def test_threshold_and_given_routes(model: ReferenceModel, router: ReferenceRouter) -> None:
    run = partial(model.run, random_prompt(90, seed=11), pattern=PATTERN, router=router)
    assert run(threshold=0.0).routes == [FULL] * 4
    assert run(threshold=1.1).routes == [SPARSE] * 4
    given = run([40, 50], routes=MIXED, num_decode=2)
    assert all(step.routes == MIXED for step in given.steps)
    assert given.steps[0].p_full is not None
    assert given.steps[1].p_full is given.p_full
