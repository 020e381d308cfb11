"""The numbers that operators see, against counting every query and every key.

Oracle: loops over rows, layers, queries and keys, deciding for each pair by docs/CONFIGURATION.md,
whether it is attended: exactly in prefill, edges widened to whole blocks in decode, and (several
queries in a decode row) the first query's window for all of them. Read from the text of a scrape.
"""

import random
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from flux_vllm.batch import Batch
from flux_vllm.metrics.directory import FluxCollector
from flux_vllm.metrics.reporter import FLUSH_SECONDS, RATIO_BUCKETS, RouteReporter
from flux_vllm.metrics.store import MetricStore
from flux_vllm.patterns import make_pattern
from flux_vllm.patterns.keys import full_keys, sparse_decode_keys, sparse_prefill_keys
from flux_vllm.routing.decode_counts import DecodeKeys

OPEN, SPARSE, FULL = -1, 0, 1
LAYERS = (0, 2, 3)  # layer 1 has a sliding window of its own
PATTERNS = [(0, 1, 16), (4, 7, 16), (32, 128, 32), (33, 31, 16), (20, 24, 128), (100, 1, 32)]
PATTERN_IDS = [f"S{s}-W{w}-B{b}" for s, w, b in PATTERNS]

Row = tuple[int, int, int]  # computed, scheduled, prompt_len


def count_keys(row: Row, route: int, pattern: tuple[int, int, int]) -> int:
    """Count the keys that one row's queries attend to in one layer."""
    sink, window, block = pattern
    computed, scheduled, prompt = row
    keys = 0
    for query in range(computed, computed + scheduled):
        for key in range(query + 1):
            if computed < prompt:
                sparse = key < sink or key > query - window
            else:
                begin = key // block * block
                sparse = begin < sink or begin + block - 1 > computed - window
            keys += route != SPARSE or sparse
    return keys


def make_step(rows: list[Row], is_warmup: bool = False) -> Batch:
    computed, scheduled, prompt_lens = (
        np.array([row[i] for row in rows], dtype=np.int64) for i in range(3)
    )
    return Batch(
        request_ids=tuple(str(i) for i in range(len(rows))),
        prompt_lens=prompt_lens,
        computed=computed,
        scheduled=scheduled,
        is_prefill=computed < prompt_lens,
        is_warmup=is_warmup,
    )


class Setup:
    """A reporter and its scrape."""

    def __init__(self, folder: Path, pattern: tuple[int, int, int]) -> None:
        sink, window, block = pattern
        self.folder = folder
        self.store = MetricStore(folder, {"model_name": "m"})
        self.reporter = RouteReporter(
            self.store, LAYERS, block, make_pattern("streaming", sink, window)
        )

    def record(
        self, rows: list[Row], routes: list[list[int]], decided: list[bool], **step: bool
    ) -> None:
        self.reporter.record(
            make_step(rows, **step),
            np.array(routes, dtype=np.int8).reshape(len(rows), len(LAYERS)),
            np.array(decided, dtype=bool),
        )
        self.reporter.flush()

    def scrape(self) -> dict[tuple, float]:
        registry = CollectorRegistry()
        registry.register(FluxCollector(str(self.folder)))
        samples = {}
        for family in text_string_to_metric_families(generate_latest(registry).decode()):
            for sample in family.samples:
                labels = dict(sample.labels)
                assert labels.pop("model_name") == "m"
                samples[sample.name, *sorted(labels.items())] = sample.value
        return samples

    def decisions(self) -> float:
        found = self.scrape().items()
        return sum(value for key, value in found if key[0] == "flux_route_decisions_total")

    def tokens(self, what: str, phase: str) -> float:
        return self.scrape()[f"flux_{what}_tokens_total", ("phase", phase)]


@pytest.fixture(params=PATTERNS, ids=PATTERN_IDS)
def setup(request: pytest.FixtureRequest, tmp_path: Path) -> Setup:
    made = Setup(tmp_path, request.param)
    made.pattern = request.param  # type: ignore[attr-defined]
    return made


@pytest.fixture
def one(tmp_path: Path) -> Setup:
    return Setup(tmp_path, (32, 128, 32))


