"""What training makes of a served model's files, held to the server's numbers and to a reference.

Oracles: the server's own features, P(FULL) and routes, of the same files and prompts;
tests/helpers/whole_reference.py for what routes make of logits.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import full_probability
from tests.helpers.engine import Answer, Engine
from tests.helpers.models import random_prompt
from tests.helpers.reference import SPARSE, SparsePattern
from tests.helpers.whole_reference import WholeModel
from training.attach import RoutedModel
from training.config import SystemSettings
from training.costs import train as costs_train
from training.costs.measurements import join, read_folder
from training.distributed import World
from training.model_loading import load_routed
from training.policies import ThresholdPolicy
from training.probe import collate_probes
from training.recipes import tiny
from training.trainer import train

_FEATURES = {"float32": 1e-3, "bfloat16": 0.15}
"""Largest error of a feature, of numbers around 1: rounding is the server's."""
_P_FULL = {"float32": 1e-3, "bfloat16": 0.1}


def write_tokenizer(folder: Path) -> None:
    """Write a tokenizer of 512 words, and a chat template, beside a model."""
    words = ["<unk>", "system", "user", "assistant", *(f"w{number}" for number in range(508))]
    tokenizer = Tokenizer(models.WordLevel({w: at for at, w in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.chat_template = (
        "system w7 w8 {% for message in messages %}{{ message.role }} {{ message.content }} "
        "{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
    )
    fast.save_pretrained(folder)


def load_for_training(folder: Path, sink_tokens: int, window_tokens: int) -> RoutedModel:
    """Load a model in float32, with what training hangs on it."""
    system = SystemSettings(device="cpu", dtype="float32")
    world = World(0, 1, torch.device("cpu"))
    return load_routed(str(folder), sink_tokens, window_tokens, system, world)


def check_training_decides_alike(
    engine: Engine,
    answers: Sequence[Answer],
    folder: Path,
    router_file: Path,
    layers: Sequence[int],
    dtype: str = "float32",
) -> None:
    """Check features, P(FULL) and routes that training computes against a running server's.

    Args:
        engine: with policy `router`.
        answers: of it.
        folder: of the model, its weights as they are meant.
        router_file: that the engine serves.
        layers: that have a route.
        dtype: of the server.
    """
    router, info = read_router(router_file)
    routed = load_for_training(folder, info.sink_tokens, info.window_tokens)
    assert list(routed.layers.numbers) == list(layers)
    narrow, inputs = routed.layers.narrow(router, info)
    # The longest prompts are several times there, in chunks and cached.
    found = {tuple(answer.prompt): answer for answer in answers if answer.routes is not None}
    prompts = [np.array(prompt, dtype=np.int32) for prompt in found]
    features = routed.probe(collate_probes(prompts, inputs), inputs)
    p_full = full_probability(narrow.forward_all(features))
    routes = ThresholdPolicy(narrow, 0.5).decide(features)
    margin, sure = _P_FULL[dtype], (p_full - 0.5).abs() > _P_FULL[dtype]
    for row, (prompt, answer) in enumerate(found.items()):
        served = engine.probe(prompt)[0][list(layers)].flatten(1)
        torch.testing.assert_close(features[:, row], served, rtol=0, atol=_FEATURES[dtype])
        assert answer.p_full is not None
        assert answer.routes is not None
        for place, layer in enumerate(layers):
            assert abs(answer.p_full[layer] - p_full[place, row].item()) < margin
            assert not sure[place, row] or answer.routes[layer] == routes[place, row]
    assert len(found) > 1
    assert sure.any()


def check_training_runs(
    folder: Path,
    reference: WholeModel,
    layers: Sequence[int],
    sparse: Sequence[int],
    pattern: SparsePattern,
) -> None:
    """Check what routes make of logits, and a whole run of the default objective.

    Args:
        folder: of the model, its weights as they are meant; a tokenizer is written there.
        reference: of its text model.
        layers: that have a route.
        sparse: layers to make SPARSE.
        pattern: what that means.
    """
    routed = load_for_training(folder, pattern.sink_tokens, pattern.window_tokens)
    prompt = random_prompt(300, seed=1)
    given = [SPARSE if n in sparse else 1 - SPARSE for n in range(reference.num_layers)]
    routes = torch.tensor([float(given[n] != SPARSE) for n in layers])[:, None]
    with torch.no_grad():
        hidden = routed.forward(torch.tensor([prompt]), routes)
        logprobs = routed.logits(hidden)[0].log_softmax(dim=-1)
    expected = reference.logprobs(prompt, len(prompt), pattern, given)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-3)
    full = reference.logprobs(prompt, len(prompt), pattern, reference.full_routes())
    assert (expected - full).abs().max() > 0.05, "the routes make no difference"
    _check_a_run(folder, layers)


def _check_a_run(folder: Path, layers: Sequence[int]) -> None:
    write_tokenizer(folder)
    out = folder / "trained"
    out.mkdir()
    lines = [_line(seed) for seed in range(12)]
    (out / "answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    config: Any = tiny(str(folder), str(out))
    config = dataclasses.replace(
        config, data=dataclasses.replace(config.data, files=(str(out / "answers.jsonl"),))
    )
    # Not as AutoTokenizer would, which takes some families' words apart in their own way.
    with patch.object(costs_train, "load_tokenizer", PreTrainedTokenizerFast.from_pretrained):
        _check_file(train(config), layers)
    measured = join(read_folder(out / "measurements"))
    assert measured.pooled.shape[1] == len(layers)
    assert (measured.nats[:, 0] > 0).all()
    assert (np.nanmax(np.abs(measured.slopes[:, 1]), axis=0) > 0).all(), "a layer costs nothing"


def _check_file(router_file: Path, layers: Sequence[int]) -> None:
    """Check that a router file counts all layers, and has routers for those that have a route."""
    router, info = read_router(router_file)
    weight = router.linear("head.4")[0]
    assert [n for n in range(info.num_layers) if weight[n].any()] == list(layers)
    assert set(info.context_layers) <= set(layers)
    assert sorted(info.freeing_order) == [*range(info.num_layers)]


def _line(seed: int) -> dict[str, str]:
    ids = random_prompt(100 + 7 * seed, seed, vocab_size=508)
    words = [f"w{number}" for number in ids]
    return {"prompt": " ".join(words), "answer": " ".join(words[:4])}
