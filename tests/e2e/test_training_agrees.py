"""The server under policy `router` decides as the `training` package says it will.

Quality is measured offline, on the routes that `training` computes; a server that pooled, cut or
attended otherwise would serve another router than the one measured. Both sides read the same files
in float32 and cut prompts at the same places. The server keeps sums of earlier chunks' queries in
bfloat16, so only a prompt's first chunk can agree as float32 does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import full_probability
from tests.helpers.models import random_prompt, write_random_router
from tests.helpers.tensor_parallel import RankedAnswer, RankedEngine
from training.config import SystemSettings
from training.data.batching import fixed_chunk_ends, group_by_length
from training.data.encoding import Encoded
from training.distributed import start_world
from training.evaluation.scoring import Condition, Scorer
from training.model_loading import load_routed
from training.policies import ThresholdPolicy

pytestmark = pytest.mark.vllm

SINK_TOKENS, WINDOW_TOKENS, POOL_TOKENS = 32, 64, 48
THRESHOLD = 0.5
CHUNK = 309  # ends within a block of 32 and a granule of 16
# In one chunk: around a granule and sink + window, and (309) with queries that triangle hides keys
# from. In two to five: last chunks of one token, shorter than what is pooled, and whole.
LENGTHS = [15, 17, 47, 95, 97, 160, 255, 309, 310, 330, 370, 618, 640, 1000, 1300]
FIT_LENGTHS = [40, 90, 160, 250, 330, 450, 70, 130, 210, 290]
ANSWER = random_prompt(4, seed=4)
TOKENS_AT_ONCE = 4096  # several prompts a micro-batch, of different lengths and chunks
NEAR_THRESHOLD = 1e-3
FIRST_CHUNK_TOLERANCE, LATER_TOLERANCE = 1e-4, 2e-3


@dataclass(frozen=True)
class Side:
    """What the offline side is told; the server's own unless a test tells it otherwise."""

    model: Path
    router: Path
    pattern: str
    pool_prefix: bool
    pool_tokens: int = POOL_TOKENS
    window_tokens: int = WINDOW_TOKENS
    chunk: int = CHUNK


@dataclass(frozen=True)
class Decisions:
    """Of one prompt of C chunks; both [C, layers]."""

    routes: np.ndarray
    """1 for FULL."""
    p_full: np.ndarray


class _Recorder(ThresholdPolicy):
    """Keeps what it decides: routes and P(FULL) [B, C], layer by layer of each micro-batch."""

    def __init__(self, router: LayerRouter) -> None:
        super().__init__(router, THRESHOLD)
        self.calls: list[tuple[torch.Tensor, torch.Tensor]] = []

    def decide(self, layer: int, features: torch.Tensor) -> torch.Tensor:
        routes = super().decide(layer, features)
        p_full = full_probability(self.router(layer, features.flatten(0, 1)))
        self.calls.append((routes, p_full.view(routes.shape)))
        return routes


def _served(side: Side) -> list[RankedAnswer]:
    """Ask an engine one prompt after another, so that its chunks end where CHUNK says."""
    flux = {"router": str(side.router), "sparse_pattern": side.pattern, "threshold": THRESHOLD}
    with RankedEngine(
        side.model, flux, 1, block_size=32, max_num_batched_tokens=CHUNK, max_num_seqs=1
    ) as engine:
        return [engine.generate([random_prompt(n, seed=n)], 1)[0] for n in LENGTHS]


