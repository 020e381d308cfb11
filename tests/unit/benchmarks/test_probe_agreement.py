"""Agreement of a probe with the whole prompt: requests, pooling, shares.

Oracle: for a prompt that a probe takes whole, both views are one forward of the same tokens; the
reference router over transformers' own queries for longer ones; shares counted by hand.
"""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks import probe_agreement
from benchmarks.probe_agreement import KINDS, Comparison, make_request, routes_both_ways
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import Route
from tests.helpers.models import random_prompt, write_random_router, write_tiny_llama
from tests.helpers.reference import FULL, ReferenceModel, ReferenceRouter
from training.attach import RoutedModel

SPARSE = int(Route.SPARSE)


def _tokens(text: str) -> int:
    return -(-len(text) // 4)


def test_requests_of_a_number_share_text_and_fact() -> None:
    requests = {kind.name: make_request(kind, 3, 600, _tokens) for kind in KINDS}
    fact = next(line for line in requests["nothing asked"].splitlines() if "access code" in line)
    assert all(fact in text for text in requests.values())
    assert all("What is" in text for name, text in requests.items() if name != "nothing asked")
    for tokens in (200, 400):
        last, first = requests[f"{tokens} tokens last"], requests[f"{tokens} tokens first"]
        assert tokens - 20 < _tokens(last[last.index("What is") :]) <= tokens
        assert tokens - 20 < _tokens(first.split("\n\n")[0]) <= tokens
    middle = requests["question in the middle"]
    assert 0.2 < middle.index("What is") / len(middle) < 0.8


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = write_tiny_llama(tmp_path_factory.mktemp("tiny"), layers=3, heads=4, head_dim=16)
    write_random_router(
        folder,
        num_layers=3,
        head_dim=16,
        model_folder=folder,
        pools=("tail:8", "head:16", "ends:24"),
        probe=(40, 30),
        context_layers=(2,),
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return folder, RoutedModel(model, 32, 128), *read_router(folder)


def test_short_prompts_are_seen_alike(tiny) -> None:
    _, model, router, info = tiny
    for length in (1, 30, 70):
        prompt = np.array(random_prompt(length, seed=length))
        probe, whole = routes_both_ways(model, router, info, 0.5, prompt)
        assert probe.tolist() == whole.tolist()


def test_routes_of_both_views_are_the_references(tiny) -> None:
    folder, model, router, info = tiny
    reference, raw = ReferenceModel(folder), ReferenceRouter.load(folder)
    seeing_all = ReferenceRouter(raw.tensors, raw.metadata | {"probe": "[1000, 1000]"})
    differ = 0
    for length in (200, 300, 500):
        prompt = random_prompt(length, seed=length)
        found = routes_both_ways(model, router, info, 0.5, np.array(prompt))
        for routes, view in zip(found, (raw, seeing_all), strict=True):
            p_full = view.p_full(reference, prompt)
            assert ((p_full - 0.5).abs() > 1e-3).all(), "the routes are near ties"
            assert routes.tolist() == (p_full >= 0.5).int().tolist()
        differ += (found[0] != found[1]).any()
    assert differ, "both views decide alike, so the comparison shows nothing"


def test_shares() -> None:
    found = Comparison()
    found.add(np.array([FULL, SPARSE, SPARSE, FULL]), np.array([FULL, FULL, SPARSE, SPARSE]))
    found.add(np.array([SPARSE] * 4), np.array([SPARSE] * 4))
    row = found.row()
    assert row["agreement_of_prompts"] == [0.5, 1.0]
    assert (row["full_lost"], row["sparse_probe"], row["sparse_whole"]) == (0.5, 0.75, 0.75)
    only_sparse = Comparison()
    only_sparse.add(np.array([SPARSE]), np.array([SPARSE]))
    assert only_sparse.row()["full_lost"] is None
    assert "FULL lost none" in str(only_sparse)


def test_command_line_has_defaults() -> None:
    args = probe_agreement._parse(["--model", "M", "--out", "O"])
    assert (args.prompts, args.tokens, args.threshold, args.router) == (20, 4096, 0.5, None)
