"""Data parallel 2 on the CPU: two engines behind one port, each with a runtime of its own.

Oracle: tests/helpers/reference.py with its own router, from the prompts alone: answers, and the
decisions that both engines' counters must sum to.
"""

import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from demo.server import Server
from tests.e2e.conftest import SINK_TOKENS, WINDOW_TOKENS
from tests.helpers.metrics import Samples, parse, total
from tests.helpers.models import random_prompt
from tests.helpers.reference import SparsePattern
from tests.helpers.replay import P_FULL_MARGIN

pytestmark = [pytest.mark.vllm, pytest.mark.slow, pytest.mark.long]

OUTPUT, BLOCK_SIZE = 8, 32
LENGTHS = [17, 40, 100, 250, 333, 410, 500, 640]
METRICS_SECONDS = 20
ROUTE_NAMES = ("sparse", "full")


@pytest.fixture(scope="module")
def server(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The tiny model in two engines; a step of either holds all prompts in one chunk each."""
    arguments = [
        *(str(tiny_model), "--attention-backend", "flux", "--data-parallel-size", "2"),
        # A second front end is another process to wait for.
        *("--api-server-count", "1", "--skip-tokenizer-init", "--enforce-eager"),
        *("--served-model-name", "tiny", "--dtype", "float32", "--block-size", str(BLOCK_SIZE)),
        *("--max-model-len", "1024", "--max-num-batched-tokens", "4096"),
        *("--kv-cache-memory-bytes", str(64 << 20), "--no-enable-prefix-caching"),
    ]
    with Server(arguments, tmp_path_factory.mktemp("data-parallel") / "log") as running:
        yield running.url


def _ask(url: str, prompt: list[int]) -> list[int]:
    """Return the tokens of one greedy answer."""
    body = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": OUTPUT,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=120)
    assert response.status_code == 200, response.text
    tokens: list[int] = response.json()["choices"][0]["token_ids"]
    return tokens


def _answered_by_engine(text: str) -> dict[str, float]:
    """Return vLLM's own count of finished requests, by engine."""
    answered: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "vllm:request_success_total":
                engine = sample.labels["engine"]
                answered[engine] = answered.get(engine, 0) + sample.value
    return answered


def _metrics_of(url: str, requests: int) -> tuple[Samples, str]:
    """Return flux's metrics once they count so many requests, or as they are after a while."""
    end = time.monotonic() + METRICS_SECONDS
    while True:
        text = httpx.get(f"{url}/metrics", timeout=30).text
        samples = parse(text)
        counted = total(samples, "flux_request_sparse_layers_ratio_count")
        if counted >= requests or time.monotonic() > end:
            return samples, text
        time.sleep(0.2)


def test_two_engines_answer_and_count(server, reference, reference_router):
    prompts = [random_prompt(length, seed=length) for length in LENGTHS]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: _ask(server, prompt), prompts))
    pattern = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
    decisions: Counter[tuple[int, int]] = Counter()
    routed = 0
    for prompt, answer in zip(prompts, answers, strict=True):
        request = reference.run(
            prompt, pattern=pattern, router=reference_router, num_decode=OUTPUT, score_prompt=False
        )
        assert answer == request.output_tokens
        if len(prompt) <= SINK_TOKENS + WINDOW_TOKENS:
            continue
        near = (request.p_full - 0.5).abs().min()
        assert near > P_FULL_MARGIN, "choose another prompt: either route may be taken"
        decisions.update(enumerate(request.routes))
        routed += 1
    samples, text = _metrics_of(server, routed)
    answered = _answered_by_engine(text)
    assert len(answered) == 2
    assert min(answered.values()) > 0, f"one engine answered them all: {answered}"
    assert total(samples, "flux_request_sparse_layers_ratio_count") == routed
    for (layer, route), count in decisions.items():
        labels = {"layer": str(layer), "route": ROUTE_NAMES[route]}
        assert total(samples, "flux_route_decisions_total", **labels) == count
    assert total(samples, "flux_route_decisions_total") == decisions.total()
    assert total(samples, "flux_unrouted_rows_total") == 0
