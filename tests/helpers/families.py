"""Tiny models of families whose layers are not all alike, served and held to their references.

Oracles: stock vLLM, bit by bit, where every layer is as the model has it;
tests/helpers/whole_reference.py, transformers' own code of each family in float32 (the text model's
alone, where that is part of one that takes images), for fixed routes and for a router's, in one
chunk, in chunks and on a prefix-cache hit. `/metrics` names the layers that have routes.

vLLM's CPU kernels of gated delta nets know bfloat16 alone: there, at most twice the r.m.s. error
that stock vLLM makes against the same reference, whose weights are the same.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from prometheus_client import generate_latest
from transformers import LlamaConfig, PreTrainedConfig

from flux_vllm.router.place import beside_weights
from tests.helpers.engine import Answer, Engine
from tests.helpers.metrics import parse
from tests.helpers.models import (
    give_images,
    random_prompt,
    round_to_bfloat16,
    write_random_router,
    write_tiny_model,
)
from tests.helpers.quantized import quantize
from tests.helpers.reference import FULL, SPARSE, ReferenceRouter, SparsePattern
from tests.helpers.replay import P_FULL_MARGIN, check_routes
from tests.helpers.training_side import check_training_decides_alike, check_training_runs
from tests.helpers.watched_probes import around_probes, cache_memory
from tests.helpers.whole_reference import WholeModel

SINK_TOKENS, WINDOW_TOKENS = 32, 128
LENGTHS = (100, 161, 333, 500)
OUTPUT = 8
LONG_OUTPUT = 48
CHUNK = 97
_AT_ONCE = 4
"""Requests of a step."""
TOLERANCE = 0.02
STATIC = {
    "policy": "static",
    "sparse_layers": [],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}
_names = itertools.count()


@dataclass(frozen=True)
class Family:
    """A tiny model of four layers."""

    config_class: type[PreTrainedConfig]
    config: dict[str, Any]
    routed: tuple[int, ...] = (1, 3)
    """Layers that have a route, as the configuration says."""
    sparse: tuple[int, ...] = (3,)
    """Layers to make SPARSE."""
    dtype: str = "float32"
    looks_at: dict[str, Any] = field(default_factory=lambda: {"pool_tokens": 48})
    """What the routers look at."""
    lengths: tuple[int, ...] = LENGTHS
    """Of the prompts; one is longer than a KV block."""
    head_dim: int = 32
    unrotated: tuple[int, ...] = ()
    """Layers of full attention without RoPE beside others: they have a route, but no router."""
    quantized: str = ""
    """The format of its projections, of `quantized.FORMS`."""
    arguments: dict[str, Any] = field(default_factory=dict)
    """Further ones of its engines."""
    takes_images: bool = False
    """Whether its text model is part of one that takes images, and is given none."""
    owners: Mapping[int, int] = field(default_factory=dict)
    """Of layers that share another's KV cache, and take its route: whose."""

    @property
    def deciding(self) -> list[int]:
        """Layers whose own router decides."""
        return [layer for layer in self.routed if layer not in self.owners]


def quantized_family(form: str) -> Family:
    """Make a Llama whose weights are stored in a format of `quantized.py`."""
    return Family(
        LlamaConfig,
        {},
        routed=(0, 1, 2, 3),
        sparse=(0, 3),
        dtype="bfloat16",
        head_dim=64,
        quantized=form,
    )


@dataclass
class Case:
    """A family's model, its reference and router, and what stock vLLM answers."""

    folder: Path
    exact: Path
    """The text model with the weights that are meant; mostly `folder`."""
    family: Family
    reference: WholeModel
    router: ReferenceRouter
    stock: list[Answer]
    block_size: int

    @property
    def trained(self) -> Path:
        """What routers are trained for: `folder`, if its weights are not quantized."""
        return self.exact if self.family.quantized else self.folder

    @property
    def pattern(self) -> SparsePattern:
        """What SPARSE means."""
        return SparsePattern(SINK_TOKENS, WINDOW_TOKENS, self.block_size)

    def error(self, answers: Sequence[Answer], routes: Sequence[Sequence[int]]) -> float:
        """Compare answers with what the reference makes of the routes of each."""
        errors = [
            error
            for answer, taken in zip(answers, routes, strict=True)
            for error in self.reference.errors(answer, self.pattern, taken)
        ]
        if self.family.dtype == "float32":
            return max(errors)
        return math.sqrt(sum(error**2 for error in errors) / len(errors))

    @cached_property
    def allowed(self) -> float:
        """How large an error may be."""
        if self.family.dtype == "float32":
            return TOLERANCE
        full = self.reference.full_routes()
        return 2 * self.error(self.stock, [full] * len(self.stock))


