"""The probe on a GPU: captured once, replayed for each prompt, the same bits for every schedule.

Oracles: equality to the bit across schedules; for what is pooled, transformers in float32 over the
same bfloat16 weights, within twice the error of plain transformers in bfloat16. vLLM's defaults
stay on: compiled model, CUDA graphs, asynchronous scheduling, prefix caching.
"""

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.attended import attended
from tests.helpers.engine import Answer, Engine
from tests.helpers.models import (
    random_prompt,
    round_to_bfloat16,
    write_random_router,
    write_tiny_llama,
)
from tests.helpers.reference import ReferenceModel, ReferenceRouter

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

LENGTHS = [161, 333, 640, 1281, 1288, 3000]
BLOCK_SIZE = 16
CHUNKS = [0, 256, 97]
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "block_size": BLOCK_SIZE,
    "enable_prefix_caching": True,
    "max_num_seqs": 16,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny bfloat16 Llama, a router with pools and a context layer, its reference."""
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), heads=8, kv_heads=2, head_dim=64)
    round_to_bfloat16(folder)
    router = write_random_router(
        tmp_path_factory.mktemp("router"),
        num_layers=4,
        head_dim=64,
        model_folder=folder,
        pools=("tail:16", "head:32", "ends:64"),
        context_layers=(1,),
    )
    return folder, router


@pytest.fixture(scope="module")
def engine(files) -> Iterator[Engine]:
    with Engine(files[0], {"router": str(files[1])}, **DEFAULTS) as started:
        yield started


def _bits(answer: Answer) -> tuple:
    assert answer.routes is not None
    return tuple(answer.routes), tuple(answer.p_full)


def test_is_captured(engine: Engine) -> None:
    assert engine.runtime.probe._replays is not None


def test_same_bits_for_every_schedule(engine: Engine) -> None:
    _check_schedules(engine)


def _check_schedules(engine: Engine) -> None:
    """Chunks of 97 and 256 and none, alone and with neighbours, first asked and cached."""
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    seen: list[set] = [set() for _ in prompts]
    for chunk in CHUNKS:
        engine.limit_chunks(chunk)
        engine.forget_prefixes()
        for bits, prompt in zip(seen, prompts, strict=True):
            first, again = (engine.generate([prompt], 8)[0] for _ in range(2))
            assert first.cached_tokens == 0
            assert again.cached_tokens == (len(prompt) - 1) // BLOCK_SIZE * BLOCK_SIZE
            bits |= {_bits(first), _bits(again)}
        engine.forget_prefixes()
        for bits, answer in zip(seen, engine.generate(prompts, 8), strict=True):
            bits.add(_bits(answer))
    engine.limit_chunks(0)
    assert [len(bits) for bits in seen] == [1] * len(prompts)
    assert len({routes for ((routes, _),) in seen}) > 1


def test_short_prompt_is_probed_once_its_text_is_long(engine: Engine) -> None:
    """160 is the router's reach; what is probed is the prompt, whenever."""
    prompt = random_prompt(150, seed=9)
    (short,) = engine.generate([prompt], 8)
    assert short.routes is None
    (long,) = engine.generate([prompt], 40)
    _, p_full, routes = engine.probe(prompt)
    assert _bits(long) == (tuple(routes.tolist()), tuple(p_full.tolist()))


def test_captured_equals_eager(engine: Engine) -> None:
    probe = engine.runtime.probe
    replays = probe._replays
    for length in LENGTHS:
        prompt = random_prompt(length, seed=length)
        captured = engine.probe(prompt)
        probe._replays = None
        eager = engine.probe(prompt)
        probe._replays = replays
        worst = (captured[0] - eager[0]).abs().max()
        print(f"\n{length} tokens: pooled queries differ by at most {worst:.2e}", flush=True)
        torch.testing.assert_close(captured[0], eager[0], rtol=0, atol=1e-2)
        torch.testing.assert_close(captured[1], eager[1], rtol=0, atol=1e-2)


def test_a_probe_writes_no_key_and_no_value(engine: Engine) -> None:
    engine.generate([random_prompt(500, seed=1)], 2)
    context = engine.worker.vllm_config.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values() if hasattr(layer, "kv_cache")]
    before = [cache.clone() for cache in caches]
    assert all(cache.any() for cache in caches)
    engine.probe(random_prompt(700, seed=2))
    for cache, copy in zip(caches, before, strict=True):
        assert torch.equal(cache, copy)


def test_pooled_queries_are_those_of_transformers(files, engine: Engine) -> None:
    router = ReferenceRouter.load(files[1])
    exact, plain = ReferenceModel(files[0]), ReferenceModel(files[0], torch.bfloat16)
    for length in (5, 130, 256, 257, 2000):
        prompt = random_prompt(length, seed=length)
        expected = router.pooled(exact, prompt)
        allowed = (router.pooled(plain, prompt) - expected).square().mean().sqrt()
        found = (engine.probe(prompt)[0] - expected).square().mean().sqrt()
        print(f"\n{length} tokens: r.m.s. error {found:.2e}, plain bfloat16 {allowed:.2e}")
        assert found <= 2 * allowed


def test_preemption_keeps_the_bits(files, engine: Engine) -> None:
    prompts = [random_prompt(n, seed=60 + n) for n in (500, 161, 700, 1100)]
    expected = [_bits(engine.generate([prompt], 1)[0]) for prompt in prompts]
    # The prompts fill 156 blocks and each grows by 12 or 13. One more is vLLM's null block.
    blocks = sum(-(-len(prompt) // BLOCK_SIZE) for prompt in prompts) + 5
    with Engine(
        files[0],
        {"router": str(files[1])},
        num_gpu_blocks_override=blocks,
        max_model_len=2048,  # a cache must hold one such request: 128 blocks
        **DEFAULTS,
    ) as tight:
        answers = tight.generate(prompts, 200)
    assert sum(answer.preemptions for answer in answers) > 0
    assert [_bits(answer) for answer in answers] == expected


@pytest.mark.parametrize("arguments", [{}, {"enforce_eager": True}], ids=["captured", "eager"])
def test_router_that_reads_one_early_layer(files, tmp_path, monkeypatch, arguments) -> None:
    """Its probes end there, with the routes of a whole forward: the model of 4 runs 1 layer."""
    router = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=64,
        model_folder=files[0],
        pools=("tail:16", "length", "head:32"),
        context_layers=(1,),
        own_weight=0,
    )
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    with Engine(files[0], {"router": str(router)}, **(DEFAULTS | arguments)) as early:
        probe = early.runtime.probe
        assert (probe._replays is None) == bool(arguments)
        _check_schedules(early)
        captured = [early.probe(prompt)[1:] for prompt in prompts]
        assert attended(early, prompts[0]) == [0]
        probe._replays = None
        ended = [early.probe(prompt)[1:] for prompt in prompts]
        for metadata in probe._metadata.values():
            monkeypatch.setattr(metadata, "is_last", False)
        assert attended(early, prompts[0]) == [0, 1, 2, 3]
        whole = [early.probe(prompt)[1:] for prompt in prompts]
    for of_graph, of_end, of_whole in zip(captured, ended, whole, strict=True):
        assert all(map(torch.equal, of_end, of_whole))
        torch.testing.assert_close(of_graph[0], of_end[0], rtol=0, atol=1e-2)
