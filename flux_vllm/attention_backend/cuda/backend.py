"""The CUDA backend: vLLM's FlashAttention backend, steered by routes on the device.

Decode of mixed routes is one attention call a layer over the views of `views.py`, in CUDA graphs or
out of them. A batch with prefill rows attends in two passes, and the device assigns rows to them by
the route table: the host never knows the routes. Nothing here waits for the device.
"""

import functools
from dataclasses import dataclass
from typing import Any

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

from flux_vllm import compat
from flux_vllm.attention_backend.cuda.calls import (
    FA3Kernels,
    Kernels,
    LayerCall,
    choose_kernels,
    split_cache,
    workspace_nbytes,
)
from flux_vllm.attention_backend.cuda.views import RowFacts, ViewBuffers
from flux_vllm.attention_backend.layer import LayerBinding, bound_layers
from flux_vllm.batch import Batch
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns.base import CudaPrefill
from flux_vllm.router.route import Route
from flux_vllm.routing.probe import ProbeMetadata
from flux_vllm.routing.runtime import FluxRuntime

compat.install_worker_hooks()


class FluxCUDABackend(FlashAttentionBackend):
    """vLLM's FlashAttention backend with a route per request and layer."""

    @staticmethod
    def get_name() -> str:
        """Return the enum name that selects this backend."""
        return "FLUX"

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
    def supports_sink(cls) -> bool:
        """Learned sinks have no sparse counterpart here."""
        return False

    @classmethod
    def supports_kv_cache_dtype(cls, kv_cache_dtype: str | None) -> bool:
        """The router must see queries before vLLM quantizes them, so no float8 KV cache."""
        return kv_cache_dtype in (None, "auto", "float16", "bfloat16")


@dataclass(slots=True)
class CudaRoutes:
    """The routes' side of one batch's attention metadata."""

    views: ViewBuffers
    """Not written in a step that is `by_vllm`."""
    full_pass: list[bool]
    """By layer of the group: whether any row may need the full pass."""
    sparse_pass: list[bool]
    """By layer of the group: whether any row may need the sparse pass."""
    plans: torch.Tensor | None = None
    """[L, size]: of a step without prefill rows, what the kernels planned for their calls."""
    has_prefill: bool = False
    by_vllm: bool = False
    """Whether vLLM's own call serves the batch: all rows are prefill within the SPARSE pattern's
    reach, where both routes attend alike, and its kernel is the one that we would call."""
    sparse_prefill: CudaPrefill | None = None
    """The sparse pass; there in a step in which any layer may need it."""


class FluxCUDAMetadataBuilder(FlashAttentionMetadataBuilder):
    """Adds a CudaRoutes to vLLM's metadata, as `metadata.flux`."""

    # Full graphs replay decode only: the passes of prefill rows are chosen in Python.
    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH
    # vLLM would reuse another group's metadata with only the tables swapped: stale views.
    supports_update_block_table = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.supports_draft_decode_metadata_update = False
        context = self.vllm_config.compilation_config.static_forward_context
        self._layers = bound_layers(context, self.layer_names)
        for index, layer in enumerate(self._layers):
            layer.impl.group_index = index
        self._views: ViewBuffers | None = None
        self._capacity = most_rows(self.vllm_config)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> FlashAttentionMetadata:
        """Build vLLM's metadata, and the views of the same rows."""
        runtime = self._layers[0].impl.binding.runtime if self._layers else None
        routes = None
        if runtime is not None and runtime.config.policy != "full":
            routes = self._make_routes(runtime, common_attn_metadata.block_table_tensor.shape[1])
            # vLLM's plan would be for its own call. The first build finds out about windows.
            fast_build |= not routes.by_vllm and self.aot_sliding_window is not None
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        metadata.flux = routes
        if routes is not None:
            assert runtime is not None
            self._write_routes(routes, runtime, metadata)
        return metadata

    def _make_routes(self, runtime: FluxRuntime, width: int) -> CudaRoutes:
        layers = len(self._layers)
        routes = CudaRoutes(self._view_buffers(runtime, width), [True] * layers, [False] * layers)
        if runtime.current is not None:
            self._plan_passes(routes, runtime, runtime.current.batch)
        return routes

    def _write_routes(
        self, routes: CudaRoutes, runtime: FluxRuntime, metadata: FlashAttentionMetadata
    ) -> None:
        current, views = runtime.current, routes.views
        facts = None
        if current is not None:
            facts = RowFacts(current.slots, current.batch.is_prefill)
        if not routes.by_vllm:
            views.write(
                metadata.block_table,
                metadata.seq_lens,
                metadata.query_start_loc,
                facts,
                runtime.table.routes,
            )
        if not routes.has_prefill:
            routes.plans = self._layers[0].impl._kernels.plan(views, metadata)

    def _plan_passes(self, routes: CudaRoutes, runtime: FluxRuntime, batch: Batch) -> None:
        """Say which passes the layers of a batch may need."""
        routes.has_prefill = bool(batch.is_prefill.any())
        if not routes.has_prefill:
            return
        layers = len(self._layers)
        end = batch.computed + batch.scheduled
        beyond = batch.is_prefill & (end > runtime.pattern.reach)
        # vLLM's warm-up has short prompts only: let it compile all passes all the same.
        may_be_sparse = bool(beyond.any()) or batch.is_warmup
        routes.by_vllm = (
            not may_be_sparse
            and bool(batch.is_prefill.all())
            and isinstance(self._layers[0].impl._kernels, FA3Kernels)
        )
        routes.sparse_pass = [may_be_sparse] * layers
        fixed = runtime.fixed_routes
        if fixed is not None:
            by_layer = [fixed[layer.impl.binding.layer] for layer in self._layers]
            routes.sparse_pass = [may_be_sparse and route == Route.SPARSE for route in by_layer]
            routes.full_pass = [not (route == Route.SPARSE and beyond.all()) for route in by_layer]
        if any(routes.sparse_pass):
            routes.sparse_prefill = runtime.pattern.cuda_prefill(batch, self.device)

    def _view_buffers(self, runtime: FluxRuntime, width: int) -> ViewBuffers:
        if self._views is None:
            self._views = ViewBuffers(
                self._capacity,
                width,
                [layer.impl.binding.layer for layer in self._layers],
                self.block_size,
                runtime.sink_tokens,
                runtime.window_tokens,
                runtime.pattern.reach,
                self.device,
            )
        return self._views


