"""The benchmark of `free_kv`: its formula is that of the docs, its engines differ in one thing.

Oracle: the table of docs/KV_MEMORY.md; a made-up engine's steps, counted by hand.
"""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import bench_free_kv
from benchmarks.bench_free_kv import ENGINES, expected_held, table, variant
from benchmarks.queue_load import QueueLoad
from benchmarks.serve_cases import K, Shape
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.route import Route, choose_route, full_probability
from tests.conftest import REPOSITORY

LLAMA_8B = Shape(layers=32, heads=32, kv_heads=8, head_dim=128, vocab_size=128256)


def _arguments(**changes):
    sizes = {"context": 64 * K, "tokens": 0, "kv_gib": 110.7, "sink": 128, "window": 2048}
    return SimpleNamespace(**(sizes | {"block_size": 64} | changes))


def _table():
    text = (REPOSITORY / "docs" / "KV_MEMORY.md").read_text()
    rows = re.findall(r"^\| (\d+)K \|(.*)\|$", text, flags=re.M)
    return [(int(k) * K, [float(cell) for cell in cells.split("|")]) for k, cells in rows]


@pytest.mark.parametrize(("context", "held"), _table(), ids=str)
def test_expected_held_is_the_table(context, held):
    for share, value in zip((0, 0.5, 0.75, 0.9), held, strict=True):
        found = expected_held(_arguments(context=context), LLAMA_8B, "free_kv", share)
        assert found == pytest.approx(value, abs=0.5 if value > 30 else 0.05)
    assert expected_held(_arguments(), LLAMA_8B, "flux", 0.9) == pytest.approx(13.8, abs=0.05)
    # One hole of 8 GiB stays for a request whose routes are not known.
    held = expected_held(_arguments(), LLAMA_8B, "router", 0.75)
    assert held == pytest.approx(49.8 * (110.7 - 8) / 110.7 + 1, abs=0.1)


def _variants(tmp_path, share):
    arguments = _arguments(
        model=tmp_path,
        baseline="FLASH_ATTN",
        share=share,
        pattern="streaming",
        engine_arguments={"dtype": "bfloat16"},
    )
    return {name: variant(arguments, LLAMA_8B, name, tmp_path) for name in ENGINES}


# Of 22 SPARSE layers, 20 fill five of eight groups of 4 layers; likewise by routes.
@pytest.mark.parametrize(("share", "freed"), [(0.5, 0.5), (0.7, 5 / 8), (0.75, 0.75)])
def test_variants_differ_in_one_thing(tmp_path, share, freed):
    found = _variants(tmp_path, share)
    count = round(share * 32)
    assert [part for part, _ in found.values()] == [0, count / 32, freed, freed]
    kept, freeing = (found[name][1] for name in ("flux", "free_kv"))
    flux = kept["additional_config"]["flux"]
    assert flux.pop("free_kv") is False
    assert freeing["additional_config"]["flux"].pop("free_kv") is True
    assert kept == freeing


def test_fixed_router_makes_the_same_layers_sparse(tmp_path):
    _, arguments = _variants(tmp_path, 0.75)["router"]
    router, info = read_router(Path(arguments["additional_config"]["flux"]["router"]))
    features = torch.randn(32, 5, info.inputs.vectors * 128)
    routes = choose_route(full_probability(router.forward_all(features)), 0.5)
    layers = LLAMA_8B.spread(0.75)
    assert [bool((row == Route.SPARSE).all()) for row in routes] == [
        layer in layers for layer in range(32)
    ]
    assert info.freeing_order[:24] == tuple(layers)


class _Requests:
    """An engine whose memory holds three requests; each is a prompt for two steps, then decodes.

    It is its own scheduler.
    """

    def __init__(self, tokens):
        self.tokens = tokens
        self.waiting, self.running = [], []

    def add(self):
        self.waiting.append(SimpleNamespace(num_prompt_tokens=2, num_computed_tokens=0))

    def _preempt_request(self, request):
        pass

    def step(self):
        outputs = []
        prompt = next((r for r in self.running if r.num_computed_tokens < 2), None)
        for request in list(self.running):
            if request.num_computed_tokens < 2 and request is not prompt:
                continue
            request.num_computed_tokens += 1
            count = request.num_computed_tokens - 1
            if count > 0:
                is_last = count == self.tokens
                outputs.append(SimpleNamespace(finished=is_last))
                if is_last:
                    self.running.remove(request)
        if prompt is None and len(self.running) < 3:
            self.running.append(self.waiting.pop(0))
        return outputs