class TestKeys:
    COMPUTED = np.array([0, 1, 15, 16, 31, 33, 100, 159, 160, 161, 200, 255, 256, 300])

    @pytest.mark.parametrize("scheduled", [0, 1, 2, 17, 60])
    def test_full(self, scheduled: int) -> None:
        found = full_keys(self.COMPUTED, np.full_like(self.COMPUTED, scheduled))
        expected = [sum(range(c + 1, c + scheduled + 1)) for c in self.COMPUTED.tolist()]
        assert found.tolist() == expected

    @pytest.mark.parametrize("scheduled", [0, 1, 2, 17, 60])
    @pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERN_IDS)
    def test_sparse_prefill(self, pattern: tuple[int, int, int], scheduled: int) -> None:
        lens = np.full_like(self.COMPUTED, scheduled)
        found = sparse_prefill_keys(self.COMPUTED, lens, pattern[0] + pattern[1])
        expected = [
            count_keys((c, scheduled, 10**6), SPARSE, pattern) for c in self.COMPUTED.tolist()
        ]
        assert found.tolist() == expected

    @pytest.mark.parametrize("scheduled", [0, 1, 2, 5])
    @pytest.mark.parametrize("pattern", PATTERNS, ids=PATTERN_IDS)
    def test_sparse_decode(self, pattern: tuple[int, int, int], scheduled: int) -> None:
        sink, window, block = pattern
        lens = np.full_like(self.COMPUTED, scheduled)
        found = sparse_decode_keys(self.COMPUTED, lens, block, sink, window)
        expected = [count_keys((c, scheduled, 0), SPARSE, pattern) for c in self.COMPUTED.tolist()]
        assert found.tolist() == expected


class TestRandomSteps:
    def test_every_number(self, setup: Setup) -> None:
        draw = random.Random(5)
        tokens: Counter = Counter()
        decisions: Counter = Counter()
        ratios: list[float] = []
        unrouted = 0
        for _ in range(12):
            rows, routes, decided = [], [], []
            for _ in range(draw.randint(1, 5)):
                computed = draw.choice([0, 0, 16, 40, 130, 250])
                scheduled = draw.choice([1, 1, 2, 30, 90])
                prompt = draw.choice([computed, computed + scheduled, computed + 200])
                is_long = computed + scheduled > sum(setup.pattern[:2])
                choices = [OPEN, SPARSE, FULL]
                layer_routes = [draw.choice(choices) for _ in LAYERS]
                done = OPEN not in layer_routes and draw.random() < 0.5
                rows.append((computed, scheduled, prompt))
                routes.append(layer_routes)
                decided.append(done)
                phase = "prefill" if computed < prompt else "decode"
                for route in layer_routes:
                    tokens["attended", phase] += count_keys(rows[-1], route, setup.pattern)
                    tokens["context", phase] += count_keys(rows[-1], FULL, setup.pattern)
                if done:
                    ratios.append(layer_routes.count(SPARSE) / len(LAYERS))
                    for layer, route in zip(LAYERS, layer_routes, strict=True):
                        decisions[layer, "full" if route == FULL else "sparse"] += 1
                unrouted += is_long and OPEN in layer_routes
            setup.record(rows, routes, decided)
        found = setup.scrape()
        for (what, phase), count in tokens.items():
            assert found[f"flux_{what}_tokens_total", ("phase", phase)] == count
        for layer in LAYERS:
            for route in ("full", "sparse"):
                name = ("flux_route_decisions_total", ("layer", str(layer)), ("route", route))
                assert found[name] == decisions[layer, route]
        assert found[("flux_unrouted_rows_total",)] == unrouted > 0
        assert found[("flux_request_sparse_layers_ratio_count",)] == len(ratios)
        assert found[("flux_request_sparse_layers_ratio_sum",)] == pytest.approx(sum(ratios))
        for edge in RATIO_BUCKETS:
            name = ("flux_request_sparse_layers_ratio_bucket", ("le", str(edge)))
            assert found[name] == sum(ratio <= edge for ratio in ratios)

    def test_counters_only_go_up(self, one: Setup) -> None:
        before = one.scrape()
        for length in (1, 300, 2):
            one.record([(0, length, length)], [[SPARSE, FULL, SPARSE]], [True])
            after = one.scrape()
            assert before.keys() <= after.keys()
            assert all(after[name] >= value for name, value in before.items())
            assert after != before
            before = after


