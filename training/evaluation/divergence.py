"""Routers and static patterns against full attention, by what becomes of its own answers.

No label is needed: the model's answers under full attention are decoded by force under other
routes, and every token's distribution is compared with full attention's.

Dimension legend: P prompts, L layers, B prompts of a micro-batch.
"""

import json
import random
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern, streaming, triangle
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.inputs import RouterInputs
from training.attach import RoutedModel
from training.config import DivergenceConfig
from training.data.batching import DenseQueries, MicroBatch, collate, group_by_length
from training.data.encoding import Encoded
from training.data.prompt_files import FilePrompts
from training.distributed import World, start_world
from training.evaluation.ranks import rank_correlation
from training.losses import distillation, mean_by_prompt
from training.model_loading import load_routed, load_tokenizer
from training.policies import Policy, StaticPolicy, ThresholdPolicy
from training.provenance import provenance

_LOGITS_AT_ONCE = 2048


@dataclass(frozen=True, slots=True)
class Divergence:
    """One policy's results by prompt."""

    nats: np.ndarray
    """[P] float32: KL(full attention || policy), mean over answer tokens."""
    agreement: np.ndarray
    """[P] float32: share of answer tokens that stay the most likely one."""
    sparse: np.ndarray
    """[P, L] float32: 1 where the layer is SPARSE."""

    def summary(self) -> dict[str, float]:
        """Return the means over prompts."""
        return {
            "sparse_share": round(float(self.sparse.mean()), 4),
            "nats": round(float(self.nats.mean()), 5),
            "agreement": round(float(self.agreement.mean()), 5),
        }


class DivergenceMeter:
    """Measures policies on one device.

    Args:
        routed: the model.
        inputs: of the router.
        pattern: what SPARSE means, `streaming` or `triangle`.
        answer_tokens: most of a prompt to look at.
        token_budget: tokens computed at once.
        full_decode_tokens: of an answer, for which SPARSE layers attend to everything.

    Raises: UnsupportedConfigurationError: another pattern.
    """

    def __init__(
        self,
        routed: RoutedModel,
        inputs: RouterInputs,
        pattern: SparsePattern,
        answer_tokens: int,
        token_budget: int,
        full_decode_tokens: int = 0,
    ) -> None:
        if not isinstance(pattern, streaming.Pattern):
            raise UnsupportedConfigurationError(
                "expected a router for 'streaming' or 'triangle' to measure the divergence of, "
                f"found one for {pattern.name!r}; compare its scores with "
                "`python -m training eval`"
            )
        self.routed = routed
        self.inputs = inputs
        tail = pattern.tail_tokens if isinstance(pattern, triangle.Pattern) else 0
        self.dense = DenseQueries(tail, full_decode_tokens)
        self.answer_tokens = answer_tokens
        self.token_budget = token_budget

    def measure(
        self, prompts: Sequence[Encoded], policies: Mapping[str, Policy]
    ) -> dict[str, Divergence]:
        """Measure policies on the same prompts; full attention runs once.

        Args:
            prompts: P of them.
            policies: by name.

        Returns: Divergence by name.
        """
        layers = self.routed.num_layers
        found = {name: np.zeros((len(prompts), 2 + layers), np.float32) for name in policies}
        for rows in group_by_length([len(prompt) for prompt in prompts], self.token_budget):
            chosen = [prompts[row] for row in rows]
            micro = collate(chosen, rows, self.inputs, self.answer_tokens, dense=self.dense)
            for name, columns in self._run(micro.to(self.routed.device), policies):
                found[name][rows] = columns.cpu().numpy()
        return {
            name: Divergence(table[:, 0], table[:, 1], table[:, 2:])
            for name, table in found.items()
        }

    @torch.inference_mode()
    def _run(
        self, micro: MicroBatch, policies: Mapping[str, Policy]
    ) -> list[tuple[str, torch.Tensor]]:
        """Give [B, 2 + L] a policy: nats, agreement, SPARSE by layer."""
        features = self.routed.probe(micro.probe, self.inputs)
        at = (micro.answer_rows, micro.answer_positions)
        full = torch.ones(features.shape[:2], device=features.device)
        reference = self.routed.forward(micro.token_ids, full)[at].split(_LOGITS_AT_ONCE)
        results = []
        for name, policy in policies.items():
            routes = policy.decide(features)
            hidden = self.routed.forward(micro.token_ids, routes, micro.is_tail)[at]
            nats, alike = [], []
            for ours, theirs in zip(hidden.split(_LOGITS_AT_ONCE), reference, strict=True):
                logits, teacher = self.routed.logits(ours), self.routed.logits(theirs)
                nats.append(distillation(logits, teacher))
                alike.append((logits.argmax(-1) == teacher.argmax(-1)).float())
            count = len(micro.tasks)
            columns = [
                mean_by_prompt(torch.cat(part), micro.answer_rows, count) for part in (nats, alike)
            ]
            results.append((name, torch.cat([torch.stack(columns, dim=1), 1 - routes.T], dim=1)))
        return results


