"""The benchmark of `free_kv`: its formula is that of the docs, its engines differ in one thing.

Oracle: the table of docs/KV_MEMORY.md.
"""

import re
from types import SimpleNamespace

import pytest

from benchmarks.bench_free_kv import expected_held, variants
from benchmarks.serve_cases import K, Shape
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
        found = expected_held(_arguments(context=context), LLAMA_8B, share)
        assert found == pytest.approx(value, abs=0.5 if value > 30 else 0.05)


def test_variants_differ_in_free_kv_alone(tmp_path):
    arguments = _arguments(
        model=tmp_path,
        baseline="FLASH_ATTN",
        shares=[0.5, 0.7],
        pattern="streaming",
        engine_arguments={"dtype": "bfloat16"},
    )
    found = list(variants(arguments, LLAMA_8B))
    assert [name for name, _, _ in found] == ["vllm", "flux", "free_kv", "flux", "free_kv"]
    # Of 22 SPARSE layers, 20 fill five of eight groups of 4 layers.
    assert [share for _, share, _ in found] == [0, 0.5, 0.5, 22 / 32, 5 / 8]
    for kept, freed in ((found[1], found[2]), (found[3], found[4])):
        flux = kept[2]["additional_config"]["flux"]
        assert flux.pop("free_kv") is False
        assert freed[2]["additional_config"]["flux"].pop("free_kv") is True
        assert kept[2] == freed[2]
