"""The parts of the benchmarks that need no engine: cases, rows, arguments, sizes."""

import json
import os
from pathlib import Path

import pytest

from benchmarks import bench_online, bench_overhead, bench_serve
from benchmarks.experiments import bench_head_split, head_split_layer
from benchmarks.provenance import provenance
from benchmarks.row_file import RowFile, time_limit
from benchmarks.serve_cases import PLANS, Prefill, Row, default_chunk, longest_context

CONFIG = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
}


def test_row_file_replaces_rows_of_a_key(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = RowFile(tmp_path / "made" / "rows.json")
    rows.keep("a", {"figure": 1}, "first")
    rows.keep("b", {"figure": 2}, "second")
    rows.keep("a", {"figure": 3}, "third")
    found = json.loads((tmp_path / "made" / "rows.json").read_text())
    assert [row["figure"] for row in found] == [3, 2]
    assert all(row["provenance"]["versions"]["torch"] for row in found)
    assert capsys.readouterr().out == "first\nsecond\nthird\n"


def test_provenance_counts_the_cores_of_this_process() -> None:
    allowed = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(allowed)})
        found = provenance()
    finally:
        os.sched_setaffinity(0, allowed)
    assert (found["cores"], found["machine_cores"]) == (1, os.cpu_count())


def test_overhead_rows_compare_within_turns() -> None:
    # The machine slows from turn to turn, the engines alike.
    slow = [1.0, 2.0, 4.0]
    turns = {
        "B": [(s, 10 * s) for s in slow],
        "full": [(1.1 * s, 12 * s) for s in slow],
        "B again": [(1.02 * s, 9 * s) for s in slow],
    }
    rows = {
        (row["metric"], row["policy"]): row for row in bench_overhead.overhead_rows(turns, "B", 512)
    }
    full = rows["ttft_s", "full"]
    assert full["overhead_percent"] == pytest.approx(10)
    assert full["against_control_percent"] == pytest.approx(100 * (1.1 / 1.02 - 1))
    assert full["against_mean_percent"] == pytest.approx(100 * (1.1 / 1.01 - 1))
    assert full["against_control_interval_percent"] == pytest.approx([7.843137] * 2)
    assert full["against_mean_interval_percent"] == pytest.approx([8.910891] * 2)
    assert (full["median"], full["values"]) == (pytest.approx(2.2), [1.1 * s for s in slow])
    decode = rows["tpot_ms", "full"]
    assert decode["overhead_percent"] == pytest.approx(20)
    assert decode["against_control_percent"] == pytest.approx(100 / 3)
    assert decode["against_mean_percent"] == pytest.approx(100 * (12 / 9.5 - 1))
    assert rows["ttft_s", "B again"]["against_control_percent"] == 0
    line = bench_overhead.describe(full)
    assert "+10.00 % [+10.00, +10.00]  median 2.2" in line
    assert line.endswith(
        "against control  +7.84 % [+7.84, +7.84]  against mean  +8.91 % [+8.91, +8.91]"
    )


def test_overhead_rows_without_a_control() -> None:
    turns = {"B": [(1.0, 2.0)], "full": [(2.0, 2.0)]}
    rows = bench_overhead.overhead_rows(turns, "B", 512)
    assert not any(key.startswith("against") for row in rows for key in row)
    assert "against" not in bench_overhead.describe(rows[1])


def test_interval_covers_turns_that_differ() -> None:
    turns = {"B": [(1.0, 1.0)] * 5, "full": [(1.0 + t / 10, 1.0) for t in range(5)]}
    low, high = bench_overhead.overhead_rows(turns, "B", 512)[1]["interval_percent"]
    assert 0 <= low < 20 < high <= 40 + 1e-9


def test_kernel_rows_keep_every_kernel() -> None:
    kernels = [("flash::FlashAttnFwdSm90", 32, 30.0), ("gemm", 64, 20.0), ("copy", 9, 0.5)]
    row = bench_serve.kernel_row("baseline", 65536, kernels)
    assert (row["total_ms"], row["attention_ms"]) == (50.5, 30.0)
    assert row["kernels"][2] == {"name": "copy", "calls": 9, "ms": 0.5}


