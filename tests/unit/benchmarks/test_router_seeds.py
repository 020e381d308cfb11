"""Routers of several seeds: which commands are run, and which prompts are held out.

Oracle: the parsers of the commands themselves, and prompts whose split is known.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.experiments.router_seeds import Study, held_out
from benchmarks.real_tasks import cli as real_tasks
from training import __main__ as training
from training import cli, recipes
from training.data.prompt_files import read_prompt_files


@pytest.fixture
def study(tmp_path: Path) -> Study:
    return Study(
        model=tmp_path / "model",
        eval=tmp_path / "eval",
        texts=tmp_path / "texts",
        asks=tmp_path / "asks",
        needles=None,
        out=tmp_path,
        count=10,
        most_tokens=9000,
        kv_gib=4,
        measure_seconds=60,
        measured_full_tokens=0,
        full_decode_tokens=64,
        budget_share=0.1,
        seeds=(3, 4, 5),
        thresholds=(0.5, 0.9),
    )


def parsed(command: list[str]) -> Any:
    assert command[1:4] == ["-m", "benchmarks.real_tasks", "answer"]
    return real_tasks._parse(command[3:])


def test_later_seeds_measure_nothing(study: Study) -> None:
    configs = []
    for seed in study.seeds:
        command = study.train(seed)
        assert command[1:3] == ["-m", "training"]
        arguments = training._parser().parse_args(command[3:])
        configs.append(cli.apply_flags(recipes.budget(), arguments))
    assert [config.seed for config in configs] == [3, 4, 5]
    assert [config.costs.prompts for config in configs] == [0, -1, -1]
    first = configs[0]
    assert first.router.full_decode_tokens == 0
    assert (first.loss.budget_share, first.data.max_tokens) == (0.1, 9000)
    for config in configs[1:]:  # else what was measured would not be taken
        same = replace(config, seed=3, out=first.out, costs=first.costs)
        assert same.to_dict() == first.to_dict()


def test_every_router_and_pattern_is_judged_once(study: Study) -> None:
    study.router(3).mkdir()
    layers = {"24": [0, 1, 2, 3], "21": [0, 1, 2], "17": [0, 2], "14": [2]}
    (study.router(3) / "fit.json").write_text(json.dumps({"static_layers": layers}))
    commands = [parsed(command) for command in study.judged()]
    timed = [one for one in commands if "speed" in one.tasks]
    assert [one.variant for one in timed] == [[f"seed3=router:{study.out}/seed-3@0.5"]]
    assert [one.seed for one in commands] == [3, 3, 4, 5, 0]
    assert [one.variant for one in commands[1:]] == [
        [f"seed3=router:{study.out}/seed-3@0.9"],
        [f"seed4=router:{study.out}/seed-4@0.5,0.9"],
        [f"seed5=router:{study.out}/seed-5@0.5,0.9"],
        ["static21=static:0,1,2", "static17=static:0,2", "sparse"],
    ]
    # Fixed routes with the router's sinks and window.
    assert commands[-1].flux == {"full_decode_tokens": 64, "router": str(study.router(3))}
    assert [one.flux for one in commands[:-1]] == [{"full_decode_tokens": 64}] * 4
    on_a_cpu = replace(study, baseline="cpu_attn", answering=("--kv-gib", "1", "--runner", "v1"))
    one = parsed(on_a_cpu.answer(["cpu_attn"], True))
    assert (one.baseline_label, one.kv_gib, one.runner) == ("cpu_attn", 1, "v1")
    baseline = parsed(study.answer(["flash_attn"], True))
    assert baseline.flux is None
    assert baseline.speed_lock == timed[0].speed_lock == study.out / "speed.lock"


def test_held_out_prompts_are_those_of_the_test_split(study: Study) -> None:
    rows = [
        {"id": str(n), "prompt": f"Say {n}", "max_new_tokens": 9, "answer": "x", "answer_ids": [1]}
        for n in range(60)
    ]
    study.answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    wanted = [
        row["id"]
        for row, one in zip(rows, read_prompt_files([study.answers]), strict=True)
        if one.split == "test"
    ]
    found = [json.loads(line) for line in held_out(study.answers)]
    assert 0 < len(wanted) < 20
    assert [row["id"] for row in found] == wanted
    assert set(found[0]) == {"id", "prompt", "max_new_tokens"}
