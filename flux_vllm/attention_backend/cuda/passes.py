"""Which passes a layer's prefill makes: the full one, the sparse one, or both.

Rows that a pass has no part in are skipped by the device, but a pass costs the host its launch all
the same. So layers make those alone that their rows may need, as soon as the host knows the routes:
at once under a fixed policy and in a prompt's later chunks, within a prompt's first chunk from the
layer on by which the probe's answer has come in. Nothing waits for it.
"""

from collections.abc import Sequence

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.router.route import Route
from flux_vllm.routing.runtime import FluxRuntime


class LayerPasses:
    """The passes of one batch's layers.

    Args:
        runtime: of the worker; the batch is its current one.
        columns: of the layers, their places in the model.
        batch: with prefill rows.
        apart: [R] bool: prefill rows that attend otherwise under SPARSE than under FULL.
    """

    def __init__(
        self, runtime: FluxRuntime, columns: Sequence[int], batch: Batch, apart: np.ndarray
    ) -> None:
        self._runtime = runtime
        self._columns = columns
        self._apart = np.flatnonzero(apart)
        self._all_apart = bool(apart.all())
        # vLLM's warm-up, and ours, are to make all passes.
        self._is_open = not batch.is_warmup
        self.full = [True] * len(columns)
        """By layer: whether any row may need the full pass."""
        self.sparse = [True] * len(columns)
        """By layer: whether any row may need the sparse pass."""
        self.look()

    def look(self) -> None:
        """Leave out passes that no row needs, if the host knows the routes by now."""
        if not self._is_open:
            return
        runtime = self._runtime
        if runtime.config.sparse_prefill:
            is_sparse = runtime.is_decided[None, self._columns]
        else:
            known = runtime.known_routes(self._apart)
            if known is None:
                return
            is_sparse = known[:, self._columns] == Route.SPARSE
        self._is_open = False
        some = len(self._apart) > 0
        self.sparse = (is_sparse.any(axis=0) & some).tolist()
        self.full = (~(is_sparse.all(axis=0) & self._all_apart)).tolist()
