"""Refusals: what cannot be served, before the first request.

A front end checks what a configuration says; a worker checks the same again, for engines that are
made without one, and its loaded model besides.
"""

from typing import Any

import torch

from flux_vllm.config import FluxConfig
from flux_vllm.errors import (
    FluxConfigError,
    RouterCheckpointError,
    UnsupportedConfigurationError,
)
from flux_vllm.kv.check import check_free_kv
from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.inputs import RouterInputs
from flux_vllm.startup.drafter import refused_speculation
from flux_vllm.startup.router_file import read_router_for

_FLOAT8 = ("fp8", "fp8_e4m3", "fp8_e5m2")
_KV_CACHE_DTYPES = ("auto", "float16", "bfloat16", "float32", *_FLOAT8)


def check_configuration(vllm_config: Any) -> None:
    """Check all that can be known before the model loads, so that mistakes end the start early.

    Args:
        vllm_config: of an engine that uses flux.

    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    check_features(vllm_config)
    if config.kernels is not None and vllm_config.device_config.device_type == "cpu":
        raise FluxConfigError(
            f'flux config: expected no "kernels" on the CPU, found {config.kernels!r}; remove it, '
            "it chooses among CUDA kernels"
        )
    model = vllm_config.model_config
    num_layers = model.get_total_num_hidden_layers()
    config.check_layers(num_layers)
    _, info = read_router_for(config, vllm_config)
    if info is not None:
        # Which of several sizes the routed layers have is known once the model is loaded.
        sizes = {model.model_arch_config[layer].head_size for layer in range(num_layers)}
        head_dim = info.head_dim if info.head_dim in sizes else model.get_head_size()
        check_fit(info, num_layers, head_dim)
        if config.needs_router:
            check_probe(info.inputs, vllm_config)
    make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options)
    if config.free_kv:
        if model.is_hybrid:
            raise UnsupportedConfigurationError(
                'flux config: expected a model of attention layers alone with "free_kv", found one '
                "that mixes them with layers that carry a state, whose memory does not grow with "
                'the context; drop "free_kv"'
            )
        check_free_kv(config, info, vllm_config)


def check_features(vllm_config: Any) -> None:
    """Refuse what layer routes cannot be combined with.

    Raises: UnsupportedConfigurationError.
    """
    model, parallel, cache = (
        vllm_config.model_config,
        vllm_config.parallel_config,
        vllm_config.cache_config,
    )
    on_cpu = vllm_config.device_config.device_type == "cpu"
    is_float8 = cache.cache_dtype in _FLOAT8
    refused = {
        "decode context parallel": parallel.decode_context_parallel_size > 1,
        "prefill context parallel": parallel.prefill_context_parallel_size > 1,
        "dual batch overlap": parallel.use_ubatching,
        f"a KV cache of dtype {cache.cache_dtype}": cache.cache_dtype not in _KV_CACHE_DTYPES,
        f"a KV cache of {cache.cache_dtype} for a model of {model.dtype} on the CPU": (
            on_cpu and not _as_wide(cache, model)
        ),
        # FlashAttention-3 writes bfloat16 there.
        f"a KV cache of {cache.cache_dtype} for a model of {model.dtype} on a GPU": (
            is_float8 and not on_cpu and model.dtype != torch.bfloat16
        ),
        "layers left out of a float8 KV cache (--kv-cache-dtype-skip-layers)": (
            is_float8 and bool(cache.kv_cache_dtype_skip_layers)
        ),
        "prefix_match_unit": cache.prefix_match_unit is not None,
        "kv_sharing_fast_prefill": cache.kv_sharing_fast_prefill,
        "multi-head latent attention (MLA)": model.use_mla,
        "an encoder-decoder model": model.is_encoder_decoder,
        "a pooling or encoder model": model.runner_type != "generate",
        "a model without attention": model.is_attention_free,
        "bidirectional attention over images (for text alone: --limit-mm-per-prompt "
        """'{"image": 0}')""": model.is_mm_prefix_lm,
        "reference sliding window attention": model.rswa_window is not None,
        **refused_speculation(vllm_config),
    }
    found = [what for what, present in refused.items() if present]
    if found:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected none of the features that layer routes cannot be "
            f"combined with, found {', '.join(found)}; switch it off, or serve without "
            "--attention-backend flux"
        )


def check_probe(inputs: RouterInputs, vllm_config: Any) -> None:
    """Refuse what an extra forward of one request's tokens cannot be combined with.

    Raises: UnsupportedConfigurationError.
    """
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        raise UnsupportedConfigurationError(
            '--attention-backend flux with policy "router": expected data parallel replicas that '
            "run apart, found a mixture-of-experts model whose replicas run every forward "
            "together, so that one could not probe a prompt alone; serve replicas as servers of "
            'their own, or choose a policy without a router ("full", "sparse", "static")'
        )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    # On CPUs a forward may be longer than a step, but for positions of several axes.
    must_fit = vllm_config.device_config.device_type != "cpu" or vllm_config.model_config.uses_mrope
    if must_fit and budget < inputs.probe.tokens:
        raise UnsupportedConfigurationError(
            '--attention-backend flux with policy "router": expected --max-num-batched-tokens of '
            f"at least {inputs.probe.tokens}, the tokens of a probe, found {budget}; raise it"
        )


def _as_wide(cache: Any, model: Any) -> bool:
    """Say whether a KV cache's elements are as wide as a model's.

    vLLM's CPU kernels write the model's elements whatever the cache was made for; wider ones
    overwrite each other there, narrower ones are read from where they are not.
    """
    if cache.cache_dtype in _FLOAT8:  # which they do convert to
        return True
    dtype: torch.dtype = getattr(torch, cache.cache_dtype, model.dtype)
    return dtype.itemsize == model.dtype.itemsize


def check_fit(info: RouterInfo, num_layers: int, head_dim: int) -> None:
    """Refuse a router that was trained for another model.

    Raises: RouterCheckpointError.
    """
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
