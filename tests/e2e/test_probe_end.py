"""A probe ends at the last layer that a router reads: the same routes, less of the model run.

The router reads one layer in the middle and nothing else, as those that training fits to costs do.
Oracles: equality to the bit with the same probe where it runs the whole model; a router that reads
every layer besides, by weights that vanish in a sum of float32; tests/helpers/reference.py.
Pinned: the exception that ends the forward passes eager and compiled models, and the steps that
follow are as without it.
"""

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_vllm.routing.probe import ProbeMetadata
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.attended import attended
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_random_router
from tests.helpers.reference import ReferenceRouter, SparsePattern
from tests.helpers.replay import assert_routed

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
LENGTHS = (161, 200, 256, 333, 640, 1000)
READ, LAYERS, HEAD_DIM = 1, 4, 32
POOLS = ("tail:16", "length", "head:32")


def _write_router(folder: Path, model: Path, own_weight: float) -> Path:
    return write_random_router(
        folder,
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=model,
        pools=POOLS,
        context_layers=(READ,),
        own_weight=own_weight,
    )


@pytest.fixture(scope="module")
def router(tiny_model, tmp_path_factory) -> Path:
    return _write_router(tmp_path_factory.mktemp("router"), tiny_model, 0)


@pytest.fixture(scope="module", params=["eager", pytest.param("compiled", marks=pytest.mark.slow)])
def engine(request, tiny_model, router) -> Iterator[Engine]:
    is_eager = request.param == "eager"
    flux = {"router": str(router)}
    with Engine(tiny_model, flux, block_size=BLOCK_SIZE, enforce_eager=is_eager) as started:
        assert started.worker.model_runner.model.model.do_not_compile == is_eager
        yield started


def test_layers_that_run(engine: Engine) -> None:
    assert attended(engine, random_prompt(300, seed=1)) == list(range(READ))


def test_routes_are_those_of_a_whole_forward_to_the_bit(engine: Engine, monkeypatch) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    ended = [engine.probe(prompt)[1:] for prompt in prompts]
    for metadata in engine.runtime.probe._metadata.values():
        monkeypatch.setattr(metadata, "is_last", False)
    assert attended(engine, prompts[0]) == list(range(LAYERS))
    whole = [engine.probe(prompt)[1:] for prompt in prompts]
    for of_one, of_other in zip(ended, whole, strict=True):
        assert all(map(torch.equal, of_one, of_other))
    assert len({tuple(routes.tolist()) for _, routes in ended}) > 2


def test_only_what_is_read_is_kept(engine: Engine, router, reference) -> None:
    for length in (5, 256, 700):
        prompt = random_prompt(length, seed=length)
        expected = ReferenceRouter.load(router).pooled(reference, prompt)
        found = engine.probe(prompt)[0]
        torch.testing.assert_close(found[READ], expected[READ], rtol=0, atol=1e-4)
        unread = [layer for layer in range(LAYERS) if layer != READ]
        assert not engine.runtime.probe._mean_query[unread].any()


def test_answers_are_those_of_the_routes(engine: Engine, router, reference) -> None:
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    for length in LENGTHS[::2]:
        prompt = random_prompt(length, seed=length + 1)
        (answer,) = engine.generate([prompt], 8, prompt_logprobs=True)
        assert_routed(answer, reference, ReferenceRouter.load(router), pattern)


def test_a_step_after_a_probe_is_as_before(engine: Engine) -> None:
    """Of a prompt within sinks and window, so that it is not probed itself."""
    prompt = random_prompt(120, seed=2)
    before = engine.generate([prompt], 24, prompt_logprobs=True)
    assert before[0].routes is None
    for length in LENGTHS:
        engine.probe(random_prompt(length, seed=length))
        assert engine.generate([prompt], 24, prompt_logprobs=True) == before


def test_what_a_probe_computed_is_let_go(engine: Engine, monkeypatch) -> None:
    """At once, not when garbage is collected: the frames that it left held the model's tensors."""
    queries, keep = [], ProbeMetadata.keep

    def noted(self, query):
        queries.append(weakref.ref(query))
        keep(self, query)

    monkeypatch.setattr(ProbeMetadata, "keep", noted)
    gc.disable()
    try:
        engine.probe(random_prompt(300, seed=1))
        assert [query() for query in queries] == [None] * (READ + 1)
    finally:
        gc.enable()


def test_routes_are_those_of_a_router_that_reads_more(tiny_model, router, tmp_path) -> None:
    path = _write_router(tmp_path, tiny_model, 1e-30)
    own = len(POOLS) * HEAD_DIM
    one, every = load_file(router), load_file(path)
    for name, tensor in every.items():
        if name.endswith("features.0.weight"):
            assert tensor[:, :own].all()
            tensor[:, :own] = 0
        assert torch.equal(tensor, one[name])
    prompts, found = [random_prompt(length, seed=length) for length in LENGTHS], []
    # Of the last layer nothing is read but its queries.
    for each, last in ((router, READ), (path, LAYERS - 1)):
        with Engine(tiny_model, {"router": str(each)}, block_size=BLOCK_SIZE) as engine:
            assert attended(engine, prompts[0]) == list(range(last))
            found.append([engine.probe(prompt)[1:] for prompt in prompts])
    for (p_full, routes), (of_other, other_routes) in zip(*found, strict=True):
        # Of two engines, whose sums may round otherwise.
        torch.testing.assert_close(p_full, of_other, rtol=0, atol=1e-6)
        assert torch.equal(routes, other_routes)


def test_a_router_of_what_is_told_alone_runs_no_model(tiny_model, tmp_path, monkeypatch) -> None:
    path = write_random_router(
        tmp_path,
        num_layers=LAYERS,
        head_dim=HEAD_DIM,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=tiny_model,
        pools=("length", "overlap:70"),
    )
    router = ReferenceRouter.load(path)
    with Engine(tiny_model, {"router": str(path)}, block_size=BLOCK_SIZE) as engine:
        assert attended(engine, random_prompt(300, seed=1)) == []
        monkeypatch.setattr(engine.worker.model_runner, "get_model", None)
        seen = set()
        for length in LENGTHS:
            prompt = random_prompt(length, seed=length, vocab_size=60)
            p_full = engine.probe(prompt)[1]
            features = router.features(_NoModel(), prompt)
            logits = torch.stack([router.logits(i, row) for i, row in enumerate(features)])
            torch.testing.assert_close(p_full, logits.softmax(-1)[:, 1], rtol=0, atol=1e-5)
            seen.add(tuple(p_full.tolist()))
        assert len(seen) == len(LENGTHS)


class _NoModel:
    def probe(self, tokens, positions) -> torch.Tensor:
        return torch.zeros(LAYERS, len(positions), HEAD_DIM)
