"""Fit routers to measured costs: the fewest FULL layers within a budget of divergence.

The expected cost of a router's choices has a closed form (`QuadraticCosts.expected_nats`), so
that no routes are sampled and the model does not run: hundreds of passes over all prompts take
seconds. A thousand prompts are few for a network; what holds it back is that all layers share one
view of the prompt (`_SharedTrunk`), noise on what it sees, and weight decay.

Dimension legend: N prompts, L layers, P pools, H head dim, F features of a layer's router.
"""

import dataclasses
import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from flux_vllm.router.inputs import RouterInputs
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.overlap import WIDTH
from flux_vllm.router.route import Route
from training.config import OptimizerSettings, RouterSettings, TrainConfig
from training.costs.measurements import Measurements
from training.costs.quadratic import QuadraticCosts
from training.distributed import World
from training.evaluation.ranks import rank_correlation
from training.losses import excess_confidence
from training.objectives import QualityBudget
from training.schedule import rate_scale
from training.standardize import StandardizedRouter

_FIRST_MULTIPLIER = 1.0
"""Low: a layer that was once surely FULL hardly comes back."""
_BETAS = (0.9, 0.98)
_HEAD = ("head.0", "head.2", "head.4")
_LEAST_DEVIATION = 0.1
"""Deviations below this share of the median are raised to it: they are noise."""
_BIAS_RATE = 10
_LEAST_NATS = 5e-4
_TOLD_WEIGHTS = {"length": 2.0, "overlap": 1.0}
"""Of a number that is told of a prompt beside one number of a query."""
_LEAST_TOLD_DEVIATION = 0.01


def assemble(measured: Measurements, inputs: RouterInputs) -> torch.Tensor:
    """Give all routers' inputs: [L, N, F] float32."""
    pooled = torch.from_numpy(measured.pooled).float()
    return inputs.assemble(pooled.transpose(0, 1))


def fit_router(
    measured: Measurements,
    costs: QuadraticCosts,
    inputs: RouterInputs,
    config: TrainConfig,
) -> tuple[StandardizedRouter, dict[str, Any]]:
    """Fit routers.

    Args:
        measured: training prompts.
        costs: theirs.
        inputs: what the routers look at.
        config: seed, widths, budget, optimizer.

    Returns: the routers; the last update's nats, the budget, what all SPARSE costs, share of SPARSE
    and multiplier.
    """
    torch.manual_seed(config.seed)
    seen = assemble(measured, inputs)
    network = _SharedTrunk(seen, inputs, measured.pooled.shape[-1], config.router.widths)
    everything = costs.nats(torch.ones_like(costs.lengths))
    view, need = network.view(seen), _log_need(everything)
    gains = beyond(measured, config.router) ** config.costs.length_power
    gains = gains / gains.mean()
    settings, loss, most = config.optimizer, config.loss, config.costs.most_nats
    at_stake = (most * -torch.expm1(-everything / most)).mean().item()
    nats_budget = min(loss.budget_nats, loss.budget_share * at_stake)
    optimizer = _make_optimizer(network, settings)
    budget = QualityBudget(dataclasses.replace(loss, budget_nats=nats_budget))
    budget.weight = _FIRST_MULTIPLIER
    world = World(0, 1, torch.device("cpu"))
    nats = math.nan
    for step in range(settings.steps):
        rate = settings.learning_rate * rate_scale(step / settings.steps, settings)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["times"]
        rows = torch.randperm(len(view))[: settings.batch_size]
        noise = config.costs.input_noise * torch.randn(len(rows), view.shape[1])
        logits, guess = network(view[rows] + noise * network.is_noisy)
        expected = costs.take(rows).expected_nats(logits.softmax(-1)[..., Route.SPARSE].T)
        answers = most * -torch.expm1(-expected / most).mean()
        full = budget.of_routes(logits, (), len(rows), world, gains[rows])
        total = budget.weight * answers + full
        total = total + loss.logit_penalty * excess_confidence(logits, loss.logit_bound)
        total = total + config.costs.need_weight * (guess - need[rows]).square().mean()
        optimizer.zero_grad()
        total.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(network.parameters(), settings.gradient_norm)
        optimizer.step()
        nats = answers.item()
        budget.ascend(nats)
    told = {"nats": nats, "budget_nats": nats_budget, "all_sparse_nats": at_stake}
    rounded = {name: round(value, 5) for name, value in told.items()}
    return network.to_router(), rounded | budget.describe()


def beyond(measured: Measurements, settings: RouterSettings) -> torch.Tensor:
    """Count prompts' tokens beyond sinks and window, which SPARSE does not read: [N] float32."""
    reach = settings.sink_tokens + settings.window_tokens
    return torch.from_numpy(measured.tokens - reach).clamp(min=1).float()


def _log_need(all_sparse: torch.Tensor) -> torch.Tensor:
    """Standardise the log of what all SPARSE costs, nats [N]: [N]."""
    need = torch.log(all_sparse + _LEAST_NATS)
    return (need - need.mean()) / need.std()


