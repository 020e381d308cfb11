"""Pipeline parallel 2: both stages know all routes, and answer as one GPU does.

Oracles: the other stage, bit by bit; tests/helpers/reference.py in float32, by the rule of
test_serving.py (twice the error that FLASH_ATTN makes on one GPU). vLLM's defaults stay on (model
runner V2, CUDA graphs, asynchronous scheduling); the probe itself runs without a graph.
"""

import pytest
import torch

from flux_vllm.router.place import ROUTER_FILE_NAME
from tests.helpers.models import random_prompt, write_bfloat16_llama
from tests.helpers.reference import FULL, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import logprob_errors, replay
from tests.helpers.side_by_side import Setup, serve_side_by_side
from tests.helpers.tensor_parallel import assert_ranks_alike, compare_routes

GPUS = torch.cuda.device_count()
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.vllm,
    pytest.mark.skipif(GPUS < 2, reason=f"needs two CUDA GPUs; {GPUS} are visible here"),
]

SINK_TOKENS, WINDOW_TOKENS = 32, 128
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, 16)
LENGTHS = [1, 17, 160, 161, 320, 500, 1100, 2050]
DEFAULTS = {
    "dtype": "bfloat16",
    "block_size": 16,
    "max_num_batched_tokens": 512,
    "max_num_seqs": 16,
    "kv_cache_memory_bytes": 1 << 30,
    "gpu_memory_utilization": 0.15,  # several processes share the GPUs
}
STAGES = {"pipeline_parallel_size": 2, "distributed_executor_backend": "mp"}


def test_two_stages(tmp_path):
    folder, router = write_bfloat16_llama(
        tmp_path, head_dim=64, sink_tokens=SINK_TOKENS, window_tokens=WINDOW_TOKENS, gain=0.5
    )
    flux = {"router": str(router)}
    plain = DEFAULTS | {"enforce_eager": True, "attention_backend": "FLASH_ATTN"}
    graphs = DEFAULTS | {"enforce_eager": False}
    setups = [
        Setup(folder, None, 1, plain),
        Setup(folder, flux, 1, graphs),
        Setup(folder, flux, 1, graphs | STAGES),
    ]
    prompts = [random_prompt(length, length) for length in LENGTHS]
    stock, one, two = serve_side_by_side(setups, prompts, 24)
    assert len(two.logs) == 2
    print("\n" + assert_ranks_alike(two.logs))
    compare_routes(one.answers, two.answers)
    assert (two.unrouted, two.decisions) == (0, one.decisions)
    reference = ReferenceModel(folder)
    routers = ReferenceRouter.load(router / ROUTER_FILE_NAME)
    full = [replay(reference, a, PATTERN, [FULL] * 4, follow_tokens=True) for a in stock.answers]
    errors = [logprob_errors(a, r) for a, r in zip(stock.answers, full, strict=True)]
    allowed = [2 * max(column) for column in zip(*errors, strict=True)]
    for answer in two.answers:
        request = replay(reference, answer, PATTERN, router=routers, margin=0.1, follow_tokens=True)
        prompt, output = logprob_errors(answer, request)
        assert prompt <= allowed[0]
        assert output <= allowed[1]
