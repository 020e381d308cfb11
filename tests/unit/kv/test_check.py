"""What `free_kv` refuses, by its messages.

Oracle: the messages. Configurations are the least that is read of them.
"""

import re
from types import SimpleNamespace

import pytest

from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.kv.groups import cluster_layers
from flux_vllm.patterns import make_pattern
from flux_vllm.startup.check import check_configuration
from tests.unit.kv.pools import FULL
from tests.unit.startup.fakes import (
    ONE_STAGE,
    Model,
    RotatingWhereTold,
    make_attention,
    make_config,
    make_speculation,
    write,
)

pytestmark = pytest.mark.vllm

STATIC = {"policy": "static", "sparse_layers": [0, 2], "free_kv": True}


@pytest.fixture(autouse=True)
def _one_stage(monkeypatch):
    monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: ONE_STAGE)


def _config(folder, flux, is_disabled=False):
    config = make_config(folder, flux)
    config.scheduler_config.disable_hybrid_kv_cache_manager = is_disabled
    config.scheduler_config.scheduler_cls = None
    config.scheduler_config.async_scheduling = True
    return config


@pytest.mark.parametrize("flux", [STATIC, {"policy": "sparse", "free_kv": True}])
def test_accepted(tmp_path, flux):
    write(tmp_path)
    check_configuration(_config(tmp_path, flux))


def test_one_group_alone_is_refused(tmp_path):
    write(tmp_path)
    with pytest.raises(UnsupportedConfigurationError) as error:
        check_configuration(_config(tmp_path, STATIC, is_disabled=True))
    assert str(error.value) == (
        'flux config: expected vLLM to manage several KV cache groups with "free_kv", found '
        '--disable-hybrid-kv-cache-manager; drop it, or drop "free_kv"'
    )


@pytest.mark.parametrize("method", ["ngram", "eagle"])
def test_drafters_with_layers_are_refused(tmp_path, method):
    write(tmp_path)
    config = _config(tmp_path, STATIC)
    config.speculative_config = make_speculation(method)
    if method == "ngram":
        check_configuration(config)
        return
    with pytest.raises(UnsupportedConfigurationError) as error:
        check_configuration(config)
    assert str(error.value) == (
        'flux config: expected speculative decoding by ngram with "free_kv", found eagle, whose '
        'drafter\'s keys no route gives back; choose ngram, or drop "free_kv"'
    )


def test_pipeline_stages_are_refused(tmp_path):
    write(tmp_path)
    config = _config(tmp_path, STATIC)
    config.parallel_config.pipeline_parallel_size = 2
    with pytest.raises(UnsupportedConfigurationError) as error:
        check_configuration(config)
    assert str(error.value) == (
        'flux config: expected one pipeline stage with "free_kv", found several, whose layers form '
        'KV cache groups of their own; serve by tensor parallel, or drop "free_kv"'
    )


def test_connectors_are_refused(tmp_path):
    """vLLM turns offloading into one."""
    write(tmp_path)
    config = _config(tmp_path, STATIC)
    config.kv_transfer_config = SimpleNamespace(kv_connector="ExampleConnector")
    with pytest.raises(UnsupportedConfigurationError) as error:
        check_configuration(config)
    assert str(error.value) == (
        'flux config: expected KV blocks that stay on their device with "free_kv", found a KV '
        "connector or offloading, which moves blocks that were given back; switch it off, or drop "
        '"free_kv"'
    )


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("flux", [STATIC, {"free_kv": True}], ids=["static", "router"])
def test_scheduler_is_chosen(tmp_path, flux, is_async):
    from flux_vllm.kv import scheduler

    write(tmp_path)
    config = _config(tmp_path, flux)
    for _ in range(2):
        config.scheduler_config.async_scheduling = is_async
        check_configuration(config)
        name = config.scheduler_config.scheduler_cls
        chosen = scheduler.AsyncFluxScheduler if is_async else scheduler.FluxScheduler
        assert getattr(scheduler, name.removeprefix("flux_vllm.kv.scheduler.")) is chosen