def test_time_limit() -> None:
    assert time_limit(None)()
    assert time_limit(60)()
    assert not time_limit(0)()


def test_one_chunk_plan_takes_whole_prompts() -> None:
    assert all(isinstance(case, Prefill) for case in PLANS["one_chunk"])
    assert default_chunk("one_chunk") == longest_context("one_chunk") == 131072
    assert default_chunk("8b") == 8192


def test_row_says_what_a_prefill_takes_beside_what_stays() -> None:
    row = Row("ttft_s", 512, 1, 0.5, 2.0, [4.0, 2.0, 3.0], [6.0])
    assert "GiB" not in str(row)
    row.flux_memory, row.flash_attn_memory = (3 << 30, 1 << 30), (5 << 30, 2 << 30)
    assert "2.00 and 3.00 GiB beside what stays" in str(row)
    assert row.as_dict()["speedup"] == 2.0
    assert row.as_dict()["share_of_ideal"] == pytest.approx(2 / 3)


def test_layer_row() -> None:
    case = head_split_layer.LayerCase(16, 1, 32768, 4)

    def time(us: float) -> dict[str, float]:
        return {"us": us, "low_us": us, "high_us": us}

    times = {"full": time(300), "sparse": time(40), "head_split": None, "side_by_side": None}
    times |= {"flash_attn": time(280), "least": time(20)}
    row = head_split_layer.layer_row(case, times)
    assert (row["layer_level"], row["head_split"], row["ideal"]) == (170, None, 150)


def test_engine_row_has_an_ideal_only_beside_the_baseline() -> None:
    values = {"layer_level": [3.0, 2.0, 4.0], "head_split": [5.0]}
    assert bench_head_split.engine_row("ttft_s", 512, 1, values, [1.0])["ideal"] is None
    row = bench_head_split.engine_row("ttft_s", 512, 1, {"flash_attn": [5.0]} | values, [1.0])
    assert (row["layer_level"], row["ideal"], row["all_sparse"]) == (3.0, 3.0, 1.0)


def test_command_line_pairs() -> None:
    assert bench_head_split.decode_case("8192x16") == (8192, 16)
    assert bench_online.request_rate("0.25:5") == ("0.25", 5)
    assert bench_online.request_rate("inf:12") == ("inf", 12)
    for read in (bench_head_split.decode_case, bench_online.request_rate):
        with pytest.raises(ValueError):  # noqa: PT011 - argparse makes the message
            read("12")


def test_client_arguments_span_the_lengths() -> None:
    arguments = bench_online.client_arguments("m", "u", (16384, 65536), 256, "inf", 3, 0)
    mean = int(arguments[arguments.index("--random-input-len") + 1])
    ratio = json.loads(arguments[arguments.index("--random-range-ratio") + 1])
    assert mean * (1 - ratio["input"]) == pytest.approx(16384)
    assert mean * (1 + ratio["input"]) == pytest.approx(65536)
    assert ratio["output"] == 0


def test_online_row_refuses_failed_requests() -> None:
    result = dict.fromkeys(bench_online.FIGURES, 1) | {"input_lens": [5], "ttfts": [0.1]}
    with pytest.raises(RuntimeError, match="found 1 failed"):
        bench_online.online_row("flux", 0.5, "1", result)
    row = bench_online.online_row("flux", 0.5, "1", result | {"failed": 0})
    assert "flux       f=0.50 rate    1: 1 requests" in bench_online.describe(row)


def test_word_tokenizer_gives_a_word_a_token(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 300}))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "config.json").rename(tmp_path / "tiny" / "config.json")
    folder = bench_online.with_word_tokenizer(tmp_path / "tiny", tmp_path / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [299, 1, 0, 17, 17]
    text = tokenizer.decode(ids)
    assert tokenizer.encode(text) == ids
    assert tokenizer.vocab_size == 300
    # vLLM refuses more characters than this a token.
    assert len(text) <= len(ids) * max(len(word) for word in tokenizer.get_vocab())