def _offline(side: Side) -> list[Decisions]:
    """Score the prompts as `python -m training eval` does."""
    router, info = read_router(side.router)
    world = start_world("cpu")
    sizes = info.sink_tokens, side.window_tokens
    routed = load_routed(str(side.model), *sizes, SystemSettings(dtype="float32"), world)
    pattern = make_pattern(side.pattern, *sizes)
    scorer = Scorer(
        routed, pattern, side.pool_tokens, TOKENS_AT_ONCE, world, pool_prefix=side.pool_prefix
    )
    prompts = []
    for length in LENGTHS:
        ids = np.array(random_prompt(length, seed=length) + ANSWER, dtype=np.int32)
        prompts.append(Encoded("needle", ids, prompt_len=length, shared_len=0, prefix_len=0))
    recorder = _Recorder(router)
    scores = scorer.score(prompts, recorder, Condition(chunk_tokens=side.chunk))
    found: dict[int, Decisions] = {}
    calls = iter(recorder.calls)
    for rows in group_by_length([len(prompt) for prompt in prompts], TOKENS_AT_ONCE):
        layers = [next(calls) for _ in range(routed.num_layers)]
        routes, p_full = (torch.stack(part, dim=-1).numpy() for part in zip(*layers, strict=True))
        for at, row in enumerate(rows):
            chunks = len(fixed_chunk_ends(LENGTHS[row], side.chunk))
            found[row] = Decisions(routes[at, :chunks], p_full[at, :chunks])
            # What a report counts is what the prompt's last chunk chose.
            assert (scores.sparse[row] == 1 - found[row].routes[-1]).all()
    assert next(calls, None) is None
    return [found[row] for row in range(len(LENGTHS))]


def _assert_agree(answers: Sequence[RankedAnswer], offline: Sequence[Decisions]) -> None:
    """Check every decision until one near the threshold parts the two sides' contexts."""
    compared, total, taken = 0, 0, set()
    for answer, decisions in zip(answers, offline, strict=True):
        ends = [start + length for start, length, phase in answer.steps if phase == "prefill"]
        assert ends == fixed_chunk_ends(len(answer.prompt), CHUNK)
        assert len(ends) == len(decisions.p_full), "expected as many chunks on both sides"
        served = [np.array(part) for part in zip(*answer.decisions, strict=True)]
        total += decisions.p_full.size
        for chunk, layer in np.ndindex(*decisions.p_full.shape):
            p_full, route = decisions.p_full[chunk, layer], decisions.routes[chunk, layer]
            found_route, found = (part[chunk, layer] for part in served)
            place = f"prompt of {len(answer.prompt)}, chunk {chunk}, layer {layer}: "
            place += f"P(FULL) {p_full:.6f} offline, {found:.6f} served"
            tolerance = LATER_TOLERANCE if chunk else FIRST_CHUNK_TOLERANCE
            assert abs(found - p_full) <= tolerance, place
            if abs(p_full - THRESHOLD) > NEAR_THRESHOLD:
                assert found_route == route, place
                compared += 1
                taken.add(int(route))
            elif found_route != route:
                break
    assert compared >= 0.9 * total, f"only {compared} of {total} decisions are comparable"
    assert taken == {0, 1}, "expected FULL and SPARSE among the routes"


@pytest.fixture(scope="module")
def sides(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[bool, str], tuple[Side, list[RankedAnswer]]]:
    """Give what both sides read, and the server's answers; each engine runs once."""

    @cache
    def router(pool_prefix: bool) -> Path:
        return write_random_router(
            tmp_path_factory.mktemp("router"),
            num_layers=4,
            head_dim=32,
            pool_tokens=POOL_TOKENS,
            pool_prefix=pool_prefix,
            sink_tokens=SINK_TOKENS,
            window_tokens=WINDOW_TOKENS,
            model_folder=tiny_model,
            prompts=[random_prompt(length, seed=1_000 + length) for length in FIT_LENGTHS],
        )

    @cache
    def give(pool_prefix: bool, pattern: str) -> tuple[Side, list[RankedAnswer]]:
        side = Side(tiny_model, router(pool_prefix), pattern, pool_prefix)
        return side, _served(side)

    return give


@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
@pytest.mark.parametrize("pool_prefix", [True, False], ids=["both-ends", "latest"])
def test_decisions_agree(sides, pool_prefix, pattern):
    side, answers = sides(pool_prefix, pattern)
    _assert_agree(answers, _offline(side))


@pytest.mark.parametrize(
    "change",
    [
        {"pool_tokens": POOL_TOKENS + 1},
        {"pool_prefix": False},
        {"window_tokens": WINDOW_TOKENS - 1},
        {"pattern": "triangle"},
        {"chunk": CHUNK - 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_difference_is_noticed(sides, change):
    """Each fails as soon as one side is told otherwise, be it by one token."""
    side, answers = sides(True, "streaming")
    with pytest.raises(AssertionError, match=r"P\(FULL\)|as many chunks"):
        _assert_agree(answers, _offline(replace(side, **change)))
