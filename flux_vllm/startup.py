"""From a configuration to a running FluxRuntime: every check made before the first request."""

import logging
from collections.abc import Sequence
from dataclasses import astuple, dataclass
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
from flux_vllm.kv.check import check_free_kv
from flux_vllm.metrics.directory import metrics_directory, prepare_front_end
from flux_vllm.metrics.journal import RouteJournal
from flux_vllm.metrics.reporter import RouteReporter
from flux_vllm.metrics.store import MetricStore
from flux_vllm.patterns.base import make_pattern
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.inputs import RouterInputs
from flux_vllm.router_file import find_router
from flux_vllm.routing.model_call import RunnerModelCall
from flux_vllm.routing.probe import ProbedLayer, PromptProbe
from flux_vllm.routing.runtime import FluxRuntime

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
    _, info = find_router(config, vllm_config)
    if info is not None:
        _check_fit(info, model.get_total_num_hidden_layers(), model.get_head_size())
        if config.needs_router:
            _check_probe(info.inputs, vllm_config)
    make_pattern(config.pattern_name(info), *config.window(info), config.pattern_options)
    if config.free_kv:
        check_free_kv(config, info, vllm_config)
    prepare_front_end()


def attach(runner: Any, vllm_config: Any, device: torch.device) -> FluxRuntime:
    """Bind a runtime to the attention layers of a model that was just loaded.

    Args:
        runner: vLLM's model runner, V1 or V2.
        vllm_config: the engine's configuration.
        device: of the worker.

    Returns: FluxRuntime.
    Raises: FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError.
    """
    config = FluxConfig.from_additional_config(vllm_config.additional_config)
    _check_features(vllm_config)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    config.check_layers(num_layers)
    router, info = find_router(config, vllm_config)
    layers = _attention_layers(runner.get_model())
    routed = [layer for layer in layers if layer.is_routed]
    if info is not None:
        for layer in layers:
            if layer.is_routed or layer.index in info.context_layers:
                _check_fit(info, num_layers, layer.attention.head_size)
    unrouted = set(config.sparse_layers or ()) - {layer.index for layer in routed}
    if unrouted:
        raise FluxConfigError(
            "flux config: expected sparse_layers with full attention in the model, found "
            f"{sorted(unrouted)}, which keep a sliding window of the model's own; remove them"
        )
    runtime = FluxRuntime(
        config,
        info,
        num_layers,
        tuple(layer.index for layer in routed),
        vllm_config.scheduler_config.max_num_seqs,
        device,
    )
    for layer in routed:
        layer.attention.impl.binding = LayerBinding(runtime, layer.index)
    if config.needs_router:
        assert router is not None
        assert info is not None
        _check_probe(info.inputs, vllm_config)
        runtime.probe = PromptProbe(
            info.inputs,
            router.to(device),
            config.threshold,
            _probed_layers(layers, info.inputs, device),
            RunnerModelCall(runner, vllm_config, device),
            _mean_over_ranks,
            device,
        )
    _report(runtime, vllm_config)
    return runtime


def reserve_buffers(available_bytes: int, worker: Any, runtime: FluxRuntime) -> int:
    """Take what our buffers need out of the memory that the KV cache may use.

    Args:
        available_bytes: what vLLM found for the KV cache.
        worker: vLLM's worker, its model loaded.
        runtime: its runtime.

    Returns: bytes left for the KV cache.
    """
    if worker.device.type == "cpu":
        return available_bytes
    from flux_vllm.attention_backend.cuda.backend import fixed_nbytes

    nbytes = fixed_nbytes(runtime, worker.vllm_config, compat.kv_cache_groups(worker))
    logger.info("flux: views and workspaces take %.1f MiB of the KV cache's memory", nbytes / 2**20)
    return available_bytes - nbytes


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


def _check_probe(inputs: RouterInputs, vllm_config: Any) -> None:
    """Refuse what an extra forward of one request's tokens cannot be combined with."""
    parallel = vllm_config.parallel_config
    if parallel.data_parallel_size > 1 and parallel.is_moe_model is not False:
        raise UnsupportedConfigurationError(
            '--attention-backend flux with policy "router": expected data parallel replicas that '
            "run apart, found a mixture-of-experts model whose replicas run every forward "
            "together, so that one could not probe a prompt alone; serve replicas as servers of "
            'their own, or choose a policy without a router ("full", "sparse", "static")'
        )
    budget = vllm_config.scheduler_config.max_num_batched_tokens
    if vllm_config.device_config.device_type != "cpu" and budget < inputs.probe.tokens:
        raise UnsupportedConfigurationError(
            '--attention-backend flux with policy "router": expected --max-num-batched-tokens of '
            f"at least {inputs.probe.tokens}, the tokens of a probe, found {budget}; raise it"
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


@dataclass(frozen=True, slots=True)
class _AttentionLayer:
    index: int
    attention: Any
    """vLLM's Attention."""
    parent: Any
    """The model's module that holds it, and its rotary embedding."""

    @property
    def is_routed(self) -> bool:
        """Layers with a sliding window of the model's own stay as they are."""
        return self.attention.sliding_window is None


def _attention_layers(model: nn.Module) -> list[_AttentionLayer]:
    """Find every attention layer, in order, and refuse what routes cannot go with."""
    from vllm.model_executor.layers.attention import Attention
    from vllm.model_executor.models.utils import extract_layer_index

    layers: list[_AttentionLayer] = []
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
            index = extract_layer_index(attention.layer_name)
            layers.append(_AttentionLayer(index, attention, parent))
    if not any(layer.is_routed for layer in layers):
        raise UnsupportedConfigurationError(
            f"--attention-backend flux: expected layers with full attention in "
            f"{type(model).__name__}, found none; serve it without --attention-backend flux"
        )
    return sorted(layers, key=lambda layer: layer.index)


def _probed_layers(
    layers: Sequence[_AttentionLayer], inputs: RouterInputs, device: torch.device
) -> list[ProbedLayer]:
    """Say what a probe needs of each layer: its rotation where a router looks at its queries."""
    rotaries: dict[int, RotaryInverse] = {}
    probed = []
    for layer in layers:
        inverse = None
        if layer.is_routed or layer.index in inputs.context_layers:
            rotary = _rotary_of(layer.parent, layer.attention)
            if id(rotary) not in rotaries:
                rotaries[id(rotary)] = RotaryInverse(rotary, layer.attention.head_size, device)
            inverse = rotaries[id(rotary)]
        probed.append(
            ProbedLayer(layer.attention.layer_name, layer.index, layer.is_routed, inverse)
        )
    return probed


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
        "probe": "+".join(map(str, astuple(info.inputs.probe))) if info else "",
        "pools": " ".join(map(str, info.inputs.pools)) if info else "",
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