def _make_optimizer(network: "_SharedTrunk", settings: OptimizerSettings) -> torch.optim.AdamW:
    """Decay weights alone; what all prompts need alike, the last biases, comes first."""
    last = network.heads.linear(_HEAD[-1])[1]
    weights = [p for name, p in network.named_parameters() if name.endswith("weight")]
    biases = [
        p for name, p in network.named_parameters() if name.endswith("bias") and p is not last
    ]
    groups: list[dict[str, Any]] = [
        {"params": weights, "times": 1.0},
        {"params": biases, "times": 1.0, "weight_decay": 0.0},
        {"params": [last], "times": _BIAS_RATE, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=_BETAS, weight_decay=settings.weight_decay)


class _SharedTrunk(nn.Module):
    """A LayerRouter in training, whose first two linear layers are one for all layers.

    It sees the context layers' pooled queries, not a layer's own: those of layers next to one
    another say the same, and a thousand prompts teach little about the difference.

    Args:
        seen: [L, N, F] inputs of training prompts, to standardise by.
        inputs: what they are made of.
        head_dim: H.
        widths: of the routers.

    Raises: ValueError: no context layers.
    """

    def __init__(
        self, seen: torch.Tensor, inputs: RouterInputs, head_dim: int, widths: tuple[int, ...]
    ) -> None:
        super().__init__()
        if not (inputs.context_layers and widths):
            raise ValueError(
                "expected --router.context_depths and four --router.widths with the objective "
                "'budget', found none; give them, or train with --recipe paper"
            )
        self.shape = (len(seen), head_dim, inputs.vectors, widths)
        self.own = len(inputs.pools) * head_dim
        view = seen[0, :, self.own :]
        self.mean, deviation = view.mean(dim=0), view.std(dim=0)
        told = _told_weights(inputs, head_dim)
        is_told = told > 0
        self.is_noisy = (~is_told).float()
        least = _LEAST_DEVIATION * deviation[~is_told].median()
        self.scale = torch.where(
            is_told,
            told / deviation.clamp(min=_LEAST_TOLD_DEVIATION),
            1 / deviation.maximum(least).clamp(min=1e-6),
        )
        first, second, *_ = widths
        self.first, self.second = nn.Linear(len(self.mean), first), nn.Linear(first, second)
        # Its own first two linear layers are not used.
        self.heads = LayerRouter(len(seen), head_dim, 1, widths)
        self.need = nn.Linear(second, 1)
        weight, bias = self.heads.linear(_HEAD[-1])
        with torch.no_grad():
            weight.mul_(0.1)
            bias.zero_()

    def view(self, seen: torch.Tensor) -> torch.Tensor:
        """Standardise what the context layers say: [L, N, F] to [N, F']."""
        return (seen[0, :, self.own :] - self.mean) * self.scale

    def forward(self, view: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Score all layers, and guess the standardised log cost of all SPARSE.

        Args:
            view: [N, F'].

        Returns: router_logits [L, N, 2], and the guess [N].
        """
        shared = self.second(functional.silu(self.first(view)))
        x = shared.expand(self.shape[0], -1, -1)
        for name in _HEAD:
            weight, bias = self.heads.linear(name)
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            x = functional.silu(x) if name != _HEAD[-1] else x
        return x, self.need(shared)[:, 0]

    @torch.no_grad()
    def to_router(self) -> StandardizedRouter:
        """Return plain routers that compute the same from raw inputs."""
        layers, head_dim, vectors, widths = self.shape
        router = StandardizedRouter(LayerRouter(layers, head_dim, vectors, widths))
        router.mean[:, self.own :] = self.mean
        router.inverse_deviation[:, self.own :] = self.scale
        for name, linear in (("features.0", self.first), ("features.2", self.second)):
            weight, bias = router.router.linear(name)
            weight.zero_()
            weight[:, :, -linear.in_features :] = linear.weight
            bias[:] = linear.bias
        for name in _HEAD:
            for ours, theirs in zip(
                router.router.linear(name), self.heads.linear(name), strict=True
            ):
                ours.copy_(theirs)
        return router


def _told_weights(inputs: RouterInputs, head_dim: int) -> torch.Tensor:
    """Weigh the context layers' inputs that are told, of which equal ones count as one; 0: queries.

    Returns: [F'] float32.
    """
    layers = len(inputs.context_layers)
    numbers = {"length": 1, "overlap": min(WIDTH, head_dim)}
    weights = [
        _TOLD_WEIGHTS[pool.kind] / math.sqrt(layers * head_dim / numbers[pool.kind])
        if pool.is_told
        else 0.0
        for pool in inputs.pools
    ]
    return torch.tensor(weights * layers).repeat_interleave(head_dim)


@torch.no_grad()
def describe(
    router: LayerRouter,
    measured: Measurements,
    costs: QuadraticCosts,
    inputs: RouterInputs,
    settings: RouterSettings,
    thresholds: tuple[float, ...],
) -> list[dict[str, float | None]]:
    """Say what routers would do with prompts, by the model of costs.

    Returns: a row a threshold: share of SPARSE, share of the keys it could leave unread that it
        does, mean nats, and the rank correlation of a prompt's FULL layers with what all SPARSE was
        measured to cost it.
    """
    logits = router.forward_all(assemble(measured, inputs))
    probability = logits.softmax(-1)[..., Route.FULL].T
    need = np.nanmax(np.where(measured.sparse.all(-1), measured.nats, np.nan), axis=1)
    unread = beyond(measured, settings)
    unread = unread / unread.sum()
    rows = []
    for threshold in thresholds:
        sparse = (probability < threshold).float()
        rows.append(
            {
                "threshold": threshold,
                "sparse_share": round(float(sparse.mean()), 4),
                "unread_share": round(float(sparse.mean(dim=1) @ unread), 4),
                "nats": round(float(costs.nats(sparse).mean()), 5),
                "need_correlation": rank_correlation((1 - sparse).sum(1).numpy(), need),
            }
        )
    return rows
