"""From a configuration to a running FluxRuntime: every check made before the first request."""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flux_vllm import compat
from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.attention_backend.rope_use import change_after_rope, rotates_always
from flux_vllm.attention_backend.rotary import RotaryInverse
from flux_vllm.config import FluxConfig
from flux_vllm.errors import (
    FluxConfigError,
    RouterCheckpointError,
    UnsupportedConfigurationError,
)
from flux_vllm.kv.check import always_sparse_layers, check_free_kv
from flux_vllm.kv.worker import hook_runner
from flux_vllm.metrics.directory import metrics_directory, prepare_front_end
from flux_vllm.metrics.journal import RouteJournal
from flux_vllm.metrics.reporter import RouteReporter
from flux_vllm.metrics.store import MetricStore
from flux_vllm.patterns.base import make_pattern
from flux_vllm.router.checkpoint import ROUTER_FILE_NAME, RouterInfo, read_router
from flux_vllm.router.features import GRANULE_TOKENS
from flux_vllm.router.model import LayerRouter
from flux_vllm.runtime import FluxRuntime

logger = logging.getLogger("vllm.flux")

_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32")


def check_front_end(vllm_config: Any) -> None:
    """Check all that can be known before the model loads, so that mistakes end the start early.

    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    if not compat.uses_flux(vllm_config):
        return
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    _check_features(vllm_config)
    if config.kernels is not None and vllm_config.device_config.device_type == "cpu":
        raise FluxConfigError(
            f'flux config: expected no "kernels" on the CPU, found {config.kernels!r}; remove it, '
            "it chooses among CUDA kernels"
        )
    model = vllm_config.model_config
    config.check_layers(model.get_total_num_hidden_layers())
    _, info = _read_router(config, vllm_config)
    if info is not None:
        _check_fit(info, model.get_total_num_hidden_layers(), model.get_head_size())
    make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options)
    if config.free_kv:
        check_free_kv(config, info, vllm_config)
    prepare_front_end()


def attach(model: nn.Module, vllm_config: Any, device: torch.device) -> FluxRuntime:
    """Bind a runtime to the attention layers of a model that was just loaded.

    Args:
        model: vLLM's model.
        vllm_config: the engine's configuration.
        device: of the worker.

    Returns: FluxRuntime.
    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    _check_features(vllm_config)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    config.check_layers(num_layers)
    router, info = _read_router(config, vllm_config)
    layers = _routed_layers(model)
    for _, attention, _ in layers:
        if info is not None:
            _check_fit(info, num_layers, attention.head_size)
    unrouted = set(config.sparse_layers or ()) - {index for index, _, _ in layers}
    if unrouted:
        raise FluxConfigError(
            "flux config: expected sparse_layers with full attention in the model, found "
            f"{sorted(unrouted)}, which keep a sliding window of the model's own; remove them"
        )
    runtime = FluxRuntime(
        config,
        router.to(device) if config.needs_router and router is not None else None,
        info,
        num_layers,
        tuple(index for index, _, _ in layers),
        vllm_config.scheduler_config.max_num_seqs,
        device,
        _mean_over_ranks,
    )
    rotaries: dict[int, RotaryInverse] = {}
    for index, attention, rotary in layers:
        if id(rotary) not in rotaries:
            rotaries[id(rotary)] = RotaryInverse(rotary, attention.head_size, device)
        attention.impl.binding = LayerBinding(runtime, index, rotaries[id(rotary)])
    _report(runtime, vllm_config)
    return runtime


def cluster_kv_cache(worker: Any) -> None:
    """Split the KV cache into groups that are freed and groups that are not, for `free_kv`.

    Args:
        worker: vLLM's, its model loaded.

    Raises: FluxConfigError, UnsupportedConfigurationError.
    """
    config = FluxConfig.from_additional_config(worker.vllm_config.additional_config)
    if not config.free_kv:
        return
    num_layers = worker.vllm_config.model_config.get_total_num_hidden_layers()
    _, info = _read_router(config, worker.vllm_config)
    hook_runner(
        worker.model_runner,
        always_sparse_layers(config, info, num_layers),
        make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options),
    )


