"""What the CUDA backend's buffers take, counted before vLLM sizes the KV cache."""

from typing import Any

from vllm.v1.kv_cache_interface import is_quantized_kv_cache

from flux_vllm.attention_backend.cuda.choose import workspace_nbytes
from flux_vllm.attention_backend.cuda.patterns import prefill_nbytes
from flux_vllm.attention_backend.cuda.views import ViewBuffers
from flux_vllm.attention_backend.layer import bound_layers
from flux_vllm.routing.runtime import FluxRuntime


def most_rows(vllm_config: Any) -> int:
    """Return the most rows of a batch, padding for CUDA graphs included.

    A multiple of 4: every layer's part of a buffer then lies at a multiple of 16 bytes, as kernels
    are compiled for.
    """
    largest_graph = vllm_config.compilation_config.max_cudagraph_capture_size or 0
    rows: int = max(vllm_config.scheduler_config.max_num_seqs, largest_graph)
    return -(-rows // 4) * 4


def fixed_nbytes(runtime: FluxRuntime, vllm_config: Any, groups: list[Any]) -> int:
    """Return the memory of all builders' buffers, one builder a KV cache group.

    Args:
        runtime: of the worker.
        vllm_config: of the engine.
        groups: vLLM's KVCacheGroupSpec of each group.
    """
    rows, model = most_rows(vllm_config), vllm_config.model_config
    heads = model.get_num_attention_heads(vllm_config.parallel_config)
    tokens = vllm_config.scheduler_config.max_num_batched_tokens
    if runtime.config.policy == "full":
        return 0
    queries = 0
    if is_quantized_kv_cache(vllm_config.cache_config.cache_dtype):
        queries = tokens * heads * model.get_head_size()  # a layer's, quantized
    total = queries + prefill_nbytes(
        runtime.pattern,
        heads,
        tokens,
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
            total += ViewBuffers.nbytes(rows, [width], len(layers), runtime.table.num_layers)
    return total + max(workspace_nbytes(runtime, rows, heads, *shape) for shape in shapes)
