"""Which of a model's layers have a route: training counts these, router files count all.

Dimension legend: L layers that have a route.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.inputs import RouterInputs
from flux_vllm.router.model import LayerRouter

_FILE = "layers.json"


@dataclass(frozen=True, slots=True)
class RoutedLayers:
    """The layers of a model that have a route.

    A *place* counts these L alone, from 0; a *number* counts all layers, as servers and files do.
    """

    numbers: tuple[int, ...]
    """Of the L layers, ascending."""
    total: int
    """Layers of the model, the others included."""

    @classmethod
    def every(cls, total: int) -> "RoutedLayers":
        """Make those of a model whose layers all have a route."""
        return cls(tuple(range(total)), total)

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, places: Iterable[int]) -> list[int]:
        """Number layers that are given by their places."""
        return [self.numbers[place] for place in places]

    def place(self, numbers: Iterable[int], what: str) -> list[int]:
        """Find the places of numbered layers.

        Args:
            numbers: of layers.
            what: names them in an error.

        Raises: ValueError: a layer without a route.
        """
        asked = list(numbers)
        missing = sorted(set(asked) - set(self.numbers))
        if missing:
            raise ValueError(
                f"expected {what} among the layers that have a route, {list(self.numbers)} of "
                f"{self.total}, found {missing}; leave these out"
            )
        return [self.numbers.index(number) for number in asked]

    def order(self, places: Iterable[int]) -> tuple[int, ...]:
        """Number all layers in an order of those that have a route; the others come last."""
        others = sorted(set(range(self.total)) - set(self.numbers))
        return (*self.number(places), *others)

    def widen(self, router: LayerRouter) -> LayerRouter:
        """Make routers of all layers; those of layers without a route are zeros."""
        wide = _empty_like(router, self.total)
        return _copy(router, range(len(self)), wide, self.numbers)

    def narrow(self, router: LayerRouter, info: RouterInfo) -> tuple[LayerRouter, RouterInputs]:
        """Take the routers of the L layers out of those of all.

        Args:
            router: as its file has it.
            info: of the file.

        Returns: LayerRouter, and what it looks at, context layers by their places.
        Raises: RouterCheckpointError: of a model with another number of layers.
            ValueError: context layers without a route.
        """
        if info.num_layers != self.total:
            raise RouterCheckpointError(
                f"expected a router of {self.total} layers, the model's, found one of "
                f"{info.num_layers} (trained for {info.base_model or 'an unnamed model'!r}); give "
                "this model's own router"
            )
        context = self.place(info.inputs.context_layers, "the router's context layers")
        narrow = _copy(router, self.numbers, _empty_like(router, len(self)), range(len(self)))
        narrow.make_sparse(self.place(set(info.always_sparse) & set(self.numbers), "layers"))
        return narrow, replace(info.inputs, context_layers=tuple(context))

    def save(self, folder: Path) -> None:
        """Write into a folder in one atomic step."""
        temporary = folder / f".{_FILE}.{os.getpid()}"
        temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")
        temporary.replace(folder / _FILE)

    @classmethod
    def load(cls, folder: Path, count: int) -> "RoutedLayers":
        """Read from a folder; where nothing was written, all of `count` layers have a route."""
        path = folder / _FILE
        if not path.exists():
            return cls.every(count)
        found = json.loads(path.read_text(encoding="utf-8"))
        return cls(tuple(found["numbers"]), found["total"])


def _empty_like(router: LayerRouter, layers: int) -> LayerRouter:
    """Make routers of the same sizes for so many layers, all zeros."""
    widths = tuple(outputs for outputs, _ in router.shapes.values())[:-1]
    vectors = router.num_inputs // router.head_dim
    made = LayerRouter(layers, router.head_dim, vectors, widths).requires_grad_(False)
    for parameter in made.parameters():
        parameter.zero_()
    return made


@torch.no_grad()
def _copy(
    source: LayerRouter, from_layers: Sequence[int], target: LayerRouter, to_layers: Sequence[int]
) -> LayerRouter:
    for name in source.shapes:
        for ours, theirs in zip(target.linear(name), source.linear(name), strict=True):
            ours[list(to_layers)] = theirs[list(from_layers)].to(ours.device)
    return target
