"""The CPU backend: vLLM's own CPU attention kernels, steered by routes.

FULL rows and SPARSE decode rows share one call of vLLM's kernel per layer, the latter through a
compacted block table; SPARSE prefill rows are computed by the sparse pattern. This is the
embedded default: correct everywhere, no claim of speed.
"""

import torch
from vllm import _custom_ops as ops
from vllm import envs
from vllm.v1.attention.backend import AttentionType, CommonAttentionMetadata
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadata,
    CPUAttentionMetadataBuilder,
)

from flux_vllm.attention_backend.cpu.batch_plan import CpuRoutes
from flux_vllm.attention_backend.cpu.masked import attend_masked
from flux_vllm.attention_backend.cpu.pages import PageLayout, learn_page_layout
from flux_vllm.attention_backend.layer import LayerBinding, bound_layers
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.routing.probe import ProbeMetadata
from flux_vllm.selection import BACKEND_NAME

_PROBE_ROWS = 1024
"""Queries of a probe attended at once: their mask is held in memory."""


class FluxCPUBackend(CPUAttentionBackend):
    """vLLM's CPU backend with a route per request and layer."""

    @staticmethod
    def get_name() -> str:
        """Return the enum name that selects this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["FluxCPUImpl"]:
        """Return the implementation class."""
        return FluxCPUImpl

    @staticmethod
    def get_builder_cls() -> type["FluxCPUMetadataBuilder"]:
        """Return the metadata builder class."""
        return FluxCPUMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Only causal decoders are routed."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Only causal attention is routed."""
        return False


class FluxCPUMetadataBuilder(CPUAttentionMetadataBuilder):
    """Adds a CpuRoutes to vLLM's metadata, as `metadata.flux`, for batches of real requests."""

    # vLLM would reuse another group's metadata with only the tables swapped: stale views.
    supports_update_block_table = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        context = self.vllm_config.compilation_config.static_forward_context
        self._layers = bound_layers(context, self.layer_names)
        for layer in self._layers:
            kv_cache_dtype = layer.impl.kv_cache_dtype
            layout = learn_page_layout(
                self.isa, self.block_size, self.head_dim, self.dtype, kv_cache_dtype
            )
            layer.impl.page_layout = layout.of_layer(
                kv_cache_dtype, self.dtype, layer._k_scale_float, layer._v_scale_float
            )

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> CPUAttentionMetadata:
        """Build vLLM's metadata, and the routes' side of it where they can make a difference."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.flux = None
        if not self._layers:
            return metadata
        runtime = self._layers[0].impl.binding.runtime
        if runtime.current is not None and runtime.config.policy != "full":
            metadata.flux = CpuRoutes(runtime, metadata, self)
        return metadata

    def schedule(self, seq_lens: torch.Tensor, query_start_loc: torch.Tensor) -> torch.Tensor:
        """Compute the kernel's work schedule for other rows than the batch's own.

        Args:
            seq_lens: [R] int32.
            query_start_loc: [R + 1] int32.

        Returns: opaque int8 tensor for `scheduler_metadata`.
        """
        return ops.cpu_attn_get_scheduler_metadata(
            num_reqs=len(seq_lens),
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            seq_lens=seq_lens,
            dtype=self.dtype,
            query_start_loc=query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
            dynamic_causal=None,
            kv_cache_dtype=self.kv_cache_dtype,
        )


class FluxCPUImpl(CPUAttentionBackendImpl):
    """Attends each request of the batch under its route in one layer."""

    binding: LayerBinding | None = None
    """Set when the model is loaded; None for a layer with a sliding window of its own."""

    page_layout: PageLayout
    """How vLLM packs this layer's keys; set by the metadata builder."""

    kernels_name = "cpu"

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "ALiBi slopes": self.alibi_slopes is not None,
            "attention logits softcap": bool(self.logits_soft_cap),
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
        }
        found = [what for what, present in refused.items() if present]
        if found:
            raise UnsupportedConfigurationError(
                "layer routes on the CPU: expected plain causal attention over a KV cache, found "
                f"{', '.join(found)}; serve with --attention-backend CPU_ATTN"
            )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUAttentionMetadata | ProbeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; shapes as in vLLM's `CPUAttentionBackendImpl.forward`."""
        if isinstance(attn_metadata, ProbeMetadata):
            attn_metadata.keep(query)
            key, value = attn_metadata.to_attend(key, value)
            return self._attend_probe(query, key, value, output)
        routes: CpuRoutes | None = None if attn_metadata is None else attn_metadata.flux
        rest = (output_scale, output_block_scale)
        if routes is None or self.binding is None:
            return super().forward(layer, query, key, value, kv_cache, attn_metadata, output, *rest)
        plan = routes.plan(self.binding.layer)
        if plan.kernel is not None:  # else every row is a SPARSE prefill
            if plan.tokens is None:
                super().forward(layer, query, key, value, kv_cache, plan.kernel, output, *rest)
            else:
                # vLLM's kernel takes its rows' queries in one piece.
                part = torch.empty_like(output[: len(plan.tokens)])
                picked = query[plan.tokens]
                super().forward(layer, picked, key, value, kv_cache, plan.kernel, part, *rest)
                output[plan.tokens] = part
        shape = (-1, self.num_heads, self.head_size)
        # vLLM's CPU kernels keep the model's dtype in a cache of any other as wide.
        pages = kv_cache if self.is_fp8_kv_cache else kv_cache.view(query.dtype)
        for rows, prefill in plan.sparse_prefills:
            part = output[rows].view(shape)
            prefill.attend(query[rows], pages, self.page_layout, self.scale, self.sinks, part)
        return output

    def _attend_probe(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, output: torch.Tensor
    ) -> torch.Tensor:
        """Attend one causal sequence without a KV cache: query [T, N, H], key and value [T, K, H].

        A layer's own sliding window counts the sequence's tokens, which are not all neighbours.
        """
        tokens = torch.arange(len(query))
        window = self.sliding_window if self.sliding_window > 0 else len(query)
        keys, values = key.transpose(0, 1), value.transpose(0, 1)
        attended = output.view(query.shape)
        for rows in tokens.split(_PROBE_ROWS):
            distance = rows[:, None] - tokens
            mask = (distance >= 0) & (distance < window)
            part = query[rows].transpose(0, 1)
            attended[rows] = attend_masked(part, keys, values, mask, self.scale, self.sinks)
        return output
