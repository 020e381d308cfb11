"""Routes as text: a strip with one character a layer, or a map with P(FULL) for each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

# As in `flux_vllm.router.route.Route`, which would cost the import of torch.
_SPARSE, _FULL = 0, 1

_LAYERS_A_LINE = 60
_BAR_WIDTH = 8
_COLUMNS = 3


@dataclass(frozen=True, slots=True)
class Symbols:
    """The characters of a map."""

    full: str
    sparse: str
    unrouted: str
    bar: str


UNICODE = Symbols(full="█", sparse="░", unrouted="·", bar="▪")
ASCII = Symbols(full="#", sparse=".", unrouted="-", bar="=")


def symbols_for(stream: TextIO) -> Symbols:
    """Choose the characters that a stream can show."""
    try:
        "█░·▪".encode(stream.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return ASCII
    return UNICODE


def count_sparse(routes: Sequence[int]) -> tuple[int, int]:
    """Count the SPARSE layers and the routed layers (those that are not -1)."""
    return sum(route == _SPARSE for route in routes), sum(route >= 0 for route in routes)


def describe_share(routes: Sequence[int]) -> str:
    """Say how many layers are SPARSE."""
    sparse, routed = count_sparse(routes)
    if routed == 0:
        return "no layer is routed"
    text = f"{sparse} of {routed} layers SPARSE ({sparse / routed:.0%})"
    if routed < len(routes):
        text += f", {len(routes) - routed} not routed"
    return text


def legend(symbols: Symbols) -> str:
    """Explain the characters of a strip."""
    return f"{symbols.full} FULL  {symbols.sparse} SPARSE  {symbols.unrouted} not routed"


def render_strips(
    rows: Sequence[tuple[str, Sequence[int]]], symbols: Symbols, *, shares: bool = True
) -> str:
    """Draw the routes of several requests one below the other, one character a layer.

    Args:
        rows: label and routes of each request; 1 FULL, 0 SPARSE, -1 not routed.
        symbols: the characters to draw with.
        shares: say behind each strip how many layers are SPARSE.

    Returns: the text, with a ruler of layer numbers above.
    """
    layers = max((len(routes) for _, routes in rows), default=0)
    width = max([len("layer"), *(len(label) for label, _ in rows)])
    lines = []
    for start in range(0, layers, _LAYERS_A_LINE):
        stop = min(start + _LAYERS_A_LINE, layers)
        ruler = "".join(f"{layer:<10}" for layer in range(start, stop, 10)).rstrip()
        lines.append(f"{'layer':<{width}}  {ruler}")
        for label, routes in rows:
            strip = "".join(_symbol(route, symbols) for route in routes[start:stop])
            share = f"  {describe_share(routes)}" if shares else ""
            lines.append(f"{label:<{width}}  {strip}{share}")
    return "\n".join(lines)


def render_layers(
    routes: Sequence[int], full_probability: Sequence[float], symbols: Symbols
) -> str:
    """Draw one request's routes with the router's P(FULL), layer by layer, in columns.

    Args:
        routes: [L] 1 FULL, 0 SPARSE, -1 not routed.
        full_probability: [L] P(FULL); NaN where no router was asked.
        symbols: the characters to draw with.

    Returns: the text.
    """
    cells = [
        _cell(layer, route, probability, symbols)
        for layer, (route, probability) in enumerate(zip(routes, full_probability, strict=True))
    ]
    height = -(-len(cells) // _COLUMNS)
    return "\n".join("   ".join(cells[row::height]).rstrip() for row in range(height))


def render_bar(share: float, symbols: Symbols) -> str:
    """Draw a number from 0 to 1 as a bar."""
    return (symbols.bar * round(share * _BAR_WIDTH)).ljust(_BAR_WIDTH)


def _symbol(route: int, symbols: Symbols) -> str:
    return {_FULL: symbols.full, _SPARSE: symbols.sparse}.get(route, symbols.unrouted)


def _cell(layer: int, route: int, probability: float, symbols: Symbols) -> str:
    name = {_FULL: "FULL", _SPARSE: "sparse"}.get(route, "-")
    text = f"{layer:>3} {_symbol(route, symbols)} {name:<6}"
    if math.isnan(probability):
        return text
    return f"{text} {probability:4.2f} {render_bar(probability, symbols)}"
