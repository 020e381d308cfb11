"""Attaching a runtime to the attention layers of a model that was just loaded."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.config import FluxConfig
from flux_vllm.errors import FluxConfigError, RouterCheckpointError
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.model import LayerRouter
from flux_vllm.routing.model_call import RunnerModelCall
from flux_vllm.routing.probe import ProbedLayer, PromptProbe
from flux_vllm.routing.rotary import RotaryInverse
from flux_vllm.routing.runtime import FluxRuntime
from flux_vllm.routing.stages import gather_over_stages, sum_over_stages
from flux_vllm.routing.state_layers import StateLayers
from flux_vllm.startup.check import check_features, check_fit, check_probe
from flux_vllm.startup.layers import (
    AttentionLayer,
    attention_layers,
    check_full_attention,
    layers_for_router,
    layers_with_routes,
    rotary_of,
)
from flux_vllm.startup.report import start_reporting
from flux_vllm.startup.router_file import read_router_for


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
    check_features(vllm_config)
    num_layers = vllm_config.model_config.get_total_num_hidden_layers()
    config.check_layers(num_layers)
    router, info = read_router_for(config, vllm_config)
    model = runner.get_model()
    layers = attention_layers(model)
    check_full_attention(type(model).__name__, layers)
    # The others of full attention stay undecided, hence FULL.
    routed = layers_for_router(model, layers) if config.needs_router else layers_with_routes(layers)
    if info is not None:
        for layer in layers:
            if layer in routed or layer.index in info.context_layers:
                check_fit(info, num_layers, layer.attention.head_size)
    routed_by = dict(gather_over_stages([(layer.index, layer.owner) for layer in routed]))
    owners = {index: owner for index, owner in routed_by.items() if index != owner}
    _check_sparse_layers(config, info, set(routed_by), owners)
    runtime = FluxRuntime(
        config,
        info,
        num_layers,
        tuple(routed_by),
        vllm_config.scheduler_config.max_num_seqs,
        device,
        step_tokens=1 + vllm_config.num_speculative_tokens,
        owners=owners,
    )
    for layer in layers:
        if config.policy != "full":  # queries of a float8 KV cache come as they are
            layer.attention.query_quant = None
        if layer.has_full_attention:
            layer.attention.impl.binding = LayerBinding(runtime, layer.index)
    if config.needs_router:
        assert router is not None
        assert info is not None
        runtime.probe = _make_probe(
            config,
            info,
            router.to(device),
            layers,
            routed_by,
            RunnerModelCall(
                runner,
                vllm_config,
                StateLayers(vllm_config, info.inputs.probe.tokens, device),
                device,
            ),
            vllm_config,
        )
    full = next(layer for layer in layers if layer.has_full_attention)
    start_reporting(runtime, vllm_config, full.attention.impl.kernels_name)
    return runtime


def _make_probe(
    config: FluxConfig,
    info: RouterInfo,
    router: LayerRouter,
    layers: Sequence[AttentionLayer],
    routed_by: Mapping[int, int],
    model_call: RunnerModelCall,
    vllm_config: Any,
) -> PromptProbe:
    """Make what decides by a router, whose weights are on the device.

    Raises: RouterCheckpointError, UnsupportedConfigurationError.
    """
    check_probe(info.inputs, vllm_config)
    weight, _ = router.linear("features.0")
    read = info.inputs.layers_read(weight, set(routed_by.values()) - set(info.always_sparse))
    unseen = sorted(read - set(gather_over_stages([layer.index for layer in layers])))
    if unseen:
        raise RouterCheckpointError(
            f"router: expected context_layers with attention, found {unseen} without (trained "
            f"for {info.base_model or 'an unnamed model'!r}); give this model's own router"
        )
    return PromptProbe(
        info.inputs,
        router,
        config.threshold,
        _probed_layers(layers, read, weight.device),
        routed_by,
        model_call,
        _over_ranks,
        weight.device,
    )


def _check_sparse_layers(
    config: FluxConfig, info: RouterInfo | None, routed: set[int], owners: Mapping[int, int]
) -> None:
    """Refuse layers that are to be SPARSE and have no route, or another layer's."""
    named = config.sparse_layers or ()
    for layer in named:
        if owners.get(layer, layer) not in named:
            raise FluxConfigError(
                f"flux config: expected sparse_layers with layer {owners[layer]}, whose KV cache "
                f"and route layer {layer} shares, found {layer} without it; name layer "
                f"{owners[layer]}"
            )
    unrouted = sorted(set(config.sparse_layers or ()) - routed)
    if unrouted:
        raise FluxConfigError(
            "flux config: expected sparse_layers with full attention in the model, found "
            f"{unrouted}, which have none (a sliding window of the model's own, or a state); "
            "remove them"
        )
    if config.needs_router and info is not None:
        always = set(info.always_sparse)
        unrouted = [n for n in sorted(always) if not {n, owners.get(n, n)} <= routed & always]
        if unrouted:
            raise RouterCheckpointError(
                "router: expected always_sparse layers with full attention and RoPE in the model, "
                f"and with those whose KV cache they share, found {unrouted} without (trained for "
                f"{info.base_model or 'an unnamed model'!r}); give this model's own router"
            )


def _probed_layers(
    layers: Sequence[AttentionLayer], read: Collection[int], device: torch.device
) -> list[ProbedLayer]:
    """Say what a probe needs of each layer: its rotation where a router reads its queries."""
    rotaries: dict[Any, RotaryInverse] = {}
    probed = []
    for layer in layers:
        inverse, has_own = None, layer.owner == layer.index
        is_pooled = layer.index in read
        rotary = rotary_of(layer) if is_pooled else None
        if rotary is not None:
            if rotary not in rotaries:
                rotaries[rotary] = RotaryInverse(rotary, layer.attention.head_size, device)
            inverse = rotaries[rotary]
        name, owner = layer.attention.layer_name, None if has_own else layer.owner
        probed.append(ProbedLayer(name, layer.index, is_pooled, inverse, owner))
    return probed


def _over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Take the mean over tensor-parallel ranks, which hold heads, and the sum over stages."""
    from vllm.distributed import (
        get_tensor_model_parallel_world_size,
        tensor_model_parallel_all_reduce,
    )

    ranks = get_tensor_model_parallel_world_size()
    mean = tensor if ranks == 1 else tensor_model_parallel_all_reduce(tensor) / ranks
    return sum_over_stages(mean)