class TestStart:
    def test_everything_is_there_at_zero(self, one: Setup) -> None:
        """A rate over a counter that appears with its first value would miss that value."""
        found = one.scrape()
        assert set(found.values()) == {0.0}
        names = Counter(name for name, *_ in found)
        assert names == {
            "flux_route_decisions_total": 2 * len(LAYERS),
            "flux_attended_tokens_total": 2,
            "flux_context_tokens_total": 2,
            "flux_unrouted_rows_total": 1,
            "flux_nonfinite_router_rows_total": 1,
            "flux_unread_prompts_total": 1,
        }

    def test_info(self, one: Setup) -> None:
        one.reporter.announce(policy="router", threshold="0.5")
        assert one.scrape()["flux_router_info", ("policy", "router"), ("threshold", "0.5")] == 1


class TestWhatCounts:
    def test_prefill_that_depends_on_the_data_does_not(self, tmp_path: Path) -> None:
        """XAttention: SPARSE layers of prompt rows are in neither sum, all else is."""
        setup = Setup(tmp_path, (32, 128, 32))
        setup.reporter = RouteReporter(setup.store, LAYERS, 32, make_pattern("xattention", 32, 128))
        rows: list[Row] = [(100, 300, 400), (600, 1, 500)]
        setup.record(rows, [[SPARSE, FULL, SPARSE], [SPARSE, FULL, FULL]], [False, False])
        prompt, decode = (count_keys(row, FULL, (32, 128, 32)) for row in rows)
        sparse_decode = count_keys(rows[1], SPARSE, (32, 128, 32))
        assert setup.tokens("attended", "prefill") == setup.tokens("context", "prefill") == prompt
        assert setup.tokens("attended", "decode") == 2 * decode + sparse_decode
        assert setup.tokens("context", "decode") == 3 * decode

    def test_an_answers_first_tokens_are_decoded_fully(self, tmp_path: Path) -> None:
        setup = Setup(tmp_path, (32, 128, 32))
        pattern = make_pattern("streaming", 32, 128)
        setup.reporter = RouteReporter(setup.store, LAYERS, 32, pattern, full_decode_tokens=8)
        rows: list[Row] = [(607, 1, 600), (608, 1, 600), (590, 10, 600)]
        setup.record(rows, [[SPARSE] * 3] * 3, [False] * 3)
        last, beyond = (
            count_keys(rows[0], FULL, (0, 0, 1)),
            count_keys(rows[1], SPARSE, (32, 128, 32)),
        )
        assert setup.tokens("attended", "decode") == 3 * (last + beyond)
        assert setup.tokens("attended", "prefill") == 3 * count_keys(rows[2], SPARSE, (32, 128, 32))

    def test_prompts_may_be_sparse_in_every_layer(self, tmp_path: Path) -> None:
        setup = Setup(tmp_path, (32, 128, 32))
        pattern = make_pattern("streaming", 32, 128)
        setup.reporter = RouteReporter(setup.store, LAYERS, 32, pattern, sparse_prefill=True)
        rows: list[Row] = [(100, 300, 600), (650, 1, 600)]
        setup.record(rows, [[SPARSE, FULL, FULL]] * 2, [False] * 2)
        prompt, decode = (count_keys(row, SPARSE, (32, 128, 32)) for row in rows)
        assert setup.tokens("attended", "prefill") == 3 * prompt
        assert setup.tokens("attended", "decode") == decode + 2 * count_keys(
            rows[1], FULL, (0, 0, 1)
        )

    def test_warmup_does_not(self, one: Setup) -> None:
        before = one.scrape()
        one.record([(0, 200, 200)], [[SPARSE] * 3], [True], is_warmup=True)
        assert one.scrape() == before

    def test_empty_step_does_not(self, one: Setup) -> None:
        before = one.scrape()
        one.record([], [], [])
        assert one.scrape() == before

    def test_undecided_prompt_is_not_a_decision(self, one: Setup) -> None:
        one.record([(0, 100, 400)], [[SPARSE] * 3], [False])
        found = one.scrape()
        assert all(v == 0 for k, v in found.items() if k[0] == "flux_route_decisions_total")
        assert one.tokens("context", "prefill") == 3 * 5050

    def test_short_rows_need_no_route(self, one: Setup) -> None:
        """Up to S + W = 160 tokens."""
        one.record([(0, 160, 160), (159, 1, 9)], [[OPEN] * 3] * 2, [False] * 2)
        assert one.scrape()[("flux_unrouted_rows_total",)] == 0
        one.record([(0, 161, 161), (160, 1, 9)], [[OPEN] * 3] * 2, [False] * 2)
        one.reporter.flush()
        assert one.scrape()[("flux_unrouted_rows_total",)] == 2

    def test_one_unrouted_row_counts_once(self, one: Setup) -> None:
        """Rows, not layers."""
        one.record([(500, 1, 400), (9, 1, 4)], [[OPEN] * 3, [SPARSE, FULL, FULL]], [False] * 2)
        assert one.scrape()[("flux_unrouted_rows_total",)] == 1

    def test_keys_that_kernels_counted(self, one: Setup) -> None:
        """The step's decisions count as ever, its keys once."""
        routes = np.array([[SPARSE, FULL, FULL]], dtype=np.int8)
        one.reporter.record(make_step([(500, 1, 400)]), routes, np.array([True]), False)
        one.reporter.flush()
        assert one.decisions() == 3
        assert one.tokens("context", "decode") == 0
        one.reporter.record_decode(DecodeKeys(70, 90, 2))
        assert one.tokens("attended", "decode") == 70
        assert one.tokens("context", "decode") == 90
        assert one.scrape()[("flux_unrouted_rows_total",)] == 2

    def test_saving_of_a_sparse_decode(self, one: Setup) -> None:
        """One row at position 1000 (S 32, W 128, block 32): 32 + 137 keys of 1001 a layer."""
        one.record([(1000, 1, 900)], [[SPARSE, FULL, SPARSE]], [False])
        window = 1001 - (1000 - 128 + 1) // 32 * 32
        assert one.tokens("attended", "decode") == 2 * (32 + window) + 1001
        assert one.tokens("context", "decode") == 3 * 1001
        assert one.tokens("context", "prefill") == 0


