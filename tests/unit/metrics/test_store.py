"""Counters in files: what a scrape shows is what was added, over processes and restarts.

Oracle: sums kept by hand, read back from the text that `/metrics` would send by prometheus_client's
own parser. Pinned: counters only go up; a worker that starts again on an existing file continues.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flux_vllm.metrics import store as store_module
from flux_vllm.metrics.directory import FluxCollector
from flux_vllm.metrics.store import MetricStore

BUCKETS = (0.0, 0.5, 1.0)
Samples = dict[tuple[str, frozenset], float]


def scrape(directory: Path) -> Samples:
    registry = CollectorRegistry()
    registry.register(FluxCollector(str(directory)))
    text = generate_latest(registry).decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def key(name: str, **labels: str) -> tuple[str, frozenset]:
    return name, frozenset(labels.items())


@pytest.fixture
def as_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda pid: monkeypatch.setattr(store_module.os, "getpid", lambda: pid)


def test_counter(tmp_path: Path) -> None:
    store = MetricStore(tmp_path, {"model_name": "m"})
    seen = []
    for amount in (0, 3, 0, 2.5):
        store.add("flux_things", amount, "Things.", layer="7")
        seen.append(scrape(tmp_path)[key("flux_things_total", model_name="m", layer="7")])
    assert seen == [0, 3, 3, 5.5]
    assert len(scrape(tmp_path)) == 1


def test_labels_are_apart(tmp_path: Path) -> None:
    store = MetricStore(tmp_path, {"model_name": 'a"\\\nb'})
    store.add("flux_things", 1, "Things.", route="full")
    store.add("flux_things", 2, "Things.", route="sparse")
    found = scrape(tmp_path)
    assert found[key("flux_things_total", model_name='a"\\\nb', route="full")] == 1
    assert found[key("flux_things_total", model_name='a"\\\nb', route="sparse")] == 2


def test_text_form(tmp_path: Path) -> None:
    store = MetricStore(tmp_path, {"model_name": "m"})
    store.add("flux_things", 1, "Things that happened.")
    store.observe("flux_share", 0.25, BUCKETS, "A share.")
    store.set("flux_info", 1, "Information.", policy="full")
    registry = CollectorRegistry()
    registry.register(FluxCollector(str(tmp_path)))
    text = generate_latest(registry).decode()
    for line in (
        "# HELP flux_things_total Things that happened.",
        "# TYPE flux_things_total counter",
        "# TYPE flux_share histogram",
        "# TYPE flux_info gauge",
        'flux_things_total{model_name="m"} 1.0',
        'flux_share_bucket{le="0.5",model_name="m"} 1.0',
        'flux_share_count{model_name="m"} 1.0',
        'flux_info{model_name="m",policy="full"} 1.0',
    ):
        assert line in text.splitlines(), text
    assert "pid=" not in text


def test_histogram(tmp_path: Path) -> None:
    store = MetricStore(tmp_path, {"model_name": "m"})
    values = [0.0, 0.0, 0.2, 0.5, 0.51, 1.0, 7.0]
    for value in values:
        store.observe("flux_share", value, BUCKETS, "A share.")
    found = scrape(tmp_path)
    for edge in (*BUCKETS, float("inf")):
        label = "+Inf" if edge == float("inf") else str(edge)
        expected = sum(value <= edge for value in values)
        assert found[key("flux_share_bucket", model_name="m", le=label)] == expected
    assert found[key("flux_share_count", model_name="m")] == len(values)
    assert found[key("flux_share_sum", model_name="m")] == pytest.approx(sum(values))


def test_gauge_is_set(tmp_path: Path) -> None:
    store = MetricStore(tmp_path, {"model_name": "m"})
    for value in (4, 1):
        store.set("flux_info", value, "Information.")
    assert scrape(tmp_path) == {key("flux_info", model_name="m"): 1}


def test_workers_sum(tmp_path: Path, as_process: Callable[[int], None]) -> None:
    for pid, amount in ((101, 1), (102, 10), (103, 100)):
        as_process(pid)
        store = MetricStore(tmp_path, {"model_name": "m"})
        store.add("flux_things", amount, "Things.")
        store.observe("flux_share", 0.5, BUCKETS, "A share.")
        store.set("flux_info", 1, "Information.")
    found = scrape(tmp_path)
    assert found[key("flux_things_total", model_name="m")] == 111
    assert found[key("flux_share_count", model_name="m")] == 3
    assert found[key("flux_info", model_name="m")] == 1  # not summed over workers


def test_models_are_apart(tmp_path: Path, as_process: Callable[[int], None]) -> None:
    for pid, model in ((101, "a"), (102, "b")):
        as_process(pid)
        MetricStore(tmp_path, {"model_name": model}).add("flux_things", pid, "Things.")
    found = scrape(tmp_path)
    assert found[key("flux_things_total", model_name="a")] == 101
    assert found[key("flux_things_total", model_name="b")] == 102


def test_two_engines_in_one_process(tmp_path: Path) -> None:
    """Both count, and neither overwrites the other's file."""
    stores = [MetricStore(tmp_path, {"model_name": "m"}) for _ in range(2)]
    for expected in (1, 2, 3, 4):
        stores[expected % 2].add("flux_things", 1, "Things.")
        assert scrape(tmp_path)[key("flux_things_total", model_name="m")] == expected


