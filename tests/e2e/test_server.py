"""A real server in processes of its own: `flux-vllm serve`, the OpenAI API, `/metrics`.

What only shows here: the configuration's way into spawned processes, counters' way out of them,
clients that hang up, and what an operator reads when the configuration is wrong.
"""

import asyncio
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import AsyncOpenAI, OpenAI

from demo.server import Server
from tests.helpers.metrics import parse, total
from tests.helpers.models import write_random_router, write_tiny_llama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

SPARSE_LAYERS = [0, 1, 2, 3, 4, 5]
NUM_LAYERS = 30
SECONDS = 30  # of processor time until a mistake is told, imports included
FLUX = '{"flux": {"policy": "static", "sparse_layers": [0, 1, 2, 3, 4, 5], %s}}'
# The pattern too: else it is that of the router beside the model.
SETTINGS = '"sparse_pattern": "streaming", "sink_tokens": 16, "window_tokens": 64'


def _arguments(model: Path, flux: str) -> list[str]:
    return [
        *(str(model), "--attention-backend", "Flux", "--additional-config", flux),
        *("--enforce-eager", "--served-model-name", "sample", "--max-model-len", "2048"),
        *("--kv-cache-memory-bytes", str(256 << 20), "--max-num-batched-tokens", "512"),
    ]


@pytest.fixture(scope="module")
def server(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The sample model behind a port, under a static policy."""
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(_arguments(sample_model, FLUX % SETTINGS), log) as running:
        yield running.url


def _metrics(url: str):
    return parse(httpx.get(f"{url}/metrics", timeout=30).text)


def test_chat_and_metrics(server):
    before = _metrics(server)
    assert total(before, "flux_router_info", policy="static", model_name="sample") == 1
    client = OpenAI(base_url=f"{server}/v1", api_key="none")
    long_text = "The quick brown fox jumps over the lazy dog. " * 60
    stream = client.chat.completions.create(
        model="sample",
        messages=[{"role": "user", "content": f"{long_text}\nWhat does the fox do?"}],
        temperature=0,
        max_tokens=40,
        stream=True,
    )
    answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices)
    assert "jump" in answer.lower()
    after = _metrics(server)

    def gained(name: str, **labels: str) -> float:
        return total(after, name, **labels) - total(before, name, **labels)

    for layer in range(NUM_LAYERS):
        route = "sparse" if layer in SPARSE_LAYERS else "full"
        assert gained("flux_route_decisions_total", layer=str(layer), route=route) == 1
    assert gained("flux_route_decisions_total") == NUM_LAYERS
    for phase in ("prefill", "decode"):
        attended = gained("flux_attended_tokens_total", phase=phase)
        context = gained("flux_context_tokens_total", phase=phase)
        share_of_sparse = len(SPARSE_LAYERS) / NUM_LAYERS
        assert 1 - share_of_sparse < attended / context < 1
    assert total(after, "flux_unrouted_rows_total") == 0


def test_two_hundred_clients_some_hang_up(server):
    before = _metrics(server)

    async def ask(client: AsyncOpenAI, number: int, limit: asyncio.Semaphore) -> str:
        async with limit:
            stream = await client.completions.create(
                model="sample",
                prompt=f"Number {number}: " + "one two three " * (number % 37),
                max_tokens=8,
                temperature=0,
                stream=True,
            )
            if number % 3 == 0:
                await stream.close()  # the client hangs up: vLLM aborts the request
                return "aborted"
            async for _ in stream:
                pass
            return "done"

    async def ask_all() -> list[str]:
        limit = asyncio.Semaphore(64)
        async with AsyncOpenAI(base_url=f"{server}/v1", api_key="none", timeout=300) as client:
            return await asyncio.gather(*(ask(client, n, limit) for n in range(200)))

    outcomes = asyncio.run(ask_all())
    after = _metrics(server)
    requests = total(after, "flux_request_sparse_layers_ratio_count") - total(
        before, "flux_request_sparse_layers_ratio_count"
    )
    decisions = total(after, "flux_route_decisions_total") - total(
        before, "flux_route_decisions_total"
    )
    assert outcomes.count("done") <= requests <= len(outcomes)
    assert decisions == requests * NUM_LAYERS
    assert total(after, "flux_unrouted_rows_total") == 0


def _truncated_router(folder: Path) -> None:
    router = write_random_router(folder, num_layers=2, head_dim=32)
    router.write_bytes(router.read_bytes()[:-1000])


@pytest.mark.parametrize(
    ("spoil", "flux", "message"),
    [
        pytest.param(
            None,
            '{"windw_tokens": 64}',
            "flux config: expected keys among ",
            marks=pytest.mark.long,
        ),
        (None, "{}", "expected a router at FOLDER/flux/flux_router.safetensors, found nothing "),
        pytest.param(
            _truncated_router,
            "{}",
            "FOLDER/flux_router.safetensors: expected a safetensors file, found one that cannot ",
            marks=pytest.mark.long,
        ),
    ],
    ids=["unknown-key", "no-router", "truncated"],
)
def test_mistakes_end_the_process_at_once(tmp_path, spoil, flux, message):
    """What stands last on stderr is the message, with no traceback around it."""
    write_tiny_llama(tmp_path, layers=2)
    if spoil is not None:
        spoil(tmp_path)
    arguments = [*_arguments(tmp_path, f'{{"flux": {flux}}}'), "--skip-tokenizer-init"]
    command = [sys.executable, "-m", "flux_vllm.cli", "serve", *arguments]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 1
    expected = f"flux-vllm serve: error: {message.replace('FOLDER', str(tmp_path))}"
    assert result.stderr.splitlines()[-1].startswith(expected)
    assert "Traceback" not in result.stdout + result.stderr
    # No model was loaded to find that out.
    assert "Starting to load model" not in result.stdout + result.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < SECONDS
