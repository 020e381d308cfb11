"""KV blocks offloaded to the CPU's memory and loaded again, under a router on a GPU.

Oracle: tests/helpers/reference.py over the same bfloat16 weights, whose history is what the first
request computed, by the rule of test_serving.py (twice the error of vLLM's FLASH_ATTN).
"""

import pytest

from flux_vllm.router.place import ROUTER_FILE_NAME
from tests.helpers.engine import Engine
from tests.helpers.models import random_prompt, write_bfloat16_llama
from tests.helpers.reference import FULL, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import logprob_errors, replay

pytestmark = [pytest.mark.gpu, pytest.mark.vllm]

SINK_TOKENS, WINDOW_TOKENS = 32, 128
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 16)
PROMPTS = [random_prompt(length, seed=length) for length in (200, 900, 2001)]
DEFAULTS = {
    "dtype": "bfloat16",
    "enforce_eager": False,
    "max_num_seqs": 8,
    "enable_prefix_caching": True,
}


def test_offloaded_blocks(tmp_path):
    folder, router = write_bfloat16_llama(
        tmp_path, head_dim=64, sink_tokens=SINK_TOKENS, window_tokens=WINDOW_TOKENS
    )
    reference = ReferenceModel(folder)
    routers = ReferenceRouter.load(router / ROUTER_FILE_NAME)
    with Engine(folder, None, attention_backend="FLASH_ATTN", **DEFAULTS) as engine:
        stock = [engine.generate([prompt], 24)[0] for prompt in PROMPTS]
    with Engine(folder, {"router": str(router)}, kv_offloading_size=1.0, **DEFAULTS) as engine:
        first = [engine.generate([prompt], 24)[0] for prompt in PROMPTS]
        engine.forget_prefixes()  # those on the GPU
        second = [engine.generate([prompt], 24)[0] for prompt in PROMPTS]
    allowed = max(
        logprob_errors(a, replay(reference, a, PATTERN, [FULL] * 4, follow_tokens=True))[1]
        for a in stock
    )
    for before, after in zip(first, second, strict=True):
        assert before.steps[0][0] == 0
        assert after.steps[0][0] >= len(after.prompt) // 2
        assert (before.routes, before.p_full) == (after.routes, after.p_full)
        arguments = {"router": routers, "margin": 0.1, "follow_tokens": True}
        source = replay(reference, before, PATTERN, **arguments)
        request = replay(reference, after, PATTERN, history=source.history, **arguments)
        assert max(logprob_errors(before, source)[1], logprob_errors(after, request)[1]) <= (
            2 * allowed
        )
