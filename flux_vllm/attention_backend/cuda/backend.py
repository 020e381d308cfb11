"""The CUDA backend: vLLM's FlashAttention backend, steered by routes on the device.

Decode of mixed routes is one attention call a layer over the views of `views.py`, which the step's
first layer writes, in CUDA graphs or out of them: a decode step takes nothing of the host beside
vLLM's own. A batch with prefill rows attends in two passes, and the device assigns rows to them by
their routes, which the host need not know. Nothing here waits for the device.

A batch with prefill rows in which no row can attend differently under SPARSE gets vLLM's own
metadata and calls. Decode steps have one graph for all, not a second one of vLLM's own: where
nothing is SPARSE its views equal vLLM's tables, and writing them takes the device what vLLM's own
plan of the step's calls does, which the graph makes for itself. A second graph of every size would
take twice the time and memory of capturing, to save a few microseconds.
"""

import functools
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import (
    AttentionCGSupport,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends import fa_utils
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadata,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from flux_vllm.attention_backend.cuda.calls import (
    BatchPrefill,
    Kernels,
    LayerCall,
    split_cache,
)
from flux_vllm.attention_backend.cuda.choose import choose_kernels
from flux_vllm.attention_backend.cuda.float8 import float8_operands, quantize_queries
from flux_vllm.attention_backend.cuda.memory import most_rows
from flux_vllm.attention_backend.cuda.passes import LayerPasses
from flux_vllm.attention_backend.cuda.patterns import plan_batch
from flux_vllm.attention_backend.cuda.share import join_views, kind_of
from flux_vllm.attention_backend.cuda.views import GroupViews
from flux_vllm.attention_backend.cuda.warm_up import warm_up
from flux_vllm.attention_backend.kernels.paged import KVCache
from flux_vllm.attention_backend.kernels.tiles import MOST_QUERY_HEADS
from flux_vllm.attention_backend.layer import LayerBinding, bound_layers
from flux_vllm.batch import Batch
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.routing.probe import ProbeMetadata
from flux_vllm.routing.runtime import FluxRuntime
from flux_vllm.selection import BACKEND_NAME


class FluxCUDABackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with a route per request and layer."""

    @staticmethod
    def get_name() -> str:
        """Return the enum name that selects this backend."""
        return BACKEND_NAME

    @staticmethod
    def get_impl_cls() -> type["FluxCUDAImpl"]:
        """Return the implementation class."""
        return FluxCUDAImpl

    @staticmethod
    def get_builder_cls() -> type["FluxCUDAMetadataBuilder"]:
        """Return the metadata builder class."""
        return FluxCUDAMetadataBuilder

    @classmethod
    def supports_attn_type(cls, attn_type: str) -> bool:
        """Only causal decoders are routed."""
        return attn_type == AttentionType.DECODER

    @classmethod
    def supports_non_causal(cls) -> bool:
        """Only causal attention is routed."""
        return False

    @classmethod
    def supports_rswa(cls) -> bool:
        """Reference sliding windows have no route."""
        return False

    @classmethod
    def supports_mm_prefix(cls) -> bool:
        """Bidirectional prefixes have no route."""
        return False

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """A float8 KV cache has one scale a layer."""
        return False


@dataclass(slots=True)
class CudaRoutes:
    """The routes' side of one batch's attention metadata."""

    group: GroupViews
    """Of the metadata's KV cache group."""
    passes: LayerPasses | None = None
    """By layer of the group; None in a step without prefill rows."""
    sparse_prefill: BatchPrefill | None = None
    """The sparse pass; there in a step in which any layer may need it."""


class FluxCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Adds a CudaRoutes to vLLM's metadata, as `metadata.flux`; None where vLLM's call serves."""

    # Full graphs replay decode only: the passes of prefill rows are chosen in Python.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # vLLM would reuse another group's metadata with only the tables swapped: stale views.
    supports_update_block_table = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.supports_draft_decode_metadata_update = False
        context = self.vllm_config.compilation_config.static_forward_context
        self._bind(bound_layers(context, self.layer_names), most_rows(self.vllm_config))

    def _bind(self, layers: list[Any], capacity: int) -> None:
        """Take up the group's routed layers."""
        self._layers = layers
        self._group: GroupViews | None = None
        self._runtime: FluxRuntime | None = layers[0].impl.binding.runtime if layers else None
        if self._runtime is None or self._runtime.config.policy == "full":
            return
        self._group = join_views(layers, self.block_size, capacity, self.device)
        for index, layer in enumerate(layers):
            layer.impl.group_index = index
        if self._group.index == 0:
            kind = kind_of(layers[0], self.block_size)
            self._runtime.warm_ups[kind] = partial(warm_up, self, layers[0], self._runtime)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """Build vLLM's metadata, and the routes' side of it where they can make a difference."""
        routes = None
        if self._group is not None:
            assert self._runtime is not None
            routes = self._make_routes(self._group, self._runtime)
            # vLLM's plan would be for its own call. The first build finds out about windows.
            fast_build |= routes is not None and self.aot_sliding_window is not None
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.flux = routes
        if routes is not None:
            routes.group.begin_step(metadata.block_table)
        return metadata

    def _make_routes(self, group: GroupViews, runtime: FluxRuntime) -> CudaRoutes | None:
        current, views = runtime.current, group.views
        if current is None:
            views.set_rows(None, runtime.table)
            return CudaRoutes(group)
        if not current.batch.has_prefill:
            views.set_rows(current.slots, runtime.table)
            return CudaRoutes(group)
        routes = self._plan_passes(group, runtime, current.batch)
        if routes is not None and group.index == 0:
            views.set_rows(current.slots, runtime.table)
            views.set_prefill(current.batch.is_prefill)
        return routes

    def _plan_passes(
        self, group: GroupViews, runtime: FluxRuntime, batch: Batch
    ) -> CudaRoutes | None:
        """Say which passes the layers may need; None where no row can attend differently."""
        end = batch.computed + batch.scheduled
        reach = runtime.sink_tokens + runtime.window_tokens
        beyond = end > np.where(batch.is_prefill, runtime.pattern.reach, reach)
        # vLLM's warm-up has short prompts only: let it run all passes all the same.
        if not beyond.any() and not batch.is_warmup:
            return None
        columns = [layer.impl.binding.layer for layer in self._layers]
        passes = LayerPasses(runtime, columns, batch, beyond & batch.is_prefill)
        if not any(passes.sparse):
            return CudaRoutes(group, passes)
        return CudaRoutes(group, passes, plan_batch(runtime.pattern, batch, self.device))


class FluxCUDAImpl(FlashAttentionImpl):
    """Attends each request of the batch under its route in one layer."""

    binding: LayerBinding | None = None
    """Set when the model is loaded; None for a layer with a sliding window of its own."""
    group_index: int
    """Index among the routed layers of its KV cache group."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.is_float8 = is_quantized_kv_cache(self.kv_cache_dtype)
        refused = {
            "ALiBi slopes": self.alibi_slopes is not None,
            "attention logits softcap": bool(self.logits_soft_cap),
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            f"{self.num_queries_per_kv} query heads a KV head (at most {MOST_QUERY_HEADS})": (
                self.num_queries_per_kv > MOST_QUERY_HEADS
            ),
        }
        found = [what for what, present in refused.items() if present]
        if found:
            raise UnsupportedConfigurationError(
                "layer routes on CUDA: expected plain causal attention over a KV cache, found "
                f"{', '.join(found)}; serve with --attention-backend FLASH_ATTN"
            )

    @functools.cached_property
    def kernels(self) -> Kernels:
        """The kernels that this layer calls, once it is bound."""
        assert self.binding is not None
        return choose_kernels(self, self.binding.runtime)

    @property
    def kernels_name(self) -> str:
        """Say which kernels serve this layer, once it is bound: `fa3` or `triton`."""
        return self.kernels.name

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlashAttentionMetadata | ProbeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend; shapes as in vLLM's `FlashAttentionImpl.forward`."""
        if isinstance(attn_metadata, ProbeMetadata):
            attn_metadata.keep(query)
            key, value = attn_metadata.to_attend(key, value)
            return self._attend_probe(query, key, value, attn_metadata.cu_seqlens, output)
        routes: CudaRoutes | None = None
        if attn_metadata is not None and self.binding is not None:
            routes = attn_metadata.flux
        if routes is None:
            if attn_metadata is not None and self._takes_other_queries(query):
                query = quantize_queries(query, layer)
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        assert attn_metadata is not None
        group, views = routes.group, routes.group.views
        passes = routes.passes
        if views.is_pending:
            has_prefill = passes is not None
            views.write(attn_metadata.seq_lens, attn_metadata.query_start_loc, has_prefill)
            if not has_prefill:
                views.plans = self.kernels.plan(views, attn_metadata)
        tokens = attn_metadata.num_actual_tokens
        if query.shape[0] != tokens:  # a slice costs the host more than the question
            query, output = query[:tokens], output[:tokens]
        cache = self._split(kv_cache, layer)
        index = self.group_index
        of_views = group.first_layer + index
        rows = views.layer_rows(attn_metadata.seq_lens.shape[0])[of_views]
        assert group.table is not None
        out = output.view(query.shape)
        call = LayerCall(
            query, cache, out, attn_metadata, group.table, views.layer_views, of_views, rows
        )
        if self.is_float8 and self.kernels.name == "fa3":
            call.float8 = float8_operands(query, layer)
        if passes is None:
            if views.plans is not None:
                call.plan = views.plans[of_views]
            self.kernels.decode(call)
            return output
        passes.look()
        if passes.full[index]:
            self.kernels.full_pass(call)
        if passes.sparse[index]:
            assert routes.sparse_prefill is not None
            routes.sparse_prefill.attend(call, self.kernels)
        return output

    def _takes_other_queries(self, query: torch.Tensor) -> bool:
        """Tell whether vLLM's own call takes float8 queries and these are not yet."""
        return self.is_float8 and self.supports_quant_query_input and query.element_size() > 1

    def _split(self, kv_cache: torch.Tensor, layer: Any) -> KVCache:
        """View vLLM's cache of a layer as keys and values, with their scales."""
        if not self.is_float8:
            return split_cache(kv_cache, self.head_size)
        cache = split_cache(kv_cache.view(torch.float8_e4m3fn), self.head_size)
        return cache._replace(key_scale=layer._k_scale_float, value_scale=layer._v_scale_float)

    def _attend_probe(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        cu_seqlens: torch.Tensor,
        output: torch.Tensor,
    ) -> torch.Tensor:
        """Attend one causal sequence without a KV cache: query [T, N, H], key and value [T, K, H].

        A layer's own sliding window counts the sequence's tokens, which are not all neighbours.
        Host sync: none. CUDA graph: safe.
        """
        tokens = query.shape[0]
        fa_utils.flash_attn_varlen_func(
            q=query,
            k=key,
            v=value,
            out=output.view(query.shape),
            cu_seqlens_q=cu_seqlens,
            cu_seqlens_k=cu_seqlens,
            max_seqlen_q=tokens,
            max_seqlen_k=tokens,
            softmax_scale=self.scale,
            causal=True,
            window_size=None if self.sliding_window is None else list(self.sliding_window),
            fa_version=self.vllm_flash_attn_version,
            s_aux=self.sinks,
        )
        return output
