"""Route maps, compared with text written out by hand."""

import io
import math

import pytest

from flux_vllm.cli import route_map
from flux_vllm.cli.route_map import ASCII, UNICODE

NAN = math.nan


def test_render_strips_aligns_labels_and_counts() -> None:
    text = route_map.render_strips([("chat", [1, 0, 0, -1]), ("code word", [1] * 4)], ASCII)
    assert text.splitlines() == [
        "layer      0",
        "chat       #..-  2 of 3 layers SPARSE (67%), 1 not routed",
        "code word  ####  0 of 4 layers SPARSE (0%)",
    ]


def test_render_strips_ruler_and_wrap() -> None:
    lines = route_map.render_strips([("a", [0] * 64)], UNICODE, shares=False).splitlines()
    assert lines[0] == "layer  0         10        20        30        40        50"
    assert lines[1] == "a      " + "░" * 60
    assert lines[2] == "layer  60"
    assert lines[3] == "a      ░░░░"


def test_render_strips_without_requests() -> None:
    assert route_map.render_strips([], ASCII) == ""


def test_render_layers_in_columns() -> None:
    text = route_map.render_layers([1, 0, -1, 1], [0.9, 0.25, NAN, 1.0], ASCII)
    assert text.splitlines() == [
        "  0 # FULL   0.90 =======      2 - -",
        "  1 . sparse 0.25 ==           3 # FULL   1.00 ========",
    ]


def test_render_layers_without_router() -> None:
    assert route_map.render_layers([0], [NAN], ASCII) == "  0 . sparse"


def test_describe_share_without_routed_layers() -> None:
    assert route_map.describe_share([-1, -1]) == "no layer is routed"


@pytest.mark.parametrize(
    ("encoding", "expected"), [("utf-8", UNICODE), ("ascii", ASCII), ("latin-1", ASCII)]
)
def test_symbols_for_encoding(encoding: str, expected: route_map.Symbols) -> None:
    assert route_map.symbols_for(io.TextIOWrapper(io.BytesIO(), encoding=encoding)) == expected


def test_symbols_for_stream_without_encoding() -> None:
    assert route_map.symbols_for(io.StringIO()) == ASCII