@pytest.mark.parametrize("place", ["same-file", "new-file"])
def test_restarted_worker_continues(
    tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A later engine of this process, or a worker that got a dead one's process id."""
    for expected in (5, 10, 15):
        if place == "same-file":
            monkeypatch.setattr(store_module, "_stores", itertools.count())
            store = None  # the former worker lets go of its files
        store = MetricStore(tmp_path, {"model_name": "m"})
        store.add("flux_things", 0, "Things.")
        assert scrape(tmp_path)[key("flux_things_total", model_name="m")] == expected - 5
        store.add("flux_things", 5, "Things.")
        assert scrape(tmp_path)[key("flux_things_total", model_name="m")] == expected


def test_files_of_a_killed_process_are_read(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from flux_vllm.metrics.store import MetricStore\n"
        "store = MetricStore(Path(sys.argv[1]), {'model_name': 'm'})\n"
        "for _ in range(1000):\n"
        "    store.add('flux_things', 2, 'Things.')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert done.returncode == -9
    MetricStore(tmp_path, {"model_name": "m"}).add("flux_things", 1, "Things.")
    assert scrape(tmp_path)[key("flux_things_total", model_name="m")] == 2001


def test_many_series(tmp_path: Path) -> None:
    """More than the file's first megabyte holds."""
    store = MetricStore(tmp_path, {"model_name": "m" * 400})
    for layer in range(3000):
        store.add("flux_things", layer, "Things.", layer=str(layer))
    (counters,) = tmp_path.glob("counter_*.db")
    assert counters.stat().st_size > 1 << 20
    found = scrape(tmp_path)
    assert len(found) == 3000
    assert found[key("flux_things_total", model_name="m" * 400, layer="2999")] == 2999


def test_scrape_is_cheap(tmp_path: Path, as_process: Callable[[int], None]) -> None:
    """A large model's worker: under 5 ms of processor time, in the median."""
    as_process(101)
    store = MetricStore(tmp_path, {"model_name": "org/Model-70B-Instruct"})
    for layer in range(80):
        for route in ("full", "sparse"):
            store.add("flux_route_decisions", 5, "Routes.", layer=str(layer), route=route)
    store.observe("flux_request_sparse_layers_ratio", 0.3, (0.1, 0.2, 0.5, 1.0), "Share.")
    registry = CollectorRegistry()
    registry.register(FluxCollector(str(tmp_path)))
    times = []
    for _ in range(20):
        start = time.process_time()
        generate_latest(registry)
        times.append(time.process_time() - start)
    assert statistics.median(times) < 0.005
