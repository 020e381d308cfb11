"""The sample model on real text: `full` against FLASH_ATTN, `router` against transformers.

Oracles: vLLM's FLASH_ATTN, and tests/helpers/reference.py in float32. Low precision decides between
tokens that are nearly as likely, so the first difference of two answers must lie between candidates
whose gap FLASH_ATTN's own noise explains; what was found is printed, and written to
`$FLUX_TEST_OUT/sample_model_full.json` where that is set.
"""

import json
import os
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import torch

import flux_vllm
from tests.helpers.engine import Engine
from tests.helpers.reference import ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import check_routes, replay

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

ROUTER_FILE = "flux_router.safetensors"
ROUTER = Path(flux_vllm.__file__).parent / "data" / "smollm2-135m-instruct" / ROUTER_FILE
CHARACTERS_A_TOKEN = 8  # more than any of these texts has
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_model_len": 8192,
    "max_num_batched_tokens": 8192,
    "max_num_seqs": 64,
    "block_size": 16,
    "kv_cache_memory_bytes": 3 << 30,  # all prompts at once
}


@pytest.fixture(scope="session")
def prompts_of(sample_model):
    """Cut prompts of given lengths from the standard library's sources, one source each."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(sample_model)

    def cut(lengths):
        library = Path(sysconfig.get_path("stdlib"))
        needed = CHARACTERS_A_TOKEN * max(lengths)
        files = [f for f in sorted(library.glob("*.py")) if f.stat().st_size >= needed]
        files += [f for f in sorted(library.glob("*/*.py")) if f.stat().st_size >= needed]
        assert len(files) >= 5, f"{library} has too few long sources: {len(files)}"
        prompts = []
        for index, length in enumerate(lengths):
            text = files[index % len(files)].read_text(encoding="utf-8")
            # Prompts that share a source start at different places of it.
            start = (index // len(files) * 977) % (len(text) - needed + 1)
            tokens = tokenizer(text[start : start + CHARACTERS_A_TOKEN * length])["input_ids"]
            assert len(tokens) >= length
            prompts.append(tokens[:length])
        return prompts

    return cut


def _log_spaced(low, high, count):
    return np.geomspace(low, high, count).round().astype(int).tolist()


def _first_difference(one, other):
    for index, (a, b) in enumerate(zip(one.tokens, other.tokens, strict=True)):
        if a != b:
            return index
    return None


def _noise(answers, others):
    """Give the largest difference of a token's log-probability before two answers part."""
    differences = [0.0]
    for one, other in zip(answers, others, strict=True):
        until = _first_difference(one, other)
        pairs = zip(one.logprobs[:until], other.logprobs[:until], strict=True)
        differences += [abs(a - b) for a, b in pairs]
    return max(differences)


def _ties(answers, others):
    """List where answers part: the candidates' gap in either engine, inf for one not among them."""
    ties = []
    for index, (one, other) in enumerate(zip(answers, others, strict=True)):
        at = _first_difference(one, other)
        if at is not None:
            a, b = one.tokens[at], other.tokens[at]
            gaps = [
                abs(row[chosen] - row.get(rival, float("-inf")))
                for row, chosen, rival in (
                    (one.candidates[at], a, b),
                    (other.candidates[at], b, a),
                )
            ]
            ties.append(
                {
                    "prompt": index,
                    "prompt_tokens": len(one.prompt),
                    "output_token": at,
                    "candidates": [a, b],
                    "gaps": gaps,
                }
            )
    return ties


def test_full_equals_flash_attn(sample_model, prompts_of):
    """Greedy tokens over 50 prompts; engine against engine, each prompt alone.

    Policy `full` calls vLLM's own attention; `static` without a SPARSE layer goes through flux's
    views and calls.

    Two log-probabilities that each differ by the noise between two engines let candidates change
    places whose gap is up to twice the noise.
    """
    prompts = prompts_of(_log_spaced(100, 7000, 50))
    with Engine(sample_model, None, attention_backend="FLASH_ATTN", **DEFAULTS) as engine:
        stock = [engine.generate([prompt], 32, candidates=10)[0] for prompt in prompts]
        together = engine.generate(prompts, 32, candidates=10)
    noise = _noise(stock, together)
    found = {"flash_attn_noise": noise, "flash_attn_against_itself": _ties(stock, together)}
    no_sparse_layer = {"policy": "static", "sparse_layers": []}
    for policy in ({"policy": "full"}, no_sparse_layer | {"sink_tokens": 64, "window_tokens": 512}):
        with Engine(sample_model, policy, **DEFAULTS) as engine:
            ours = [engine.generate([prompt], 32, candidates=10)[0] for prompt in prompts]
        name = policy["policy"]
        found |= {f"{name}_noise": _noise(stock, ours), f"{name}_ties": _ties(stock, ours)}
    print("\n" + json.dumps(found, indent=1), flush=True)
    if "FLUX_TEST_OUT" in os.environ:
        path = Path(os.environ["FLUX_TEST_OUT"]) / "sample_model_full.json"
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    # Such engines' log-probabilities were equal; a batch's differ by the noise.
    assert max(found["full_noise"], found["static_noise"]) <= noise
    for tie in found["full_ties"] + found["static_ties"]:
        assert max(tie["gaps"]) <= 2 * noise, tie


@pytest.fixture(scope="session")
def reference(sample_model):
    """The sample model in transformers, float32, on a few of the CPU's cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield ReferenceModel(sample_model)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("chunk", [8192, 300], ids=["one-chunk", "chunks-300"])
def test_router_equals_transformers(sample_model, prompts_of, reference, chunk):
    """P(FULL) within twice the error of plain transformers in bfloat16, under the same routes.

    And the routes, wherever P(FULL) is clear of the threshold.
    """
    router = ReferenceRouter.load(ROUTER)
    sizes = (int(router.metadata[name]) for name in ("sink_tokens", "window_tokens"))
    kind = router.metadata["sparse_pattern"]
    pattern = SparsePattern(*sizes, DEFAULTS["block_size"], kind)
    arguments = DEFAULTS | {"max_num_batched_tokens": chunk, "enforce_eager": True}
    with Engine(sample_model, {"router": str(ROUTER)}, **arguments) as engine:
        answers = [
            engine.generate([prompt], 1)[0] for prompt in prompts_of(_log_spaced(600, 2500, 12))
        ]
    plain = ReferenceModel(sample_model, torch.bfloat16)
    same = {"pattern": pattern, "router": router, "margin": 1.0, "follow_tokens": True}
    requests = [replay(reference, answer, **same) for answer in answers]
    rounded = [replay(plain, answer, **same) for answer in answers]
    exact = torch.stack([request.p_full for request in requests])
    noise = torch.stack([one.p_full for one in rounded]) - exact
    error = torch.tensor([answer.p_full for answer in answers]) - exact
    allowed = 2 * float(noise.square().mean().sqrt())
    found = float(error.square().mean().sqrt())
    print(
        f"\nP(FULL): r.m.s. error {found:.4f}, allowed {allowed:.4f}; "
        f"largest {error.abs().max():.3f}, plain {noise.abs().max():.3f}",
        flush=True,
    )
    assert found <= allowed  # False of NaN
    margin = 3 * float(noise.abs().max())  # of 360 values each, largest against largest
    for answer, request in zip(answers, requests, strict=True):
        assert len(answer.steps) == -(-len(answer.prompt) // chunk)
        check_routes(answer.routes, request.p_full, 0.5, margin)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 1