def make_case(family: Family, folder: Path) -> Case:
    """Write a family's model and router, and answer with stock vLLM."""
    write_tiny_model(
        folder, family.config_class, heads=4, head_dim=family.head_dim, **family.config
    )
    if family.dtype == "bfloat16":
        round_to_bfloat16(folder)
    exact = folder / "exact" if family.takes_images or family.quantized else folder
    if family.takes_images:
        give_images(folder, exact)
    if family.quantized:
        quantize(folder, exact, family.quantized)
    reference = WholeModel(exact)
    assert set(family.routed) <= set(reference.attention_layers)
    write_random_router(
        beside_weights(folder).parent,
        num_layers=4,
        head_dim=reference.head_dim,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
        model=reference,
        **family.looks_at,
    )
    router = ReferenceRouter.load(beside_weights(folder))
    with start(folder, family, None) as engine:
        stock = list(answer_all(engine, family))
        block_size = engine.worker.vllm_config.cache_config.block_size
    return Case(folder, exact, family, reference, router, stock, block_size)


def start(folder: Path, family: Family, flux: dict[str, Any] | None) -> Engine:
    """Start an engine: stock vLLM where there is no configuration of flux.

    Args:
        folder: of the model.
        family: of it.
        flux: the configuration, or None.
    """
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    # vLLM 0.32's CPU kernels of state spaces give no states from within a chunk, for which its
    # prefix cache asks all the same. Without that, chunks end where a state is kept.
    with patch.object(MambaMixer2, "get_kv_cache_spec", MambaBase.get_kv_cache_spec):
        return Engine(
            folder,
            flux,
            dtype=family.dtype,
            max_num_batched_tokens=2048,
            max_num_seqs=_AT_ONCE,
            enable_prefix_caching=True,
            served_model_name=f"family-{next(_names)}",
            **family.arguments,
        )


def answer_all(engine: Engine, family: Family) -> Iterator[Answer]:
    """Answer each prompt in one chunk, in chunks, and when its first blocks are cached."""
    for length in family.lengths:
        prompt = random_prompt(length, seed=length)
        for chunk in (0, CHUNK):
            engine.limit_chunks(chunk)
            engine.forget_prefixes()
            yield engine.generate([prompt], OUTPUT, prompt_logprobs=True)[0]
        engine.limit_chunks(0)
        yield engine.generate([prompt], OUTPUT)[0]


