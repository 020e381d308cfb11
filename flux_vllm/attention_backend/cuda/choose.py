"""Which kernels a layer gets, and what memory they need."""

import functools
import logging
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

from flux_vllm.attention_backend.cuda.calls import Kernels, Sizes
from flux_vllm.attention_backend.cuda.fa3_calls import FA3Kernels
from flux_vllm.attention_backend.cuda.triton_calls import SharedWorkspace, TritonKernels
from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.tiles import is_hopper
from flux_vllm.attention_backend.kernels.triton_decode import QUERIES, most_shares
from flux_vllm.attention_backend.kernels.triton_prefill import SUPPORTED_HEAD_DIMS
from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from flux_vllm.routing.runtime import FluxRuntime

logger = logging.getLogger("vllm.flux")

if TYPE_CHECKING:
    from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl


_workspaces: WeakKeyDictionary[FluxRuntime, SharedWorkspace] = WeakKeyDictionary()
"""Of each worker in this process."""


def choose_kernels(impl: "FlashAttentionImpl", runtime: FluxRuntime) -> Kernels:
    """Choose the kernels of a layer: those asked for, else FlashAttention-3 where it runs.

    The log says once why a GPU that could run FlashAttention-3 does not.

    Raises:
        FluxConfigError: FlashAttention-3 was asked for and is not there.
        UnsupportedConfigurationError: the Triton kernels do not take this head size.
    """
    wanted = runtime.config.kernels
    sizes = Sizes(runtime.sink_tokens, runtime.window_tokens, _num_sms(runtime))
    has_fa3 = fa3.is_available() and impl.vllm_flash_attn_version == 3
    if wanted == "fa3" and not has_fa3:
        raise FluxConfigError(
            'flux config: expected FlashAttention-3 for "kernels": "fa3" (a GPU of compute '
            f"capability 9.0), found FlashAttention-{impl.vllm_flash_attn_version} on "
            f'{torch.cuda.get_device_name()}; use "kernels": "triton" or leave it out'
        )
    if wanted is None and not has_fa3 and is_hopper():
        _say_why_triton(
            fa3.why_unavailable()
            or f"vLLM takes FlashAttention-{impl.vllm_flash_attn_version} for a head size of "
            f"{impl.head_size}"
        )
    if wanted == "triton" or not has_fa3:
        if impl.head_size not in SUPPORTED_HEAD_DIMS:
            raise UnsupportedConfigurationError(
                "layer routes with Triton kernels: expected a head_dim among "
                f"{SUPPORTED_HEAD_DIMS}, found {impl.head_size}; serve this model with "
                "--attention-backend FLASH_ATTN"
            )
        workspace = _workspaces.setdefault(runtime, SharedWorkspace(sizes.num_sms))
        return TritonKernels(impl, sizes, workspace)
    return FA3Kernels(impl, sizes)


@functools.cache
def _say_why_triton(reason: str) -> None:
    logger.warning(
        "flux: expected FlashAttention-3 on this GPU, found none that can be used (%s); layers run "
        'on flux\'s Triton kernels, which are slower in FULL prefill. "kernels": "triton" asks '
        "for them and says no more",
        reason,
    )


def workspace_nbytes(
    runtime: FluxRuntime, max_rows: int, heads: int, kv_heads: int, head_dim: int
) -> int:
    """Return the memory of the decode workspace, which the Triton kernels alone have.

    Args:
        runtime: of the worker.
        max_rows: most rows of a batch.
        heads: query heads of this rank.
        kv_heads: of this rank.
        head_dim: of a head.
    """
    if runtime.config.kernels != "triton":
        # Without a GPU sizes are estimated, for one with FlashAttention-3.
        if not torch.cuda.is_available():
            return 0
        if fa3.is_available() and get_flash_attn_version(head_size=head_dim) == 3:
            return 0
    shares = most_shares(max_rows, kv_heads, _num_sms(runtime))
    return 4 * QUERIES * shares * heads * (head_dim + 1)


def _num_sms(runtime: FluxRuntime) -> int:
    """Count the streaming multiprocessors of a worker's GPU."""
    count: int = torch.cuda.get_device_properties(runtime.table.device).multi_processor_count
    return count