class TestNonfiniteRouter:
    NAN = float("nan")

    def count(self, one: Setup, probability: list[list[float]], unread: int = 0) -> float:
        values = np.array(probability, dtype=np.float32).reshape(-1, len(LAYERS))
        one.reporter.record_probes(values, unread)
        return one.scrape()[("flux_nonfinite_router_rows_total",)]

    def test_finite_rows_do_not_count(self, one: Setup) -> None:
        assert self.count(one, [[0.0, 0.5, 1.0], [1e-30, 0.2, 0.9]]) == 0

    def test_rows_not_layers(self, one: Setup) -> None:
        rows = [[0.1, self.NAN, 0.3], [self.NAN] * 3, [0.1, 0.2, 0.3]]
        assert self.count(one, rows) == 2
        assert self.count(one, rows[:1]) == 3

    def test_prompts_that_no_router_could_read(self, one: Setup) -> None:
        assert self.count(one, [[0.1, 0.2, 0.3]], unread=2) == 0
        assert one.scrape()[("flux_unread_prompts_total",)] == 2

    def test_step_that_decided_nothing(self, one: Setup) -> None:
        assert self.count(one, []) == 0


class TestWaiting:
    """Steps may wait for others, a fifth of a second."""

    @pytest.fixture
    def one(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Setup:
        self.now = 100.0
        monkeypatch.setattr("flux_vllm.metrics.reporter.time.monotonic", lambda: self.now)
        return Setup(tmp_path, (32, 128, 16))

    def step(self, one: Setup, decided: bool = False) -> None:
        routes = np.array([[SPARSE, FULL, SPARSE]], dtype=np.int8)
        one.reporter.record(make_step([(9, 1, 5)]), routes, np.array([decided]))

    def test_steps_that_wait_are_counted_together(self, one: Setup) -> None:
        for _ in range(3):
            self.step(one)
        assert one.tokens("context", "decode") == 0
        self.now += FLUSH_SECONDS
        self.step(one)
        assert one.tokens("context", "decode") == 4 * 10 * 3
        self.step(one)
        one.reporter.flush()
        assert one.tokens("context", "decode") == 5 * 10 * 3

    def test_decisions_wait_with_their_steps(self, one: Setup) -> None:
        """A request's first step counts nothing by itself: that would keep its first token."""
        for _ in range(2):
            self.step(one, decided=True)
        assert one.decisions() == 0
        self.now += FLUSH_SECONDS
        self.step(one)
        assert one.decisions() == 2 * 3
        assert one.tokens("context", "decode") == 3 * 10 * 3
        one.reporter.flush()
        assert one.decisions() == 2 * 3
