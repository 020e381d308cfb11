"""Triangle on CUDA: as streaming does, then the prompts' tails once more, over every key."""

import numpy as np
import torch
from torch.nn import functional

from flux_vllm.attention_backend.cuda.calls import BatchPrefill, Kernels, LayerCall
from flux_vllm.attention_backend.cuda.patterns import streaming
from flux_vllm.batch import Batch
from flux_vllm.patterns import triangle
from flux_vllm.transfer import to_device


def plan(pattern: triangle.Pattern, batch: Batch, device: torch.device) -> BatchPrefill:
    """Attend as streaming does, then the tails once more, to everything."""
    tails = pattern.tails(batch)
    if not tails.any():
        return streaming.plan(pattern, batch, device)
    return _TailPass(to_device(tails.astype(np.int32), device), int(tails.max()))


def long_contexts(max_len: int) -> list[int]:
    """Return none: the kernels are those of short contexts."""
    return []


def nbytes(pattern: triangle.Pattern, *sizes: int) -> int:
    """Return 0: a number a row is little."""
    return 0


class _TailPass:
    """A batch with tails. A row's tail is a row of its own, that begins further on in the batch."""

    def __init__(self, tails: torch.Tensor, longest: int) -> None:
        self._tails = tails
        self._longest = longest
        self._starts: torch.Tensor | None = None
        self._seqused_q: torch.Tensor

    def attend(self, call: LayerCall, kernels: Kernels) -> None:
        kernels.sink_window_pass(call)
        rows = call.metadata.seq_lens.shape[0]
        if self._starts is None:
            self._prepare(call, rows)
        assert self._starts is not None
        seqused_q = self._seqused_q[call.layer, :rows]
        kernels.every_key_pass(call, self._starts, seqused_q, self._longest)

    def _prepare(self, call: LayerCall, rows: int) -> None:
        """Find all layers' tails, in the step's first layer that has any."""
        of_layers = call.views.sparse_seqused_q
        # Padding rows have no tail.
        tails = functional.pad(self._tails, (0, of_layers.shape[1] - len(self._tails)))
        self._starts = call.metadata.query_start_loc.clone()
        self._starts[:-1] = call.metadata.query_start_loc[1:] - tails[:rows]
        # 0 for the rows that a layer does not prefill under SPARSE.
        self._seqused_q = torch.minimum(of_layers, tails)
