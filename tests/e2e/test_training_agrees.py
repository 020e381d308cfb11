"""Training sees and decides what the server does: the same files, prompts and router on both sides.

Quality is measured offline, on the routes that `training` computes; a server that cut, pooled or
attended otherwise would serve another router than the one measured. Both sides are float32 on the
CPU: the server probes prompts one by one, training all in one padded batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.router.checkpoint import RouterInfo, read_router
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import full_probability
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.engine import Engine
from tests.helpers.models import (
    random_prompt,
    write_random_router,
    write_tiny_llama,
    write_tiny_qwen3,
)
from tests.helpers.replay import P_FULL_MARGIN
from tests.helpers.training_side import load_for_training, write_tokenizer
from training.attach import RoutedModel
from training.data.prompt_files import prompt_ids
from training.model_loading import load_tokenizer
from training.policies import ThresholdPolicy
from training.probe import collate_probes

pytestmark = pytest.mark.vllm

REACH = SINK_TOKENS + WINDOW_TOKENS
PAPER = {"pool_tokens": 48}
SEVERAL: dict[str, Any] = {
    "pools": ("tail:8", "head:16", "ends:24", "overlap:70", "length"),
    "probe": (40, 30),
    "context_layers": (2, 0),
    "widths": (48, 16, 32, 24),
}
# Shorter than a probe (padded), just as long, longer by one; short and long beside each other.
LENGTHS = {"paper": [161, 200, 255, 256, 257, 700, 1500], "several": [5, 69, 70, 71, 250, 900]}


@dataclass
class Sides:
    """An engine, and what training makes of the same files."""

    name: str
    engine: Engine
    routed: RoutedModel
    router: LayerRouter
    info: RouterInfo
    tokenizer: Any

    def features(self, prompts: list[list[int]]) -> torch.Tensor:
        """Let training look at prompts, all at once. Returns: [L, B, F]."""
        arrays = [np.array(prompt, dtype=np.int32) for prompt in prompts]
        return self.routed.probe(collate_probes(arrays, self.info.inputs), self.info.inputs)


@pytest.fixture(scope="module", params=["paper", "several"])
def sides(request: pytest.FixtureRequest, tmp_path_factory) -> Iterator[Sides]:
    write, inputs = {
        "paper": (write_tiny_llama, PAPER),
        "several": (write_tiny_qwen3, SEVERAL),
    }[request.param]
    folder = write(tmp_path_factory.mktemp(request.param))
    write_tokenizer(folder)
    path = write_random_router(
        folder / "flux",
        num_layers=4,
        head_dim=32,
        sink_tokens=SINK_TOKENS,
        window_tokens=WINDOW_TOKENS,
        model_folder=folder,
        **inputs,
    )
    router, info = read_router(path)
    routed = load_for_training(folder, SINK_TOKENS, WINDOW_TOKENS)
    with Engine(folder, {}, block_size=32, skip_tokenizer_init=False) as engine:
        yield Sides(request.param, engine, routed, router, info, load_tokenizer(str(folder)))


def test_features_are_the_servers(sides: Sides) -> None:
    prompts = [random_prompt(length, seed=length) for length in LENGTHS[sides.name]]
    features = sides.features(prompts)
    for row, prompt in enumerate(prompts):
        pooled = sides.engine.probe(prompt)[0]
        context = [pooled[layer] for layer in sides.info.context_layers]
        served = torch.stack([torch.cat([own, *context]).flatten() for own in pooled])
        torch.testing.assert_close(features[:, row], served, rtol=0, atol=1e-4)


@pytest.mark.parametrize("threshold", [0.5, 0.2])
def test_routes_are_the_servers(sides: Sides, threshold: float) -> None:
    """As requests that are answered, at a threshold that is set while the engine runs."""
    lengths = [n for n in LENGTHS[sides.name] if n > REACH] + [161, 333, 640]
    prompts = [random_prompt(length, seed=7 + length) for length in lengths]
    features = sides.features(prompts)
    p_full = full_probability(sides.router.forward_all(features))
    routes = ThresholdPolicy(sides.router, threshold).decide(features)
    sides.engine.worker.flux_set_threshold(threshold)
    answers = sides.engine.generate(prompts, 2)
    found = torch.tensor([answer.p_full for answer in answers]).T
    torch.testing.assert_close(found, p_full, rtol=0, atol=P_FULL_MARGIN)
    served = torch.tensor([answer.routes for answer in answers]).T
    sure = (p_full - threshold).abs() > P_FULL_MARGIN
    assert sure.float().mean() > 0.9
    assert torch.equal(served[sure], routes[sure].to(served.dtype))
    assert 0 < routes.mean() < 1


def test_chats_are_cut_and_decided_alike(sides: Sides) -> None:
    """The model's chat template goes around the messages on both sides."""
    from vllm import SamplingParams

    words = " ".join(f"w{number}" for number in random_prompt(300, seed=3, vocab_size=508))
    messages = [
        {"role": "user", "content": words},
        {"role": "assistant", "content": "w5 w6"},
        {"role": "user", "content": "w9 w10 w11"},
    ]
    ids = prompt_ids(messages, "", sides.tokenizer, 4096)
    (output,) = sides.engine.llm.chat(
        messages, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
    )
    assert output.prompt_token_ids == ids
    sides.engine.runtime.status()
    decision = sides.engine.runtime.recent[-1]
    p_full = full_probability(sides.router.forward_all(sides.features([ids])))[:, 0]
    torch.testing.assert_close(
        torch.tensor(decision.full_probability), p_full, rtol=0, atol=P_FULL_MARGIN
    )
