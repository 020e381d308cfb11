"""Which passes a layer makes: all, until the host knows the routes; then those that rows need.

Oracle: the passes written down for each batch. A row that is not apart attends in the full pass.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from flux_vllm.attention_backend.cuda.passes import LayerPasses
from flux_vllm.batch import Batch
from flux_vllm.router.route import Route

SPARSE, FULL = int(Route.SPARSE), int(Route.FULL)


class Runtime:
    """Stands in for FluxRuntime: what the host knows, by row of the batch."""

    def __init__(self, known: dict[int, list[int]] | None, sparse_prefill: bool = False) -> None:
        self.known = known
        self.asked = 0
        self.config = SimpleNamespace(sparse_prefill=sparse_prefill)
        self.is_decided = np.array([True, False, True, True])

    def known_routes(self, rows: np.ndarray) -> Any:
        self.asked += 1
        if self.known is None:
            return None
        routes = [self.known[row] for row in rows.tolist()]
        return np.array(routes, dtype=np.int8).reshape(len(rows), 4)


def passes(runtime: Any, apart: list[bool], is_warmup: bool = False) -> LayerPasses:
    """Make the passes of the model's layers 3 and 1."""
    batch: Any = SimpleNamespace(is_warmup=is_warmup)
    assert hasattr(Batch, "is_warmup")
    return LayerPasses(runtime, [3, 1], batch, np.array(apart))


@pytest.mark.parametrize(
    ("apart", "full", "sparse"),
    [
        ([True, True], [False, True], [True, False]),
        ([True, False], [True, True], [True, False]),
        ([False], [True, True], [False, False]),
    ],
    ids=["all-apart", "beside-decode", "none-apart"],
)
def test_prompts_that_are_sparse_in_every_layer(apart: list, full: list, sparse: list) -> None:
    """Nobody waits for routes; layer 1 has none, and attends to everything."""
    runtime = Runtime(None, sparse_prefill=True)
    found = passes(runtime, apart)
    assert (found.full, found.sparse) == (full, sparse)
    assert not runtime.asked


@pytest.mark.parametrize(
    ("apart", "routes", "full", "sparse"),
    [
        ([True], {0: [9, SPARSE, 9, FULL]}, [True, False], [False, True]),
        ([True], {0: [9, SPARSE, 9, SPARSE]}, [False, False], [True, True]),
        ([False, True], {1: [9, SPARSE, 9, FULL]}, [True, True], [False, True]),
        (
            [True, True],
            {0: [9, SPARSE, 9, FULL], 1: [9, SPARSE, 9, SPARSE]},
            [True, False],
            [True, True],
        ),
        ([False], {}, [True, True], [False, False]),
    ],
    ids=["one", "all-sparse", "beside-decode", "two", "none-apart"],
)
def test_known_routes(apart: list[bool], routes: dict, full: list, sparse: list) -> None:
    found = passes(Runtime(routes), apart)
    assert (found.full, found.sparse) == (full, sparse)


def test_unknown_routes_take_both_until_they_come_in() -> None:
    runtime = Runtime(None)
    found = passes(runtime, [True])
    found.look()
    assert (found.full, found.sparse) == ([True, True], [True, True])
    runtime.known = {0: [9, SPARSE, 9, FULL]}
    found.look()
    assert (found.full, found.sparse) == ([True, False], [False, True])
    asked = runtime.asked
    found.look()
    assert runtime.asked == asked


def test_a_warm_up_makes_all() -> None:
    runtime = Runtime({0: [SPARSE] * 4})
    found = passes(runtime, [True], is_warmup=True)
    found.look()
    assert (found.full, found.sparse) == ([True, True], [True, True])
    assert runtime.asked == 0
