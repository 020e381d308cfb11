"""What a real Prometheus says of a real server, against what the requests did.

Oracles: the requests' own token counts, every query and key counted in a loop by DESIGN.md's
definition (exact in prefill, whole blocks in decode), and the server's `/metrics` for the number of
SPARSE layers of each request. The dashboard's and the rules' expressions come from their files.
"""

import json
import math
import re
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest
import yaml

import flux_vllm
from demo.server import Server
from tests.helpers.metrics import parse, total
from tests.helpers.prometheus import DEPLOY, Prometheus

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

ROUTER = Path(flux_vllm.__file__).parent / "data" / "smollm2-135m-instruct"
LAYERS, SINK, WINDOW, TAIL = 30, 64, 512, 128
EVERYTHING = "10m"
"""A window from before the first request to now."""


@dataclass
class Request:
    """What one request was, by the API's answer and the server's counters."""

    prompt_tokens: int
    generated_tokens: int
    sparse_layers: int


def arguments(model: Path, name: str) -> list[str]:
    flux = json.dumps({"flux": {"router": str(ROUTER)}})
    return [
        *(str(model), "--attention-backend", "flux", "--additional-config", flux),
        *("--enforce-eager", "--served-model-name", name, "--max-model-len", "3072"),
        *("--kv-cache-memory-bytes", str(512 << 20), "--max-num-batched-tokens", "3072"),
        "--no-enable-prefix-caching",
    ]


def ask(url: str, words: int, tokens: int) -> Request:
    """Ask one thing; it is alone on the server, so each prompt is one chunk."""

    def sparse() -> float:
        samples = parse(httpx.get(f"{url}/metrics", timeout=30).text)
        return total(samples, "flux_route_decisions_total", route="sparse")

    before = sparse()
    text = " ".join(f"word{number % 97}" for number in range(words))
    body = {"model": "sample", "prompt": text, "max_tokens": tokens, "ignore_eos": True}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300).raise_for_status().json()
    usage = answer["usage"]
    return Request(usage["prompt_tokens"], usage["completion_tokens"], int(sparse() - before))


def routed(requests: list[Request]) -> list[Request]:
    """Pick those whose context outgrew sinks and window; the last token is never computed."""
    return [r for r in requests if r.prompt_tokens + r.generated_tokens - 1 > SINK + WINDOW]