def test_another_scheduler_is_refused(tmp_path):
    write(tmp_path)
    config = _config(tmp_path, STATIC)
    config.scheduler_config.scheduler_cls = "other.Scheduler"
    with pytest.raises(UnsupportedConfigurationError) as error:
        check_configuration(config)
    assert str(error.value) == (
        'flux config: expected vLLM\'s own scheduler with "free_kv", which flux extends, found '
        '--scheduler-cls other.Scheduler; drop it, or drop "free_kv"'
    )


def test_too_few_sparse_layers(tmp_path):
    write(tmp_path)
    with pytest.raises(FluxConfigError, match=r"expected at least 1 of 4 layers .* found 0"):
        check_configuration(_config(tmp_path, STATIC | {"sparse_layers": []}))


class _Processor:
    """vLLM's, as far as it matters here."""

    def __init__(self, config):
        self.vllm_config = config

    def process_inputs(self, request_id, prompt, params, resumable=False):
        return request_id


@pytest.mark.parametrize("free_kv", [True, False])
def test_growing_prompts_are_refused(tmp_path, monkeypatch, free_kv):
    from vllm.v1.engine import input_processor

    class Processor(_Processor):
        process_inputs = _Processor.process_inputs

    monkeypatch.setattr(input_processor, "InputProcessor", Processor)
    write(tmp_path)
    check_configuration(_config(tmp_path, STATIC))  # wraps
    processor = Processor(_config(tmp_path, STATIC | {"free_kv": free_kv}))
    assert processor.process_inputs("whole", [], None) == "whole"
    if not free_kv:
        assert processor.process_inputs("grows", [], None, resumable=True) == "grows"
        return
    with pytest.raises(UnsupportedConfigurationError, match="found one with streaming input"):
        processor.process_inputs("grows", [], None, resumable=True)


class _Runner:
    """A model runner's specs and model."""

    def __init__(self, specs, model=None):
        self.specs = specs
        self.get_model = lambda: model

    def get_kv_cache_spec(self):
        return dict(self.specs)


def _specs(count=4, **changed):
    return {f"layers.{i}.attn": FULL for i in range(count)} | changed


def test_layers_that_differ_are_refused():
    from dataclasses import replace

    from flux_vllm.kv.worker import hook_runner

    runner = _Runner(_specs() | {"layers.3.attn": replace(FULL, num_kv_heads=2)})
    hook_runner(runner, cluster_layers(range(4), (0, 2)), make_pattern("streaming", 4, 8))
    with pytest.raises(
        UnsupportedConfigurationError,
        match=re.escape('expected full attention and KV caches of one shape in every layer with "'),
    ):
        runner.get_kv_cache_spec()


