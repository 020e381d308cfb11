"""Train routers within a budget of divergence: measure prompts once, then fit.

Dimension legend: L layers.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.router.model import LayerRouter
from training.config import TrainConfig
from training.costs.fit import assemble, describe, fit_router
from training.costs.measure import Measurer, PlacedPrompt, measure_into
from training.costs.measurements import Measurements, join, open_folder, read_folder
from training.costs.quadratic import QuadraticCosts, fit_costs, nested_patterns
from training.data.prompt_files import encode_prompt, read_prompt_files
from training.distributed import World, start_world
from training.freeing import freeing_order
from training.model_loading import load_routed, load_tokenizer, model_limit
from training.provenance import digest, model_name, provenance
from training.routed_layers import RoutedLayers
from training.storage import round_for_storage, stored_dtypes

_SHARES = (0.5, 0.6, 0.75, 0.85)
"""Of static patterns that are told beside the router."""
_THRESHOLDS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def train_by_costs(config: TrainConfig) -> Path:
    """Train routers as a config with the objective `budget` says.

    `measurements` in --out holds what was measured: a killed run goes on from there, and another
    budget or seed costs seconds. `fit.json` says what the routers do with prompts held out.

    Returns: path of the router file.
    Raises: ValueError: no files of prompts, or none longer than SPARSE's sinks and window.
    """
    if not config.data.files or config.data.tasks:
        raise ValueError(
            "expected prompts from --data.files alone for the objective 'budget', which measures "
            f"them, found {'--data.tasks too' if config.data.files else 'none'}; give files with "
            "the model's answers, or train on made tasks with --loss.objective online"
        )
    if config.system.shard_model:
        raise ValueError(
            "expected --system.shard_model false with the objective 'budget', whose processes "
            "measure prompts each at their own pace, found true; leave it out"
        )
    began = time.monotonic()
    out = Path(config.out)
    world = start_world(config.system.device)
    measured = _measure(config, out / "measurements", world)
    _, count, _, head_dim = measured.pooled.shape
    layers = RoutedLayers.load(out / "measurements", count)
    measuring_s = time.monotonic() - began
    if not world.is_main:
        return out / "flux_router.safetensors"
    fitted_to, held_out = measured.take(~measured.held_out), measured.take(measured.held_out)
    inputs = config.router.inputs(count)
    costs = fit_costs(fitted_to)
    router, state = fit_router(fitted_to, costs, inputs, config)
    dtypes = stored_dtypes(router.router)
    folded = round_for_storage(router.fold(dtypes["features.0"]), dtypes)
    report = _report(folded, held_out if len(held_out) > 1 else fitted_to, config, count)
    report |= {
        "prompts": len(fitted_to),
        "prompts_held_out": len(held_out),
        "static_layers": _static_layers(costs, layers),
        "training": state,
        "seconds": {
            "measuring": round(measuring_s, 1),
            "fitting": round(time.monotonic() - began - measuring_s, 1),
        },
    }
    (out / "fit.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for row in report["rows"]:
        sys.stderr.write(f"{row}\n")
    settings = config.router
    info = RouterInfo(
        base_model=model_name(config.model),
        num_layers=layers.total,
        head_dim=head_dim,
        pool_tokens=max((one.tokens for one in inputs.pools if not one.is_told), default=1),
        probe=settings.probe,
        pools=settings.pools,
        context_layers=tuple(layers.number(inputs.context_layers)),
        widths=settings.widths,
        sink_tokens=settings.sink_tokens,
        window_tokens=settings.window_tokens,
        sparse_pattern=settings.sparse_pattern,
        full_decode_tokens=settings.full_decode_tokens,
        freeing_order=layers.order(freeing_order(folded, assemble(fitted_to, inputs))),
        provenance=provenance(world.device, *config.data.sources)
        | {"config": config.to_dict(), "prompts": len(fitted_to), "seconds": report["seconds"]},
    )
    write_router(out, layers.widen(folded), info, dtypes)
    return out / "flux_router.safetensors"


def _static_layers(costs: QuadraticCosts, layers: RoutedLayers) -> dict[int, list[int]]:
    """Give the best static patterns that greedy choice finds, by their number of SPARSE layers."""
    counts = [round(share * len(layers)) for share in _SHARES]
    found = nested_patterns(costs, counts)
    return {count: layers.number(places) for count, places in found.items()}


def _measure(config: TrainConfig, folder: Path, world: World) -> Measurements:
    """Measure what is not measured yet."""
    router = config.router
    known = open_folder(
        folder,
        {
            "model": model_name(config.model),
            "files": {Path(file).name: digest(Path(file)) for file in config.data.files},
            "max_tokens": config.data.max_tokens,
            "answer_tokens": [config.data.max_answer_tokens, config.loss.answer_tokens],
            "probe": list(router.probe),
            "pools": list(router.pools),
            "sink_tokens": router.sink_tokens,
            "window_tokens": router.window_tokens,
            "sparse_pattern": router.sparse_pattern,
            "full_decode_tokens": router.full_decode_tokens,
        },
    )
    missing = _missing_prompts(config, {int(at) for part in known for at in part.place}, world)
    if missing:
        routed = load_routed(
            config.model, router.sink_tokens, router.window_tokens, config.system, world
        )
        if world.is_main:
            routed.layers.save(folder)
        measurer = Measurer(
            routed,
            router.inputs(routed.num_layers),
            config.loss.answer_tokens,
            router.dense,
            config.optimizer.micro_batch_tokens,
            config.seed + world.rank,
            config.costs.sampled_share,
        )
        limit = config.optimizer.time_limit_s
        measure_into(folder, measurer, missing, known, limit, world.rank)
    world.wait()
    found = read_folder(folder)
    if not found:
        raise ValueError(
            f"expected prompts of more than {router.sink_tokens + router.window_tokens} tokens, "
            f"which sinks and window do not hold, in {', '.join(config.data.files)}, found none; "
            "give longer prompts or a smaller --router.window_tokens"
        )
    return join(found)


def _missing_prompts(config: TrainConfig, known: set[int], world: World) -> list[PlacedPrompt]:
    """Return this process's prompts to measure, in an order of their own.

    Neither those that `divergence` tests on, nor those within sinks and window.
    """
    if config.costs.prompts < 0:
        return []
    rows = read_prompt_files(Path(file) for file in config.data.files)
    places = [place for place, row in enumerate(rows) if row.split != "test"]
    places = np.random.default_rng(0).permutation(places).tolist()
    places = places[: config.costs.prompts or len(places)]
    tokenizer = load_tokenizer(config.model)
    most = config.data.max_answer_tokens
    limit = min(model_limit(config.model), config.data.max_tokens + most)
    reach = config.router.sink_tokens + config.router.window_tokens
    missing = []
    for place in (place for place in places if place not in known):
        prompt = encode_prompt(rows[place], tokenizer, limit, most)
        if prompt.prompt_len > reach:
            missing.append(PlacedPrompt(place, rows[place].split == "validation", prompt))
    return missing[world.rank :: world.size]


def _report(
    router: LayerRouter, measured: Measurements, config: TrainConfig, layers: int
) -> dict[str, Any]:
    """Describe routers on prompts that were held out, by costs fitted to these."""
    inputs = config.router.inputs(layers)
    costs = fit_costs(measured)
    return {"rows": describe(router, measured, costs, inputs, config.router, _THRESHOLDS)}