class FluxCUDAImpl(FlashAttentionImpl):
    """Attends each request of the batch under its route in one layer."""

    binding: LayerBinding | None = None
    """Set when the model is loaded; None for a layer with a sliding window of its own."""
    group_index: int
    """Index among the routed layers of its KV cache group."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        refused = {
            "ALiBi slopes": self.alibi_slopes is not None,
            "attention logits softcap": bool(self.logits_soft_cap),
            "learned attention sinks": self.sinks is not None,
            f"attention of type {self.attn_type}": self.attn_type != AttentionType.DECODER,
            "a KV cache shared between layers": self.kv_sharing_target_layer_name is not None,
        }
        found = [what for what, present in refused.items() if present]
        if found:
            raise UnsupportedConfigurationError(
                "layer routes on CUDA: expected plain causal attention over a KV cache, found "
                f"{', '.join(found)}; serve with --attention-backend FLASH_ATTN"
            )

    @functools.cached_property
    def _kernels(self) -> Kernels:
        """The kernels that this layer calls, once it is bound."""
        assert self.binding is not None
        return choose_kernels(self, self.binding.runtime)

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
            return self._attend_probe(query, key, value, attn_metadata.cu_seqlens, output)
        routes: CudaRoutes | None = None
        if attn_metadata is not None and self.binding is not None:
            routes = attn_metadata.flux
        if routes is None or routes.by_vllm:
            # For a step of ours the same FA3 call, with the work planned ahead.
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output,
                output_scale, output_block_scale,
            )  # fmt: skip
        assert attn_metadata is not None
        tokens, index = attn_metadata.num_actual_tokens, self.group_index
        if query.shape[0] != tokens:  # a slice costs the host more than the question
            query = query[:tokens]
        keys, values = split_cache(kv_cache, self.head_size)
        out = output[:tokens].view(query.shape)
        rows = routes.views.layer_rows(attn_metadata.seq_lens.shape[0])[index]
        call = LayerCall(query, keys, values, out, attn_metadata, routes.views, rows)
        if not routes.has_prefill:
            if routes.plans is not None:
                call.plan = routes.plans[index]
            self._kernels.decode(call)
            return output
        if routes.full_pass[index]:
            self._kernels.full_pass(call)
        if routes.sparse_pass[index]:
            assert routes.sparse_prefill is not None
            routes.sparse_prefill.attend(call, self._kernels)
        return output

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
        )
        return output


def most_rows(vllm_config: Any) -> int:
    """Return the most rows of a batch, padding for CUDA graphs included."""
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    return max(vllm_config.scheduler_config.max_num_seqs, largest_graph)


def fixed_nbytes(runtime: FluxRuntime, vllm_config: Any, groups: list[Any]) -> int:
    """Return the memory of all builders' buffers, one builder a KV cache group.

    Args:
        runtime: of the worker.
        vllm_config: of the engine.
        groups: vLLM's KVCacheGroupSpec of each group.
    """
    if runtime.config.policy == "full":
        return 0
    rows, model = most_rows(vllm_config), vllm_config.model_config
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    total = runtime.pattern.cuda_nbytes(
        heads,
        vllm_config.scheduler_config.max_num_batched_tokens,
        model.max_model_len,
        model.get_head_size() * model.dtype.itemsize,
    )
    shapes = set()
    for group in groups:
        context = vllm_config.compilation_config.static_forward_context
        layers = bound_layers(context, group.layer_names)
        shapes |= {(layer.num_kv_heads, layer.head_size) for layer in layers}
        # vLLM rounds a table's width up to whole 128 tokens.
        width = -(-model.max_model_len // group.kv_cache_spec.block_size) + 128
        if layers:
            total += ViewBuffers.nbytes(rows, width, len(layers))
    return total + max(workspace_nbytes(runtime, rows, heads, *shape) for shape in shapes)
