"""Streaming on CUDA: the kernels' own pass over sinks and window."""

import torch

from flux_vllm.attention_backend.cuda.calls import Kernels, LayerCall
from flux_vllm.batch import Batch
from flux_vllm.patterns import streaming


def plan(pattern: streaming.Pattern, batch: Batch, device: torch.device) -> "SinkWindowPass":
    """Plan nothing: the kernels know the sizes."""
    return SinkWindowPass()


def long_contexts(max_len: int) -> list[int]:
    """Return none: the kernels are those of short contexts."""
    return []


def nbytes(pattern: streaming.Pattern, *sizes: int) -> int:
    """Return 0: nothing is held."""
    return 0


class SinkWindowPass:
    """A batch under streaming."""

    def attend(self, call: LayerCall, kernels: Kernels) -> None:
        """Attend to sinks and window, exactly."""
        kernels.sink_window_pass(call)
