"""Scores, tables and resumed rows of `serve_quality`.

Oracle: offline scoring's definition, written out; and figures worked out by hand.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import quality_report as report
from benchmarks import serve_quality
from benchmarks.quality_client import chosen_tokens
from training.data.encoding import Encoded
from training.evaluation.prompts import PromptSet
from training.evaluation.statistics import Cells

PREFIX, ANSWER = [11, 12], [21, 22, 23, 24]


def make_prompt(task: str, prompt_len: int = 3) -> Encoded:
    ids = np.array([*range(1, prompt_len + 1), *PREFIX, *ANSWER], dtype=np.int32)
    return Encoded(task, ids, prompt_len, shared_len=0, prefix_len=len(PREFIX))


def test_score_is_the_tasks_metric() -> None:
    exact, tokens = make_prompt("needle"), make_prompt("repeat_end")
    assert report.score(exact, ANSWER) == report.score(tokens, ANSWER) == 1.0
    assert report.score(exact, [21, 22, 23, 9]) == 0.0
    assert report.score(tokens, [21, 22, 23, 9]) == 0.75
    with pytest.raises(ValueError, match="expected 4 tokens of an answer, found 3"):
        report.score(tokens, ANSWER[:3])


def test_only_token_metrics_force_the_answer() -> None:
    assert report.tokens_to_force(make_prompt("needle")) == PREFIX
    assert report.tokens_to_force(make_prompt("repeat_end")) == PREFIX + ANSWER


def test_chosen_tokens_are_the_models_own_where_forced() -> None:
    likely = [
        {"token_id:11": -3.0, "token_id:7": -0.1},
        {"token_id:12": -0.5, "token_id:8": -0.5},  # as likely as the likeliest
        {"token_id:21": -0.2},
    ]
    assert chosen_tokens([11, 12, 21], likely, forced=2) == [7, 12, 21]


def _rows(scores: list[float], routes: list[str] | None) -> dict[str, Any]:
    answers = [f"answer {at}" for at in range(len(scores))]
    return {"score": scores, "routes": routes, "answer": answers}


PROMPTS = [make_prompt(task) for task in ("needle", "needle", "repeat_end", "state_tracking")]
CELLS = Cells([prompt.task for prompt in PROMPTS], [1536] * 4)
OFFLINE = _rows([1.0, 1.0, 0.5, 0.25], ["FS", "FF", "SS", "SS"])
SERVER = _rows([1.0, 0.0, 0.75, 0.25], ["FS", "FS", "SS", "SS"])


def test_agreement_by_group_and_of_judged_groups() -> None:
    found = {row["group"]: row for row in report.agreement(PROMPTS, CELLS, SERVER, OFFLINE)}
    assert list(found) == ["retrieval", "local", "reasoning", "overall"]
    retrieval, overall = found["retrieval"], found["overall"]
    assert (retrieval["offline"], retrieval["server"], retrieval["difference"]) == (1.0, 0.5, -0.5)
    assert (retrieval["exact"], retrieval["exact_alike"]) == (2, 1)
    assert (retrieval["layers_alike"], retrieval["routes_alike"]) == (0.75, 0.5)
    assert retrieval["interval"] == [-1.0, 0.0]
    # Half retrieval, half local; reasoning is not judged.
    assert (overall["prompts"], overall["offline"], overall["server"]) == (3, 0.75, 0.625)
    assert overall["share"] == pytest.approx((0.5 + 1.0) / 2)
    assert found["local"]["exact"] == 0
    table = report.agreement_table("flux", list(found.values()))
    assert (
        "| retrieval | 2 | 1.000 | 0.500 | -0.500 [-1.000, +0.000] | 1 of 2 | 75.00% / 50.0%"
        in (table)
    )
    assert report.differing(PROMPTS, SERVER, OFFLINE) == [
        "prompt 1 (needle): offline 1, server 0, which answered 'answer 1'"
    ]


def test_agreement_without_routes() -> None:
    rows = report.agreement(PROMPTS, CELLS, _rows(OFFLINE["score"], None), OFFLINE)
    assert all("share" not in row and row["interval"] == [0.0, 0.0] for row in rows)
    assert "| 2 of 2 | - | - |" in report.agreement_table("baseline", rows)


def test_quality_and_speed_table_takes_the_longest_prompts() -> None:
    times = {"ttft_ms": report.spread([10, 20, 30]), "token_ms": report.spread([2.0])}
    servers = {
        "baseline": {"quality": _rows([0.0, 1.0, 1.0, 0.0], None), "speed at 8": times},
        "flux": {
            "quality": SERVER,
            "speed at 8": times | {"bursts": [True, False, True]},
            "speed at 1": times,
        },
    }
    lines = report.quality_and_speed_table(PROMPTS, [1536, 8000, 8000, 1536], servers).splitlines()
    assert lines[0].startswith("At 8000 tokens, 2 prompts")
    heads = ["server", "score: local", "score: overall", "score: retrieval", "SPARSE"]
    for count in (1, 8):
        heads += [f"TTFT at {count}, ms", f"ms a token at {count}", f"bursts at {count}"]
    assert [head.strip() for head in lines[2].strip("|").split("|")] == heads
    took = "20.0 (12.0 to 28.0) | 2.0 (2.0 to 2.0)"
    assert lines[4] == f"| baseline | 1.000 | 1.000 | 1.000 | - | - | - | - | {took} | - |"
    assert lines[5] == f"| flux | 0.750 | 0.375 | 0.000 | 0.750 | {took} | - | {took} | 2 of 3 |"


def test_cached_table() -> None:
    cells = Cells(["needle"] * 2, [1536] * 2)
    alone, after = _rows([1.0, 1.0], None), _rows([1.0, 1.0], None) | {"cached_share": 0.9}
    table = report.cached_table(PROMPTS[:2], cells, alone, after)
    assert "| 2 | 1.000 | 1.000 | +0.000 [+0.000, +0.000] | 90.0% |" in table


def test_rows_resume_with_their_own_provenance(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    rows = serve_quality.ResumedRows(path, {"chunk": 512})
    rows.add("flux", "quality", {"score": [1.0]}, "done")
    written = json.loads(path.read_text())
    written[0]["provenance"]["time"] = "earlier"
    path.write_text(json.dumps(written))
    again = serve_quality.ResumedRows(path, {"chunk": 512})
    assert again.missing("flux", ["quality", "speed at 1"]) == ["speed at 1"]
    assert again.missing("baseline", ["quality"]) == ["quality"]
    again.add("flux", "speed at 1", {}, "done")
    assert [row["provenance"]["time"] == "earlier" for row in json.loads(path.read_text())] == [
        True,
        False,
    ]
    assert list(again.of("flux")) == ["quality", "speed at 1"]
    with pytest.raises(ValueError, match="give another --out"):
        serve_quality.ResumedRows(path, {"chunk": 2048})


def test_longest_prompts_take_tasks_in_turn() -> None:
    tasks = ["needle", "needle", "repeat_end", "repeat_end", "arithmetic"]
    prompts = [make_prompt(task, 1 if task == "arithmetic" else 5) for task in tasks]
    made = PromptSet(prompts, [4, 10, 10, 10, 10])
    longest = serve_quality._longest(made, 3, 8)
    assert [prompt.task for prompt in longest] == ["needle", "repeat_end", "repeat_end"]
    with pytest.raises(ValueError, match="lower --output"):
        serve_quality._longest(made, 4, 8)


def test_server_arguments_differ_by_backend_alone(tmp_path: Path) -> None:
    args = argparse.Namespace(
        model=tmp_path,
        router=tmp_path / "router",
        dtype="bfloat16",
        baseline="FLASH_ATTN",
        max_model_len=8192,
        chunk=2048,
        runner="v2",
        threshold=0.25,
        server_arguments=["--enforce-eager"],
    )
    baseline = serve_quality.server_arguments(args, "baseline")
    flux = serve_quality.server_arguments(args, "flux")
    assert flux[: len(baseline)] == [
        "flux" if argument == "FLASH_ATTN" else argument for argument in baseline
    ]
    assert json.loads(flux[-1]) == {
        "flux": {"policy": "router", "router": str(tmp_path / "router"), "threshold": 0.25}
    }
    assert "benchmarks.forced_tokens:ForcedTokensV2" in flux


def test_route_letters() -> None:
    assert report.route_letters(np.array([[1, 0, 1], [0, 0, 0]])) == ["SFS", "FFF"]
    np.testing.assert_allclose(report.sparse_share(["SFS", "FFF"]), [2 / 3, 0])


def test_tables_are_those_that_rows_allow(tmp_path: Path) -> None:
    made = PromptSet(PROMPTS, [1536] * 4)
    rows = serve_quality.ResumedRows(tmp_path / "rows.json", {})
    assert serve_quality.tables(made, None, rows) == []
    rows.add("flux", "quality", SERVER, "done")
    assert len(serve_quality.tables(made, None, rows)) == 1
    rows.add("flux offline", "quality", OFFLINE, "done")
    rows.add("baseline", "quality", _rows(OFFLINE["score"], None), "done")
    speed, flux, differing = serve_quality.tables(made, None, rows)
    assert [line.split(" |")[0] for line in speed.splitlines()[4:]] == ["| baseline", "| flux"]
    assert flux.startswith("flux, quality: server against offline")
    assert differing.startswith("prompt 1 (needle)")
    for measure in ("cached alone", "cached after"):
        rows.add("flux", measure, SERVER | {"cached_share": 0.5}, "done")
    assert "after a local question" in serve_quality.tables(made, made, rows)[-1]