def test_queue_load_counts_a_generation():
    engine = _Requests(tokens=60)
    found = QueueLoad(engine, engine, engine.add).run(60)
    assert found["most_running"] == 3
    assert found["generations"] == 1
    assert found["preemptions"] == 0
    assert 2 < found["mean_running"] <= 3
    assert found["tokens_per_second"] > 0
    assert found["decode_tokens_per_second"] == pytest.approx(3000 / found["decode_step_ms"])


def test_queue_load_refuses_memory_that_does_not_fill():
    engine = _Requests(tokens=3)
    with pytest.raises(RuntimeError, match="give more time or a smaller KV cache"):
        QueueLoad(engine, engine, engine.add).run(0.05)


def test_table_puts_engines_beside_vllm(tmp_path):
    row = {
        "shape": "8b",
        "context": 65536,
        "tokens": 512,
        "kv_gib": 60,
        "pattern": "streaming",
        "expected_held": 9.0,
        "generations": 1,
        "preemptions": 0,
        "decode_step_ms": 9.0,
        "provenance": {},
    }

    def engine(name, share, held, rate):
        return row | {
            "engine": name,
            "sparse_share": share,
            "most_running": held,
            "tokens_per_second": rate,
            "decode_tokens_per_second": 2 * rate,
        }

    files = [tmp_path / "a.json", tmp_path / "b.json"]
    files[0].write_text(json.dumps([engine("vllm", 0.0, 7, 100.0), engine("flux", 0.75, 7, 1.0)]))
    files[1].write_text(
        json.dumps(
            [engine("free_kv", 0.75, 24, 260.0), engine("free_kv", 0.5, 9, 1.0) | {"kv_gib": 2}]
        )
    )
    table(files, tmp_path / "table.json")
    (written,) = json.loads((tmp_path / "table.json").read_text())
    wanted = {
        "shape": "8b",
        "context": 65536,
        "sparse_share": 0.75,
        "requests": 24,
        "requests_flash_attn": 7,
        "tokens_s": 260.0,
        "tokens_s_flash_attn": 100.0,
    }
    assert wanted.items() <= written.items()


class _Engine:
    """Stands in for an engine's process; each start takes a minute of a clock that is made up."""

    clock = 0.0

    def __init__(self, vocab_size, **arguments):
        type(self).clock += 60

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        pass

    def prefill_seconds(self, tokens):
        return 1.0

    def answer_queue(self, context, tokens, seconds):
        type(self).clock += 59
        keys = ("mean_running", "tokens_per_second", "generations", "seconds", "preemptions")
        keys += ("most_running", "fill_seconds", "decode_tokens_per_second", "decode_step_ms")
        return dict.fromkeys(keys, 1.0)

    def settings(self):
        return {}


def test_a_run_that_lacks_time_says_what_was_not_measured(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_Engine, "clock", 0.0)
    monkeypatch.setattr(bench_free_kv, "Engine", _Engine)
    monkeypatch.setattr(bench_free_kv.time, "monotonic", lambda: _Engine.clock)
    model = REPOSITORY / "benchmarks" / "shapes" / "llama-3.1-8b"
    out = tmp_path / "rows.json"
    options = f"--model {model} --out {out} --kv-gib 66 --engines vllm router free_kv"
    monkeypatch.setattr("sys.argv", ["bench_free_kv", *options.split(), "--seconds", "190"])
    with pytest.raises(RuntimeError, match=r"found 11; not measured: router, free_kv; give more"):
        bench_free_kv.main()
    assert [row["engine"] for row in json.loads(out.read_text())] == ["vllm"]
    assert "router: started in 60 s, 11 s are left" in capsys.readouterr().out
    monkeypatch.setattr(_Engine, "clock", 0.0)
    monkeypatch.setattr("sys.argv", ["bench_free_kv", *options.split(), "--seconds", "400"])
    bench_free_kv.main()
    assert [row["engine"] for row in json.loads(out.read_text())] == ["vllm", "router", "free_kv"]
