"""An imported checkpoint, served, against the authors' inference path written anew at batch 1.

Oracle: tests/helpers/reference.py over the model and the router that the checkpoint was made of,
not over what the import wrote: transformers' layers in float32; the mean of the first and last
`pool_size` queries before RoPE and after q/k-norm, then over heads; the greater logit (or the sign
of the only one); at prefill, sink and window, triangle or XAttention for SPARSE layers.
"""

from pathlib import Path
from typing import Any

import pytest

from flux_vllm.importer.model import import_checkpoint
from tests.helpers.engine import Engine
from tests.helpers.models import (
    random_prompt,
    write_random_router,
    write_tiny_llama,
    write_tiny_qwen3,
)
from tests.helpers.paw import write_paw_model
from tests.helpers.reference import SPARSE, ReferenceModel, ReferenceRouter, SparsePattern
from tests.helpers.replay import LOGPROB_TOLERANCE, assert_routed, logprob_errors, replay

pytestmark = pytest.mark.vllm

BLOCK_SIZE = 32
# By the authors' `toggle_type`.
KINDS = {"streaming": "streaming", "triangle": "triangle", "xattn": "xattention"}
SINK, WINDOW, POOL = 128, 256, 100


TRIANGLE, XATTENTION = {"toggle_type": "triangle"}, {"toggle_type": "xattn"}


# Every way to write a router and every pattern once; `make test-all` crosses them with the models.
@pytest.mark.parametrize(
    ("write_model", "fields"),
    [
        pytest.param(write_tiny_llama, {}, id="llama"),
        pytest.param(write_tiny_qwen3, {}, id="qwen3", marks=pytest.mark.long),
        pytest.param(write_tiny_qwen3, {"use_softmax": False}, id="qwen3-one-logit"),
        pytest.param(write_tiny_llama, TRIANGLE, id="llama-triangle"),
        pytest.param(write_tiny_qwen3, TRIANGLE, id="qwen3-triangle", marks=pytest.mark.long),
        pytest.param(write_tiny_llama, XATTENTION, id="llama-xattn", marks=pytest.mark.long),
        pytest.param(write_tiny_qwen3, XATTENTION, id="qwen3-xattn"),
    ],
)
def test_served_as_the_authors_compute(
    write_model: Any, fields: dict[str, Any], tmp_path: Path
) -> None:
    model = write_model(tmp_path / "model")
    router = write_random_router(
        tmp_path,
        num_layers=4,
        head_dim=32,
        pool_tokens=POOL,
        sink_tokens=SINK,
        window_tokens=WINDOW,
        model_folder=model,
    )
    sizes = {"sink_size": SINK, "local_window_size": WINDOW, "pool_size": POOL}
    checkpoint = write_paw_model(tmp_path / "paw", model, router, **sizes, **fields)
    served = tmp_path / "served"
    import_checkpoint(checkpoint, served)
    # From below one pool to far beyond sink + window; each alone and in one chunk.
    prompts = [random_prompt(n, seed=n) for n in (17, 99, 150, 201, 384, 500, 1000, 1500)]
    with Engine(served, {}, block_size=BLOCK_SIZE) as engine:
        answers = [engine.generate([prompt], 16, prompt_logprobs=True)[0] for prompt in prompts]
    reference, reference_router = ReferenceModel(model), ReferenceRouter.load(router)
    kind = KINDS[fields.get("toggle_type", "streaming")]
    pattern = SparsePattern(SINK, WINDOW, BLOCK_SIZE, kind)
    for answer in answers:
        assert answer.steps[0][:2] == (0, len(answer.prompt))
        assert_routed(answer, reference, reference_router, pattern)
    assert len({tuple(answer.routes or ()) for answer in answers}) > 1
    # The longest prompt would show a pattern that was lost on the way.
    assert SPARSE in (answers[-1].routes or ())
    if kind != "streaming":
        streaming = SparsePattern(SINK, WINDOW, BLOCK_SIZE)
        other = replay(reference, answers[-1], streaming, answers[-1].routes, follow_tokens=True)
        assert logprob_errors(answers[-1], other)[0] > 10 * LOGPROB_TOLERANCE