def search_static(
    meter: DivergenceMeter,
    prompts: Sequence[Encoded],
    counts: Sequence[int],
    variations: int,
    seed: int,
) -> dict[int, list[int]]:
    """Search, for each number of SPARSE layers, the layers that cost the least divergence.

    Layers are ranked by what each costs alone among FULL ones, by what each FULL layer saves alone
    among SPARSE ones, and by both; the best ranking is then varied by random exchanges.

    Args:
        meter: measures.
        prompts: to search on.
        counts: numbers of SPARSE layers.
        variations: random exchanges tried a number.
        seed: of these.

    Returns: SPARSE layers, ascending, by their number.
    """
    layers = meter.routed.num_layers
    every = set(range(layers))
    alone = {f"cost {at}": StaticPolicy.with_sparse(layers, [at]) for at in every}
    alone |= {f"gain {at}": StaticPolicy.with_sparse(layers, every - {at}) for at in every}
    found = {name: d.nats.mean() for name, d in meter.measure(prompts, alone).items()}
    cost = np.argsort([found[f"cost {at}"] for at in range(layers)])
    gain = np.argsort([-found[f"gain {at}"] for at in range(layers)])
    both = np.argsort(np.argsort(cost) + np.argsort(gain), kind="stable")
    rng = random.Random(seed)
    best = {}
    for count in counts:
        tried = [frozenset(order[:count].tolist()) for order in (cost, gain, both)]
        nats = _mean_nats(meter, prompts, tried)
        varied = [_exchange(_least(nats), every, rng) for _ in range(variations)]
        best[count] = sorted(_least(nats | _mean_nats(meter, prompts, varied)))
    return best


def _mean_nats(
    meter: DivergenceMeter, prompts: Sequence[Encoded], patterns: Sequence[frozenset[int]]
) -> dict[frozenset[int], float]:
    distinct = list(dict.fromkeys(patterns))
    layers = meter.routed.num_layers
    named = {str(at): StaticPolicy.with_sparse(layers, p) for at, p in enumerate(distinct)}
    measured = meter.measure(prompts, named)
    return {p: float(measured[str(at)].nats.mean()) for at, p in enumerate(distinct)}


def _least(nats: dict[frozenset[int], float]) -> frozenset[int]:
    return min(nats.items(), key=lambda item: item[1])[0]


def _exchange(chosen: frozenset[int], every: set[int], rng: random.Random) -> frozenset[int]:
    """Exchange one to three layers for others."""
    others = sorted(every - chosen)
    count = min(rng.randint(1, 3), len(others), len(chosen))
    return (chosen - set(rng.sample(sorted(chosen), count))) | set(rng.sample(others, count))


def compare(config: DivergenceConfig) -> dict[str, Any]:
    """Compare as a config says, and write `divergence.json` and `divergence.npz`.

    Returns: the contents of the former: a row a policy; the layers that have a route; static layers
        by how many they are; the rank correlation, over prompts, of the router's FULL layers with
        what all SPARSE would cost.
    """
    world: World = start_world(config.system.device)
    router, info = read_router(Path(config.router))
    routed = load_routed(config.model, info.sink_tokens, info.window_tokens, config.system, world)
    router, inputs = routed.layers.narrow(router, info)
    tokenizer = load_tokenizer(config.model)
    limit = routed.config.max_position_embeddings
    meter = DivergenceMeter(
        routed,
        inputs,
        make_pattern(info.sparse_pattern, info.sink_tokens, info.window_tokens),
        config.answer_tokens,
        config.micro_batch_tokens,
        info.full_decode_tokens,
    )
    began, layers = time.monotonic(), routed.num_layers
    statics: dict[int, list[int]] = {}
    numbered: dict[int, list[int]] = {}
    if config.search_prompts:
        train = FilePrompts(config.data, tokenizer, "train", config.seed, limit)
        counts = [round(share * layers) for share in config.shares]
        statics = search_static(
            meter,
            train.sample(config.search_prompts),
            counts,
            config.random_patterns,
            config.seed,
        )
        numbered = {count: routed.layers.number(places) for count, places in statics.items()}
        sys.stderr.write(f"[{time.monotonic() - began:.0f} s] static patterns {numbered}\n")
    router = router.to(world.device)
    policies: dict[str, Policy] = {"sparse": StaticPolicy.with_sparse(layers, range(layers))}
    policies |= {f"router@{at:g}": ThresholdPolicy(router, at) for at in config.thresholds}
    policies |= {
        f"static@{count}": StaticPolicy.with_sparse(layers, chosen)
        for count, chosen in statics.items()
    }
    test = FilePrompts(config.data, tokenizer, "test", config.seed, limit)
    measured = meter.measure(test.sample(config.prompts), policies)
    report = {
        "rows": [{"policy": name} | found.summary() for name, found in measured.items()],
        "layers": list(routed.layers.numbers),
        "static_layers": numbered,
        "need_correlation": {
            name: rank_correlation((1 - found.sparse).sum(axis=1), measured["sparse"].nats)
            for name, found in measured.items()
            if name.startswith("router")
        },
        "seconds": round(time.monotonic() - began, 1),
        "provenance": provenance(world.device, *config.data.files) | {"router": info.provenance},
    }
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "divergence.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    arrays = {f"{name}/nats": found.nats for name, found in measured.items()}
    arrays |= {f"{name}/sparse": found.sparse.astype(np.uint8) for name, found in measured.items()}
    np.savez_compressed(out / "divergence.npz", **arrays)  # type: ignore[arg-type]
    return report
