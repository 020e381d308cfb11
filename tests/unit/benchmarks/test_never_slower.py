"""The parts of `bench_never_slower` that need no engine: cells, turns, rows, ideals."""

import pytest

from benchmarks.bench_never_slower import backend_arguments
from benchmarks.never_slower_cases import (
    BASELINE,
    CONTROL,
    Cell,
    decode_ideal,
    describe,
    rows_of,
)
from benchmarks.turns import in_turns, interval, longer_percent


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("1024", Cell("ttft_ms", 1024)),
        ("1024x", Cell("ttft_ms", 1024)),
        ("1024x16", Cell("ttft_ms", 1024, 16)),
        ("8192x16+4000", Cell("ttft_ms", 8192, 16, 4000)),
    ],
)
def test_cells(text: str, cell: Cell) -> None:
    assert Cell.read("ttft_ms", text) == cell


@pytest.mark.parametrize("text", ["", "many", "1024xx2"])
def test_what_is_no_cell(text: str) -> None:
    with pytest.raises(ValueError, match="invalid literal"):
        Cell.read("ttft_ms", text)


def test_turns_begin_with_each_engine_and_the_first_do_not_count() -> None:
    asked: list[str] = []

    def measure(engine: str) -> float:
        asked.append(engine)
        return float(len(asked))

    values = in_turns({"a": "A", "b": "B", "c": "C"}, measure, turns=2, warm_ups=1)
    assert "".join(asked) == "ABCBCACAB"
    assert values == {"a": [6.0, 8.0], "b": [4.0, 9.0], "c": [5.0, 7.0]}


def test_longer_is_told_turn_by_turn() -> None:
    slow = [1.0, 2.0, 4.0, 8.0]  # the machine slows down
    median, (low, high) = longer_percent([1.1 * s for s in slow], slow)
    assert median == pytest.approx(10)
    assert low == pytest.approx(10)
    assert high == pytest.approx(10)
    assert interval([3.0]) == (3.0, 3.0)


def test_ideal_of_decode() -> None:
    """All SPARSE takes what a short context does; nothing is gained where that is no shorter."""
    assert decode_ideal(8.0, 2.0, 0.0) == 8.0
    assert decode_ideal(8.0, 2.0, 0.75) == 3.5
    assert decode_ideal(8.0, 2.0, 1.0) == 2.0
    assert decode_ideal(2.0, 2.1, 1.0) == 2.0


def test_rows() -> None:
    """Flux is held against the mean of two baselines, the second baseline against the first."""
    values = {
        BASELINE: [1.0, 2.0, 4.0],
        CONTROL: [1.2, 2.4, 4.8],
        "static": [0.55, 1.1, 2.2],
        "full": [1.1, 2.2, 4.4],
    }
    cell = Cell("decode_ms", 31000, 16)
    rows = rows_of("qwen", cell, values, {"static": 0.75}, {"static": 1.0})
    by_policy = {row["policy"]: row for row in rows}
    assert list(by_policy) == [CONTROL, "static", "full"]
    static = by_policy["static"]
    assert static["longer_percent"] == pytest.approx(-50)
    assert static["interval_percent"] == pytest.approx([-50, -50])
    assert (static["flux"], static["flash_attn"]) == (1.1, pytest.approx(2.2))
    assert (static["sparse_share"], static["ideal"]) == (0.75, 1.0)
    assert by_policy["full"]["longer_percent"] == pytest.approx(0)
    assert by_policy["full"]["sparse_share"] == 0.0
    assert by_policy["full"]["ideal"] is None
    assert by_policy[CONTROL]["longer_percent"] == pytest.approx(20)
    wanted = {"shape", "what", "policy", "sparse_share", "context", "batch", "flux", "flash_attn"}
    assert wanted | {"ideal"} <= static.keys()
    assert describe(static) == (
        "decode_ms 31000 x 16       static           f=0.75    1.100 against    2.200: -50.00 % "
        "[-50.00, -50.00], 2.000x, 0.909 of the ideal"
    )


def test_engines_share_their_arguments_but_for_flux() -> None:
    shared = {"max_num_seqs": 256, "additional_config": {"gdn_prefill_backend": "triton"}}
    own = backend_arguments(shared, "FLASH_ATTN", None)
    assert own == {"attention_backend": "FLASH_ATTN", **shared}
    flux = backend_arguments(shared, "FLASH_ATTN", {"policy": "full"})
    assert flux["attention_backend"] == "flux"
    assert flux["max_num_seqs"] == 256
    assert flux["additional_config"] == {
        "gdn_prefill_backend": "triton", "flux": {"policy": "full"}
    }  # fmt: skip
    assert "flux" not in shared["additional_config"]