def reserve_side_tables(available_bytes: int, worker: Any, runtime: FluxRuntime) -> int:
    """Take the query sums' share out of the memory that the KV cache may use.

    Args:
        available_bytes: what vLLM found for the KV cache.
        worker: vLLM's worker, its model loaded.
        runtime: its runtime.

    Returns: bytes left for the KV cache.
    """
    specs = list(worker.get_kv_cache_spec().values())
    kv_bytes = sum(spec.page_size_bytes / spec.block_size for spec in specs)
    side_bytes = 0.0
    if runtime.router is not None:
        # One bfloat16 sum and its share of the count, a granule.
        side_bytes = len(specs) * (2 * runtime.router.head_dim + 1) / GRANULE_TOKENS
    fixed = 0
    if worker.device.type != "cpu":
        from flux_vllm.attention_backend.cuda.backend import fixed_nbytes

        fixed = fixed_nbytes(runtime, worker.vllm_config, specs)
    left = int((available_bytes - fixed) * kv_bytes / (kv_bytes + side_bytes))
    logger.info(
        "flux: %.1f MiB of the KV cache's memory (%.2f %%) hold query sums and views",
        (available_bytes - left) / 2**20,
        100 * (1 - left / available_bytes) if available_bytes else 0.0,
    )
    return left


def _read_router(
    config: FluxConfig, vllm_config: Any
) -> tuple[LayerRouter, RouterInfo] | tuple[None, None]:
    """Read the router where one is needed or given; others take sizes from one they find."""
    required = config.needs_router or config.router is not None
    name = vllm_config.model_config.model
    if config.router is None and not Path(name).exists():
        cached = _router_in_hub_cache(vllm_config)
        if cached is not None:
            return read_router(cached)
        if required:
            raise RouterCheckpointError(
                f"expected a router in the cached snapshot of {name} (revision "
                f"{vllm_config.model_config.revision or 'main'}), found no {ROUTER_FILE_NAME} "
                f"under {_hub_cache(vllm_config)}; nothing is downloaded for it: fetch the file "
                f"with `hf download {name} {ROUTER_FILE_NAME}`, give its place as "
                """--additional-config '{"flux": {"router": "PATH"}}', or choose a policy that """
                'needs none ("full", "sparse", "static")'
            )
        return None, None
    path = config.router_path(name)
    if required or (path / ROUTER_FILE_NAME).is_file():
        return read_router(path)
    return None, None


def _router_in_hub_cache(vllm_config: Any) -> Path | None:
    """Find the router in the snapshot of a model that is named by its hub id, offline."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    model = vllm_config.model_config
    try:
        found = try_to_load_from_cache(
            model.model, ROUTER_FILE_NAME, _hub_cache(vllm_config), model.revision
        )
    except HFValidationError:
        return None
    return Path(found) if isinstance(found, str) else None


def _hub_cache(vllm_config: Any) -> str:
    from huggingface_hub.constants import HF_HUB_CACHE

    return vllm_config.load_config.download_dir or HF_HUB_CACHE


def _check_features(vllm_config: Any) -> None:
    """Refuse what layer routes cannot be combined with."""
    model, parallel, cache = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config,
    )
    speculative = vllm_config.speculative_config
    refused = {
        "decode context parallel": parallel.decode_context_parallel_size > 1,
        "prefill context parallel": parallel.prefill_context_parallel_size > 1,
        "pipeline parallel": parallel.pipeline_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        # vLLM turns offloading into a connector.
        "a KV connector": vllm_config.kv_transfer_config is not None
        and cache.kv_offloading_size is None,
        "KV cache offloading": cache.kv_offloading_size is not None,
        f"a KV cache of dtype {cache.cache_dtype}": cache.cache_dtype not in _KV_CACHE_DTYPES,
        "prefix_match_unit": cache.prefix_match_unit is not None,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "a draft model (speculative decoding other than ngram)": speculative is not None
        and speculative.method != "ngram",
        "multi-head latent attention (MLA)": model.use_mla,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a pooling or encoder model": model.runner_type != "generate",
        "a model without attention": model.is_attention_free,
        "a model that mixes attention with state-space layers": model.is_hybrid,
        "multi-dimensional RoPE": model.uses_mrope,
        "bidirectional attention over multimodal prefixes": model.is_mm_prefix_lm,
        "reference sliding window attention": model.rswa_window is not None,
    }
    found = [what for what, present in refused.items() if present]
    if found:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected none of the features that layer routes cannot be "
            f"combined with, found {', '.join(found)}; switch it off, or serve without "
            "--attention-backend flux"
        )


def _check_fit(info: RouterInfo, num_layers: int, head_dim: int) -> None:
    for what, expected, found in (
        ("layers", num_layers, info.num_layers),
        ("head_dim", head_dim, info.head_dim),
    ):
        if expected != found:
            raise RouterCheckpointError(
                f"router: expected {what} {expected} as in the model, found {found} (trained for "
                f"{info.base_model or 'an unnamed model'!r}); give this model's own router with "
                """--additional-config '{"flux": {"router": "PATH"}}'"""
            )


def _routed_layers(model: nn.Module) -> list[tuple[int, Any, Any]]:
    """Find (layer index, attention, rotary embedding) of every layer that gets a route."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers: list[tuple[int, Any, Any]] = []
    for parent in model.modules():
        for attention in parent.children():
            if not isinstance(attention, Attention):
                continue
            if attention.attn_backend.get_name() != "FLUX":
                raise UnsupportedConfigurationError(
                    f"--attention-backend flux: expected all attention layers to use it, found "
                    f"{attention.layer_name} on {attention.attn_backend.get_name()}; serve this "
                    "model without --attention-backend flux"
                )
            if type(attention) is not Attention:
                raise UnsupportedConfigurationError(
                    "--attention-backend flux: expected plain causal attention in every layer, "
                    f"found {type(attention).__name__} in {attention.layer_name}; serve this model "
                    "without --attention-backend flux"
                )
            if attention.sliding_window is not None:
                continue  # stays as the model has it
            layers.append(
                (
                    extract_layer_index(attention.layer_name),
                    attention,
                    _rotary_of(parent, attention),
                )
            )
    if not layers:
        raise UnsupportedConfigurationError(
            f"--attention-backend flux: expected layers with full attention in "
            f"{type(model).__name__}, found none; serve it without --attention-backend flux"
        )
    return sorted(layers, key=lambda entry: entry[0])