@pytest.mark.parametrize(("pattern", "frees"), [("streaming", True), ("triangle", False)])
def test_runner_names_clusters(caplog, pattern, frees):
    from flux_vllm.kv.spec import FluxSpec
    from flux_vllm.kv.worker import hook_runner

    runner = _Runner(_specs(30))
    caplog.set_level("INFO", logger="vllm.flux")
    hook_runner(runner, cluster_layers(range(30), range(22)), make_pattern(pattern, 4, 8))
    specs = runner.get_kv_cache_spec()
    assert list(specs) == list(_specs(30))
    for index, spec in enumerate(specs.values()):
        if index >= 20:
            assert spec == FULL
        else:
            assert isinstance(spec, FluxSpec)
            assert (spec.cluster, spec.sink_tokens, spec.window_tokens) == (index // 10, 4, 8)
            assert spec.frees_in_prefill == frees
            assert not spec.waits_for_routes
    first, unfreed, blocks = (record.getMessage() for record in caplog.records)
    assert first.startswith("flux: free_kv cuts the KV cache into 3 groups of 10 layers; 2 of them")
    assert "[20, 21]" in unfreed
    assert "--block-size 16 " in blocks


def _worker(folder, flux, count=30, without_rope=()):
    config = _config(folder, flux)
    config.model_config.get_total_num_hidden_layers = lambda: count
    config.model_config.max_model_len = 4096
    model = Model([make_attention(i) for i in range(count)], None, RotatingWhereTold)
    for index, layer in enumerate(reversed(model.layers)):
        layer.self_attn.use_rope = index not in without_rope
    return SimpleNamespace(vllm_config=config, model_runner=_Runner(_specs(count), model))


@pytest.mark.parametrize("order", [(), tuple(reversed(range(30)))], ids=["unknown", "known"])
def test_worker_clusters_by_the_routers_order(tmp_path, caplog, order):
    from flux_vllm.kv.worker import cluster_kv_cache

    write(tmp_path, num_layers=30, freeing_order=order, always_sparse=(4, 5, 6, 7))
    worker = _worker(tmp_path, {"free_kv": True})
    check_configuration(worker.vllm_config)
    caplog.set_level("INFO", logger="vllm.flux")
    for _ in range(2):
        cluster_kv_cache(worker)
    specs = list(worker.model_runner.get_kv_cache_spec().values())
    clusters = {}
    for layer, spec in enumerate(specs):
        clusters.setdefault(spec.cluster, []).append(layer)
    always, mixed, last = (
        ([5, 6, 7], [4, 28, 29], [0, 1, 2]) if order else ([4, 5, 6], [0, 1, 7], [27, 28, 29])
    )
    assert (clusters[0], clusters[1], clusters[9]) == (always, mixed, last)
    assert [specs[layer].waits_for_routes for layer in (always[0], mixed[0], last[0])] == [
        False,
        True,
        True,
    ]
    messages = [record.getMessage() for record in caplog.records]
    assert any("in which order layers are freed" in message for message in messages) != bool(order)
    assert sum("10 groups of 3 layers; 10 of them give" in message for message in messages) == 1


@pytest.mark.parametrize(
    ("max_model_len", "full_decode_tokens", "warns"),
    # A block behind the sinks is free once 335 tokens are processed: 4 + 1 blocks, then 255.
    [(337, 0, False), (336, 0, True), (1024, 1021, False), (1024, 1022, True)],
)
@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_requests_too_short_to_give_back_are_told(
    tmp_path, caplog, pattern, max_model_len, full_decode_tokens, warns
):
    """64 sink tokens and a window of 128, in blocks of 16: 128 tokens before it are kept too.

    The longest request is one token fewer when its last step begins, one of them not processed.
    """
    from flux_vllm.kv.worker import cluster_kv_cache

    write(tmp_path, num_layers=30, sink_tokens=64, window_tokens=128)
    flux = {"sparse_pattern": pattern, "full_decode_tokens": full_decode_tokens}
    worker = _worker(tmp_path, flux | {"free_kv": True})
    worker.vllm_config.model_config.max_model_len = max_model_len
    check_configuration(worker.vllm_config)
    cluster_kv_cache(worker)
    messages = [record.getMessage() for record in caplog.records]
    expected = (
        "sinks and window (64 and 128 tokens) by some blocks, and answers full_decode_tokens "
        f"({full_decode_tokens}), found max_model_len {max_model_len}; serve longer requests"
    )
    assert any(expected in message for message in messages) == warns


@pytest.mark.parametrize(("own", "expected"), [(None, 32), (8, 8), (0, 0)])
@pytest.mark.parametrize("pattern", ["streaming", "triangle"])
def test_an_answers_first_tokens_keep_their_keys(tmp_path, caplog, pattern, own, expected):
    """As many as the operator says, else the router's file; it is in every cluster's spec."""
    from flux_vllm.kv.worker import cluster_kv_cache

    write(tmp_path, num_layers=30, full_decode_tokens=32)
    flux = {"free_kv": True, "sparse_pattern": pattern, "full_decode_tokens": own}
    worker = _worker(tmp_path, flux)
    check_configuration(worker.vllm_config)
    caplog.set_level("INFO", logger="vllm.flux")
    cluster_kv_cache(worker)
    specs = worker.model_runner.get_kv_cache_spec().values()
    assert {(spec.full_decode_tokens, spec.is_local) for spec in specs} == {
        (expected, pattern == "streaming")
    }
    begin = "as a prompt goes on" if pattern == "streaming" else "once a prompt is complete"
    if expected:
        begin = f"once an answer has {expected} tokens"
    assert f"a request routes all their layers SPARSE, {begin}" in caplog.text


@pytest.mark.parametrize("order", [(), tuple(reversed(range(36)))], ids=["unknown", "known"])
def test_layers_without_a_route_keep_no_others_from_being_freed(tmp_path, caplog, order):
    """Every fourth layer without RoPE, hence FULL: they share the last clusters of nine."""
    from flux_vllm.kv.worker import cluster_kv_cache

    write(tmp_path, num_layers=36, freeing_order=order)
    unrouted = range(3, 36, 4)
    worker = _worker(tmp_path, {"free_kv": True}, 36, unrouted)
    check_configuration(worker.vllm_config)
    caplog.set_level("INFO", logger="vllm.flux")
    cluster_kv_cache(worker)
    clusters = [spec.cluster for spec in worker.model_runner.get_kv_cache_spec().values()]
    assert {clusters[layer] for layer in unrouted} == {6, 7, 8}
    assert "9 groups of 4 layers; 6 of them give blocks back, 6 of these only where" in caplog.text


def test_worker_without_our_scheduler_is_refused(tmp_path):
    from flux_vllm.kv.worker import cluster_kv_cache

    write(tmp_path)
    with pytest.raises(UnsupportedConfigurationError, match="found scheduler_cls None; make it so"):
        cluster_kv_cache(_worker(tmp_path, STATIC, 4))


def test_full_disk_is_said_and_served(tmp_path, monkeypatch, caplog):
    from flux_vllm.kv import scheduler

    def no_room(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scheduler, "metrics_directory", lambda: tmp_path)
    monkeypatch.setattr(scheduler, "MetricStore", no_room)
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name="served"))
    groups = [SimpleNamespace(layer_names=["a"], kv_cache_spec=FULL)]
    assert scheduler._report(config, groups) is None
    (message,) = caplog.messages
    assert message == (
        f"flux: expected room for the counters of KV memory in {tmp_path}, found: [Errno 28] No "
        "space left on device; requests are served without them: make room there, or let this "
        "user write there, and start again"
    )


def test_metrics_are_those_of_the_model(tmp_path, monkeypatch):
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.multiprocess import MultiProcessCollector

    from flux_vllm.kv import scheduler
    from tests.helpers.metrics import parse, total

    monkeypatch.setattr(scheduler, "metrics_directory", lambda: tmp_path)
    config = SimpleNamespace(model_config=SimpleNamespace(served_model_name=["served", "alias"]))
    groups = [SimpleNamespace(layer_names=["a"] * n, kv_cache_spec=FULL) for n in (3, 5, 2)]
    report = scheduler._report(config, groups)
    report.freed(7)
    report.admitted()
    for blocks in (1, 3000):
        report.held(blocks)
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=str(tmp_path))
    metrics = parse(generate_latest(registry).decode())
    block_nbytes = 5 * FULL.page_size_bytes
    assert total(metrics, "flux_kv_blocks_freed_total", model_name="served") == 7
    assert total(metrics, "flux_kv_admitted_requests_total", model_name="served") == 1
    assert total(metrics, "flux_request_kv_bytes_sum") == 3001 * block_nbytes
    assert total(metrics, "flux_request_kv_bytes_bucket", le="1.048576e+06") == 1
    assert total(metrics, "flux_request_kv_bytes_count") == 2