def answer_together(engine: Engine, family: Family) -> list[Answer]:
    """Answer all prompts in chunks, more than run at once: some are probed while others decode."""
    engine.limit_chunks(CHUNK)
    engine.forget_prefixes()
    lengths = family.lengths * (1 + _AT_ONCE // len(family.lengths))
    assert len(lengths) > _AT_ONCE
    answers = engine.generate([random_prompt(n, seed=n) for n in lengths], OUTPUT)
    engine.limit_chunks(0)
    return answers


def _decided_layers(engine: Engine) -> set[int]:
    """List the layers for which `/metrics` has decisions."""
    engine.runtime.status()
    name = engine.worker.vllm_config.model_config.served_model_name
    return {
        int(dict(labels)["layer"])
        for (sample, labels), value in parse(generate_latest().decode()).items()
        if sample == "flux_route_decisions_total" and ("model_name", name) in labels and value
    }


def check_fixed_routes(case: Case) -> None:
    """Check `static` with no layer SPARSE, and with some."""
    with start(case.folder, case.family, STATIC) as engine:
        full = list(answer_all(engine, case.family))
        engine.runtime.fix_routes(case.family.sparse)
        sparse = list(answer_all(engine, case.family))
        decided = _decided_layers(engine)
    _assert_equal(case.stock, full)
    routes = [[SPARSE if n in case.family.sparse else FULL for n in range(4)]] * len(sparse)
    assert case.error(sparse, routes) < case.allowed
    assert case.error(full, routes) > 2 * case.allowed, "the routes make no difference"
    assert max(answer.cached_tokens for answer in sparse) > 0
    assert decided == {*case.family.routed, *case.family.unrotated}


def check_full(case: Case) -> None:
    """Check `full`: stock vLLM's answers, bit by bit."""
    with start(case.folder, case.family, {"policy": "full"}) as engine:
        _assert_equal(case.stock, list(answer_all(engine, case.family)))


def _assert_equal(stock: Sequence[Answer], answers: Sequence[Answer]) -> None:
    for own, ours in zip(stock, answers, strict=True):
        assert own.tokens == ours.tokens
        assert own.logprobs == ours.logprobs
        assert own.prompt_logprobs == ours.prompt_logprobs
        assert own.cached_tokens == ours.cached_tokens


def check_probes_beside_answers(case: Case) -> None:
    """Check that a probe leaves the running requests' states, keys and values as they are.

    Prompts come one after another while earlier ones are answered: each has the answer that it has
    alone, and no probe changes a byte of what the engine keeps.
    """
    prompts = [random_prompt(length, seed=length) for length in (161, 170, 333, 240)]
    running = []
    with start(case.folder, case.family, {}) as engine:

        @contextmanager
        def watch(_model_call: Any) -> Iterator[None]:
            answering = [r for r in engine.core.scheduler.running if r.num_output_tokens]
            running.append(len(answering))
            before = cache_memory(engine.worker.vllm_config)
            yield
            after = cache_memory(engine.worker.vllm_config)
            assert all(map(torch.equal, before, after)), "a probe wrote into requests' memory"

        # First of all requests: theirs are the blocks that a pool gives first.
        engine.limit_steps(len(prompts[0]))
        with around_probes(watch):
            together = engine.generate(prompts, LONG_OUTPUT)
        engine.reset()
        alone = [engine.generate([prompt], LONG_OUTPUT)[0] for prompt in prompts]
    assert len(running) == len(prompts)
    assert min(running[2:]) > 0, "no probe came while others were answered"
    for one, other in zip(alone, together, strict=True):
        assert str((one.routes, one.p_full)) == str((other.routes, other.p_full))  # may hold NaN
        assert case.error([other], [_routes(case, other)]) < case.allowed
        if case.family.dtype == "float32":  # else low precision may decide near ties otherwise
            assert one.tokens == other.tokens


def check_router(case: Case, kernels: str | None = None, is_trained: bool = True) -> None:
    """Check `router`: its routes, the same for every schedule, and what they make of answers.

    Args:
        case: the model's.
        kernels: on a GPU.
        is_trained: whether training knows such routers, and is to decide alike.
    """
    flux = {} if kernels is None else {"kernels": kernels}
    with start(case.folder, case.family, flux) as engine:
        answers = [*answer_all(engine, case.family), *answer_together(engine, case.family)]
        decided = _decided_layers(engine)
        if is_trained:
            check_training_decides_alike(
                engine,
                answers,
                case.trained,
                beside_weights(case.folder),
                case.family.deciding,
                case.family.dtype,
            )
    assert case.error(answers, [_routes(case, answer) for answer in answers]) < case.allowed
    bits = [
        {str((answer.routes, answer.p_full)) for answer in answers if len(answer.prompt) == length}
        for length in case.family.lengths
    ]
    assert [len(seen) for seen in bits] == [1] * len(bits)
    assert len(set(map(str, bits))) > 2
    assert decided == set(case.family.routed)


def check_training(case: Case) -> None:
    """Check that routers are trained for the model."""
    family = case.family
    check_training_runs(case.trained, case.reference, family.deciding, family.sparse, case.pattern)


def _routes(case: Case, answer: Answer) -> list[int]:
    """Check an answer's routes, and give them for the reference."""
    if len(answer.prompt) + OUTPUT <= SINK_TOKENS + WINDOW_TOKENS:
        assert answer.routes is None
        return case.reference.full_routes()
    margin = P_FULL_MARGIN if case.family.dtype == "float32" else 0.1
    p_full = case.router.p_full(case.reference, answer.prompt)
    p_full = p_full[[case.family.owners.get(n, n) for n in range(4)]]
    layers = list(case.family.routed)
    assert answer.routes is not None
    assert answer.p_full is not None
    check_routes([answer.routes[n] for n in layers], p_full[layers], 0.5, margin)
    for layer in layers:
        assert abs(answer.p_full[layer] - p_full[layer].item()) < margin
    return [answer.routes[n] if n in layers else FULL for n in range(4)]