def _rotary_of(parent: Any, attention: Any) -> Any:
    """Give a layer's rotary embedding, if what it does to queries can be undone."""
    rotary, kind = getattr(parent, "rotary_emb", None), type(parent).__name__
    change = change_after_rope(parent)
    expected, found = "", ""
    if type(parent).__module__.startswith("transformers."):
        expected = "attention layers of a model that vLLM implements itself"
        found = f"transformers' {kind}, whose queries before RoPE are out of reach"
    elif rotary is None:
        expected = "rotary position embeddings (RoPE) in every layer"
        found = f"none in {attention.layer_name} ({kind})"
    elif not rotates_always(type(parent)):
        expected = "rotary position embeddings (RoPE) on the queries of every routed layer"
        found = f"{kind}, which applies them under a condition"
    elif change is not None:
        expected = "queries that reach attention as RoPE made them"
        found = f"`{change}` after it in {kind}, which a router cannot see through"
    if found:
        raise UnsupportedConfigurationError(
            f"--attention-backend flux: expected {expected}, found {found}; serve this model "
            "without --attention-backend flux"
        )
    return rotary


def _mean_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )

    ranks = get_tensor_model_parallel_world_size()
    return tensor if ranks == 1 else tensor_model_parallel_all_reduce(tensor) / ranks


def _report(runtime: FluxRuntime, vllm_config: Any) -> None:
    """Log what was set up, and start counting on the first tensor-parallel rank."""
    from vllm.distributed import get_tensor_model_parallel_rank

    config, info = runtime.config, runtime.info
    logger.info(
        "flux: policy %s, %d routed layers, pattern %s, sink %d and window %d tokens, threshold %g",
        config.policy,
        len(runtime.routed_layers),
        config.pattern_name(info),
        runtime.sink_tokens,
        runtime.window_tokens,
        config.threshold,
    )
    directory = metrics_directory()
    if directory is None or get_tensor_model_parallel_rank() != 0:
        return
    name = vllm_config.model_config.served_model_name
    model = {"model_name": name if isinstance(name, str) else name[0]}
    router = {
        "policy": config.policy,
        "base_model": info.base_model if info else "",
        "threshold": f"{config.threshold:g}",
        "sparse_pattern": config.pattern_name(info),
        "sink_tokens": str(runtime.sink_tokens),
        "window_tokens": str(runtime.window_tokens),
        "pool_tokens": str(info.pool_tokens) if info else "",
        "pool_prefix": str(info.pool_prefix).lower() if info else "",
    }
    runtime.reporter = RouteReporter(
        MetricStore(directory, model),
        runtime.routed_layers,
        vllm_config.cache_config.block_size,
        runtime.pattern,
    )
    runtime.reporter.announce(**router)
    num_layers = runtime.table.num_layers
    layers = {"num_layers": num_layers, "routed_layers": runtime.routed_layers}
    runtime.journal = RouteJournal(directory, model | router | layers, num_layers)
