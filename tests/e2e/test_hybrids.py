"""Hybrids: attention layers among layers that carry a state; the former are routed, those alone.

Oracles: stock vLLM, bit by bit, where every layer is FULL; tests/helpers/whole_reference.py,
transformers' own code of each family in float32, for fixed routes and for a router's, in one
chunk, in chunks and on a prefix-cache hit. `/metrics` names the layers that have routes.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from prometheus_client import generate_latest
from transformers import FalconH1Config, GraniteMoeHybridConfig, NemotronHConfig, PreTrainedConfig

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.place import beside_weights
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Answer, Engine
from tests.helpers.metrics import parse
from tests.helpers.models import random_prompt, write_random_router, write_tiny_model
from tests.helpers.reference import FULL, SPARSE, ReferenceRouter, SparsePattern
from tests.helpers.replay import P_FULL_MARGIN, check_routes
from tests.helpers.whole_reference import WholeModel

pytestmark = pytest.mark.vllm

LENGTHS = (100, 161, 333, 700)
OUTPUT = 8
CHUNK = 97
TOLERANCE = 0.02
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 32, "mamba_n_groups": 1, "mamba_d_state": 16}
_names = itertools.count()


@dataclass(frozen=True)
class Family:
    """A tiny model of a family."""

    config_class: type[PreTrainedConfig]
    config: dict[str, Any]
    attention: tuple[int, ...] = (1, 3)
    """Layers with attention, as the configuration says."""
    sparse: tuple[int, ...] = (3,)
    sizes: dict[str, int] = field(default_factory=dict)


FAMILIES = {
    # Attention and a state space side by side in every layer.
    "falcon-h1": Family(
        FalconH1Config,
        {**MAMBA, "mamba_d_ssm": 256, "mamba_chunk_size": 64},
        attention=(0, 1, 2, 3),
        sparse=(0, 3),
    ),
    "granite-hybrid-rope": Family(
        GraniteMoeHybridConfig,
        {
            **MAMBA,
            "mamba_chunk_size": 64,
            "layer_types": ["mamba", "attention"] * 2,
            "position_embedding_type": "rope",
            "num_local_experts": 0,
            "num_experts_per_tok": 0,
            "shared_intermediate_size": 256,
        },
    ),
    # Queries that nothing rotates.
    "nemotron-h": Family(
        NemotronHConfig,
        {
            "layers_block_type": ["mamba", "attention"] * 2,
            "mamba_num_heads": 8,
            "mamba_head_dim": 32,
            "n_groups": 1,
            "ssm_state_size": 16,
            "chunk_size": 64,
        },
    ),
}


@dataclass
class Case:
    """A family's model, its reference and its router."""

    folder: Path
    family: Family
    reference: WholeModel
    router: ReferenceRouter


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family = FAMILIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    write_tiny_model(folder, family.config_class, heads=4, **family.config)
    reference = WholeModel(folder)
    assert reference.attention_layers == list(family.attention)
    write_random_router(
        beside_weights(folder).parent,
        num_layers=4,
        head_dim=32,
        pool_tokens=48,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
        model=reference,
    )
    return Case(folder, family, reference, ReferenceRouter.load(beside_weights(folder)))


def _engine(case: Case, flux: dict[str, Any] | None) -> Engine:
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2

    # vLLM 0.32's CPU kernels of state spaces give no states from within a chunk, for which its
    # prefix cache asks all the same. Without that, chunks end where a state is kept.
    with patch.object(MambaMixer2, "get_kv_cache_spec", MambaBase.get_kv_cache_spec):
        return Engine(
            case.folder,
            flux,
            max_num_batched_tokens=1024,
            max_num_seqs=4,
            enable_prefix_caching=True,
            served_model_name=f"hybrid-{next(_names)}",
        )


def _answers(engine: Engine) -> Iterator[Answer]:
    """Answer each prompt in one chunk, in chunks, and when its first blocks are cached."""
    for length in LENGTHS:
        prompt = random_prompt(length, seed=length)
        for chunk in (0, CHUNK):
            engine.limit_chunks(chunk)
            engine.forget_prefixes()
            yield engine.generate([prompt], OUTPUT, prompt_logprobs=True)[0]
        engine.limit_chunks(0)
        yield engine.generate([prompt], OUTPUT)[0]


def _pattern(engine: Engine) -> SparsePattern:
    return SparsePattern(
        SINK_TOKENS, WINDOW_TOKENS, engine.worker.vllm_config.cache_config.block_size
    )


def _decided_layers(engine: Engine) -> set[int]:
    """List the layers for which `/metrics` has decisions."""
    engine.runtime.status()
    name = engine.worker.vllm_config.model_config.served_model_name
    wanted = ("flux_route_decisions_total", ("model_name", name))
    return {
        int(dict(labels)["layer"])
        for (sample, labels), value in parse(generate_latest().decode()).items()
        if sample == wanted[0] and wanted[1] in labels and value
    }


def test_fixed_routes(case: Case) -> None:
    with _engine(case, None) as engine:
        stock = list(_answers(engine))
    static = {
        "policy": "static",
        "sparse_layers": [],
        "sink_tokens": SINK_TOKENS,
        "window_tokens": WINDOW_TOKENS,
    }
    with _engine(case, static) as engine:
        full = list(_answers(engine))
        engine.runtime.fix_routes(case.family.sparse)
        sparse = list(_answers(engine))
        pattern, decided = _pattern(engine), _decided_layers(engine)
    for own, ours in zip(stock, full, strict=True):
        assert own.tokens == ours.tokens
        assert own.logprobs == ours.logprobs
        assert own.prompt_logprobs == ours.prompt_logprobs
    routes = [SPARSE if layer in case.family.sparse else FULL for layer in range(4)]
    for answer in sparse:
        assert max(case.reference.errors(answer, pattern, routes)) < TOLERANCE
    assert max(case.reference.errors(full[-3], pattern, routes)) > 5 * TOLERANCE
    assert max(answer.cached_tokens for answer in sparse) > 0
    assert decided == set(case.family.attention)


def test_router(case: Case) -> None:
    bits: dict[int, set] = {length: set() for length in LENGTHS}
    with _engine(case, {}) as engine:
        pattern = _pattern(engine)
        for answer in _answers(engine):
            _check_routed(case, answer, pattern)
            bits[len(answer.prompt)].add(str((answer.routes, answer.p_full)))
        decided = _decided_layers(engine)
    assert [len(seen) for seen in bits.values()] == [1] * len(LENGTHS)
    assert len(set(map(str, bits.values()))) > 2
    assert decided == set(case.family.attention)


def _check_routed(case: Case, answer: Answer, pattern: SparsePattern) -> None:
    if len(answer.prompt) + OUTPUT <= SINK_TOKENS + WINDOW_TOKENS:
        assert answer.routes is None
        routes = case.reference.full_routes()
    else:
        p_full = case.router.p_full(case.reference, answer.prompt)
        layers = list(case.family.attention)
        routes = [answer.routes[layer] if layer in layers else FULL for layer in range(4)]
        check_routes([routes[n] for n in layers], p_full[layers], 0.5, P_FULL_MARGIN)
        for layer in layers:
            assert abs(answer.p_full[layer] - p_full[layer].item()) < P_FULL_MARGIN
    assert max(case.reference.errors(answer, pattern, routes)) < TOLERANCE


def test_memory_of_sparse_layers_is_not_given_back(case: Case) -> None:
    with pytest.raises(UnsupportedConfigurationError, match="attention layers alone"):
        _engine(case, {"policy": "sparse", "free_kv": True})
