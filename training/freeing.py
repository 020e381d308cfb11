"""In which order a server gives back the KV memory of layers: those first that are seldom FULL.

Dimension legend: L layers, P prompts, F features.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from flux_vllm.router.checkpoint import read_router, write_tensors
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.place import ROUTER_FILE_NAME, locate_router
from flux_vllm.router.route import DEFAULT_THRESHOLD, Route, choose_route, full_probability
from training.config import OrderConfig
from training.data.prompt_files import FilePrompts
from training.distributed import start_world
from training.model_loading import load_routed, load_tokenizer
from training.probe import collate_probes

_PROBES_AT_ONCE = 64


@torch.no_grad()
def freeing_order(router: LayerRouter, features: torch.Tensor) -> tuple[int, ...]:
    """Order layers by the share of prompts for which they are FULL at the default threshold.

    Among equals the mean of P(FULL) decides.

    Args:
        router: of all layers, float32, on the CPU.
        features: [L, P, F] float, of any device.

    Returns: each layer's index once.
    """
    probability = full_probability(router.forward_all(features.float().cpu()))
    is_full = choose_route(probability, DEFAULT_THRESHOLD) == Route.FULL
    share = is_full.float().mean(1).tolist()
    mean = probability.mean(1).tolist()
    return tuple(sorted(range(router.num_layers), key=lambda layer: (share[layer], mean[layer])))


def add_order(config: OrderConfig) -> tuple[Path, tuple[int, ...]]:
    """Write a copy of a router file that says in which order its layers are freed.

    It may take the place of the file itself.

    Returns: its path, and the order.
    Raises: RouterCheckpointError, ValueError: no router, or no prompts.
    """
    router, info = read_router(Path(config.router))
    world = start_world(config.system.device)
    routed = load_routed(config.model, info.sink_tokens, info.window_tokens, config.system, world)
    narrow, inputs = routed.layers.narrow(router, info)
    limit = routed.config.max_position_embeddings
    stream = FilePrompts(config.data, load_tokenizer(config.model), "train", config.seed, limit)
    prompts = [stream[index] for index in range(min(config.prompts, len(stream)))]
    cut = collate_probes([p.token_ids[: p.prompt_len] for p in prompts], inputs)
    parts = [routed.probe(part.to(world.device), inputs) for part in cut.split(_PROBES_AT_ONCE)]
    order = routed.layers.order(freeing_order(narrow, torch.cat(parts, dim=1)))
    # The stored tensors, whatever their dtypes.
    tensors = load_file(locate_router(Path(config.router)))
    out = Path(config.out) / ROUTER_FILE_NAME
    return write_tensors(out, tensors, replace(info, freeing_order=order)), order
