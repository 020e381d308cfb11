"""Variants from their written form to a server's arguments, and results in files.

Oracle: the forms that docs/REAL_TASKS.md gives, and flux's own reading of its configuration.
"""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_tasks.store import ResultFolder
from benchmarks.real_tasks.variants import (
    EngineOptions,
    flux_config,
    parse_variants,
    server_arguments,
)
from flux_vllm.config import FluxConfig


def test_parse_variants_reads_every_form() -> None:
    texts = [
        "flash_attn",
        "full",
        "sparse",
        "static:0-2,7",
        "best=static:1",
        "router:runs/a@0.3,0.7",
    ]
    found = parse_variants(texts, seed=2)
    assert [one.label for one in found] == [
        *("flash_attn", "full", "sparse", "static4", "best", "a-t0.3", "a-t0.7"),
    ]
    assert found[3].layers == (0, 1, 2, 7)
    assert [one.threshold for one in found[-2:]] == [0.3, 0.7]
    assert [one.seed for one in found] == [None] * 5 + [2, 2]
    assert found[-1].router == str(Path("runs/a").absolute())


def test_fixed_routes_share_an_engine_and_routers_do_not() -> None:
    texts = ["flash_attn", "full", "sparse", "static:1", "router:a@0.3,0.7", "router:b@0.3"]
    names = [one.engine for one in parse_variants(texts)]
    assert names[1] == names[2] == names[3]
    assert names[4] == names[5]
    assert len(set(names)) == 4


def test_sparse_layers_of_fixed_routes() -> None:
    full, sparse, static = parse_variants(["full", "sparse", "static:1,3"])
    assert full.sparse_layers(4) == []
    assert sparse.sparse_layers(4) == [0, 1, 2, 3]
    assert static.sparse_layers(4) == [1, 3]


@pytest.mark.parametrize(
    "text", ["static", "static:", "static:a", "router:a", "router:@0.3", "half", "flash_attn:1"]
)
def test_parse_variants_refuses_other_forms(text: str) -> None:
    with pytest.raises(ValueError, match="expected a variant such as flash_attn"):
        parse_variants([text])


def test_parse_variants_refuses_equal_labels() -> None:
    with pytest.raises(ValueError, match=r"expected different labels, found \['static2'\] twice"):
        parse_variants(["static:0,1", "static:2,3"])


@pytest.mark.parametrize("text", ["full", "sparse", "static:1,3", "router:a@0.3,0.7"])
def test_flux_config_is_one_that_flux_takes(text: str) -> None:
    options = EngineOptions(model=Path("m"), flux={"sink_tokens": 64, "window_tokens": 512})
    config = FluxConfig.from_additional_config(
        {"flux": flux_config(options, parse_variants([text]))}
    )
    assert config.policy == ("router" if text.startswith("router") else "static")
    assert (config.sink_tokens, config.window_tokens) == (64, 512)
    assert config.threshold == (0.3 if config.policy == "router" else 0.5)


def _arguments(text: str, forces_tokens: bool = False, **fields: Any) -> list[str]:
    options = EngineOptions(model=Path("m"), **fields)
    return server_arguments(options, parse_variants([text]), forces_tokens)


def test_server_arguments_of_full_attention_name_no_flux() -> None:
    found = _arguments("flash_attn", forces_tokens=True, runner="v1", arguments=("--seed", "1"))
    assert found[found.index("--attention-backend") + 1] == "FLASH_ATTN"
    assert found[found.index("--max-num-batched-tokens") + 1] == "8192"
    assert found[found.index("--logits-processors") + 1].endswith(":ForcedTokensV1")
    assert found[-2:] == ["--seed", "1"]
    assert not [text for text in found if "flux" in text or "worker-extension" in text]


def test_server_arguments_of_flux() -> None:
    found = _arguments("router:a@0.3", kv_gib=2)
    config = json.loads(found[found.index("--additional-config") + 1])
    assert config["flux"]["threshold"] == 0.3
    assert found[found.index("--kv-cache-memory-bytes") + 1] == str(2 * 2**30)
    assert "--logits-processors" not in found


def test_results_are_kept_by_label_and_measure(tmp_path: Path) -> None:
    results = ResultFolder(tmp_path)
    assert not results.has("full", "needles", {"chunk": 1})
    results.write("full", "needles", {"chunk": 1}, {"policy": "full"}, [{"score": 1.0}])
    assert results.has("full", "needles", {"chunk": 1})
    assert results.labels() == ["full"]
    assert results.measures("full") == ["needles"]
    assert results.read("full", "needles")["rows"] == [{"score": 1.0}]
    assert "versions" in results.read("full", "needles")["provenance"]


def test_results_of_other_settings_are_refused(tmp_path: Path) -> None:
    results = ResultFolder(tmp_path)
    results.write("full", "needles", {"chunk": 1, "dtype": "a"}, {}, [])
    with pytest.raises(ValueError, match=r"found another chunk: \[1\] against \[2\]"):
        results.has("full", "needles", {"chunk": 2, "dtype": "a"})
