"""`free_kv` on real engines: groups, freeing and overwriting what is free change no bit.

Oracle: the same engine without `free_kv`; for memory, the formula of docs/KV_MEMORY.md.
"""

import pytest

from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.free_kv import PoisonedEngine
from tests.helpers.models import random_prompt

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
FLUX = {
    "policy": "static",
    "sparse_layers": [0, 1, 2],
    "sink_tokens": SINK_TOKENS,
    "window_tokens": WINDOW_TOKENS,
}
FREE = FLUX | {"free_kv": True}
LENGTHS = [700, 159, 1100, 30]
PROMPTS = [random_prompt(length, seed=length) for length in LENGTHS]
TOKENS = 80


def _answers(engine, prompts=PROMPTS, tokens=TOKENS):
    return [(a.tokens, a.logprobs) for a in engine.generate(prompts, tokens)]


def _plain(model, prompts=PROMPTS, tokens=TOKENS, **arguments):
    flux = FLUX | arguments.pop("flux", {})
    with Engine(model, flux, block_size=BLOCK_SIZE, **arguments) as engine:
        return _answers(engine, prompts, tokens)


@pytest.mark.parametrize(
    ("pattern", "chunk", "is_async"),
    [
        ("streaming", 4096, False),
        ("streaming", 97, False),
        ("streaming", 256, True),
        ("triangle", 256, True),
        ("xattention", 256, False),
    ],
)
def test_freed_and_overwritten_equals_kept(tiny_model, pattern, chunk, is_async):
    arguments = {"max_num_batched_tokens": chunk, "async_scheduling": is_async}
    pattern = {"sparse_pattern": pattern}
    expected = _plain(tiny_model, flux=pattern, **arguments)
    with PoisonedEngine(tiny_model, FREE | pattern, block_size=BLOCK_SIZE, **arguments) as engine:
        assert len(engine.managers) == 4
        assert _answers(engine) == expected
        # Blocks behind the sinks whose tokens all lie more than 128 before the last window.
        ends = [(n + TOKENS - 1 - is_async - 127 - WINDOW_TOKENS) // BLOCK_SIZE for n in LENGTHS]
        assert len(engine.freed) == 3 * sum(max(end - 1, 0) for end in ends)


def test_layers_of_the_wrong_cluster_change_answers(tiny_model, monkeypatch):
    """A check of the checks: freeing a FULL layer's keys shows."""
    from flux_vllm import startup

    monkeypatch.setattr(startup, "always_sparse_layers", lambda *_: (0, 1, 3))
    with PoisonedEngine(tiny_model, FREE, block_size=BLOCK_SIZE) as engine:
        assert _answers(engine) != _plain(tiny_model)