def keys(position: int, block: int | None) -> int:
    """Count the keys a SPARSE layer reads for one query; by whole blocks in decode."""
    oldest = position - WINDOW + 1
    if block is None:
        return sum(key < SINK or key >= oldest for key in range(position + 1))
    first, last = (SINK - 1) // block, max(oldest, 0) // block
    return sum(key // block <= first or key // block >= last for key in range(position + 1))


def saved(requests: list[Request], phase: str, block: int) -> float:
    """Compute the share of full attention's reading that was saved."""
    attended = context = 0
    for request in requests:
        end = request.prompt_tokens
        # The first token comes out of the prefill, the last one is never computed.
        decode = range(end, end + request.generated_tokens - 1)
        for position in range(end) if phase == "prefill" else decode:
            if phase == "decode":
                sparse = keys(position, block)
            else:
                sparse = keys(position, None) if position < end - TAIL else position + 1
            full_layers = LAYERS - request.sparse_layers
            attended += request.sparse_layers * sparse + full_layers * (position + 1)
            context += LAYERS * (position + 1)
    return 1 - attended / context


@pytest.fixture(scope="module")
def server(sample_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    if shutil.which("prometheus") is None:
        pytest.skip("needs Prometheus: run tools/install_test_services.sh")
    log = tmp_path_factory.mktemp("server") / "log"
    with Server(arguments(sample_model, "sample"), log) as running:
        yield running.url


@pytest.fixture(scope="module")
def prometheus(server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with Prometheus(tmp_path_factory.mktemp("prometheus"), [server]) as running:
        yield running


@pytest.fixture(scope="module")
def requests(server: str, prometheus: Prometheus) -> list[Request]:
    """Ask, and wait until Prometheus has seen it all."""
    done = [ask(server, *size) for size in ((2, 5), (150, 20), (300, 40), (600, 30), (600, 2))]
    settled = f"sum(flux_route_decisions_total) == {LAYERS * len(routed(done))}"
    prometheus.wait(lambda: prometheus.query(settled), "all decisions")
    # Another scrape for the last decode step, and an evaluation of the rules over it.
    prometheus.wait(lambda: prometheus.query("vllm:num_requests_running == 0"), "an idle server")
    now = time.time()
    prometheus.wait(lambda: prometheus.value("timestamp(up)") > now + 2, "two more scrapes")
    return done


def selected(expression: str) -> str:
    """Fill in Grafana's variables as its defaults would."""
    for name in ("$__rate_interval", "$__range"):
        expression = expression.replace(name, EVERYTHING)
    return expression.replace("$model", ".+").replace("$instance", ".+")


def panels() -> dict[str, list[str]]:
    """Give the dashboard's expressions by the panel's title."""
    board = json.loads((DEPLOY / "grafana" / "dashboards" / "flux.json").read_text())
    return {
        panel["title"]: [target["expr"] for target in panel["targets"]]
        for panel in board["panels"]
        if panel["type"] != "row"
    }


def test_decisions_are_requests_times_layers(requests, prometheus):
    assert prometheus.value("sum(flux_route_decisions_total)") == len(routed(requests)) * LAYERS
    by_layer = prometheus.query("sum by (layer) (flux_route_decisions_total)")
    assert {labels["layer"]: count for labels, count in by_layer} == {
        str(layer): len(routed(requests)) for layer in range(LAYERS)
    }
    sparse = sum(request.sparse_layers for request in requests)
    assert 0 < sparse < len(routed(requests)) * LAYERS
    (share,) = panels()["Share of SPARSE route decisions"]
    assert prometheus.value(selected(share)) == pytest.approx(
        sparse / len(routed(requests)) / LAYERS
    )
    ratios = "flux_request_sparse_layers_ratio"
    assert prometheus.value(f"{ratios}_count") == len(routed(requests))
    assert prometheus.value(f"{ratios}_sum") == pytest.approx(sparse / LAYERS)


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_saving_is_that_of_the_lengths(requests, prometheus, phase):
    ((cache, _),) = prometheus.query("vllm:cache_config_info")
    expected = saved(requests, phase, int(cache["block_size"]))
    assert expected > 0.1
    (expression,) = panels()["KV reading saved, of what full attention reads"]
    found = {labels["phase"]: v for labels, v in prometheus.query(selected(expression))}
    # Not exactly: Prometheus extrapolates both rates to the window's ends.
    assert found[phase] == pytest.approx(expected, rel=1e-9)
    name = "instance_model_phase:flux_saved_reading:ratio_rate15m"
    assert prometheus.value(f'{name}{{phase="{phase}"}}') == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("title", panels())
def test_panel_has_data(requests, prometheus, title):
    for expression in panels()[title]:
        samples = prometheus.query(selected(expression))
        # This server serves without `free_kv`; Prometheus has read the expression all the same.
        assert bool(samples) != ("flux_kv_" in expression or "_kv_bytes" in expression), expression
        assert all(math.isfinite(value) for _, value in samples), (expression, samples)
    if title.startswith("Should be 0"):
        assert all(value == 0 for _, value in samples)


def test_dashboard_variables_have_values(requests, prometheus, server):
    ((labels, _),) = prometheus.query("flux_router_info")
    assert labels["model_name"] == "sample"
    assert labels["instance"] == server.split("//")[1]


def test_rules_are_evaluated_and_nothing_fires(requests, prometheus):
    rules = prometheus.rules()
    written = yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    assert len(rules) == sum(len(group["rules"]) for group in written)
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    assert prometheus.query("ALERTS") == []


RULES = [
    rule
    for group in yaml.safe_load((DEPLOY / "prometheus" / "rules.yaml").read_text())["groups"]
    for rule in group["rules"]
]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.get("record") or rule["alert"])
def test_rule_has_data(requests, prometheus, rule):
    """An alert's expression is empty while all is well: without its bounds it is not."""
    if "record" in rule:
        assert prometheus.query(rule["record"])
        return
    unbounded = re.sub(r"(==|>=|<=|>|<)\s*[\d.]+", "", rule["expr"])
    assert unbounded != rule["expr"]
    assert prometheus.query(unbounded), unbounded


@pytest.mark.long
def test_second_server_is_apart_and_its_death_changes_nothing(
    requests, prometheus, server, sample_model, tmp_path, monkeypatch
):
    """Started by a process that names a folder of counters of its own, as one with an engine."""
    monkeypatch.setenv("FLUX_METRICS_DIR", str(tmp_path))
    before = parse(httpx.get(f"{server}/metrics").text)
    with Server(arguments(sample_model, "sample"), tmp_path / "log") as second:
        fresh = parse(second.get("/metrics"))
        assert total(fresh, "flux_route_decisions_total") == 0
        ask(second.url, 600, 2)
        counted = parse(second.get("/metrics"))
        assert total(counted, "flux_route_decisions_total") == LAYERS
        engine = _engine_of(second)
        engine.send_signal(signal.SIGKILL)
        engine.wait(timeout=20)
        try:
            dead = parse(second.get("/metrics"))
        except OSError:
            dead = {}  # vLLM ends a server whose engine is gone
        assert dead in ({}, counted)
    assert parse(httpx.get(f"{server}/metrics").text) == before
    assert list(tmp_path.glob("*.db")) == []


def _engine_of(running: Server) -> psutil.Process:
    """Find the process with the model: the largest of the server's children."""
    assert running._process is not None
    children = psutil.Process(running._process.pid).children(recursive=True)
    assert children
    return max(children, key=lambda process: process.memory_info().rss)
