"""Fit routers to measured costs: the fewest FULL layers within a budget of divergence.

The expected cost of a router's choices has a closed form (`QuadraticCosts.expected_nats`), so
that no routes are sampled and the model does not run: hundreds of passes over all prompts take
seconds. A thousand prompts are few for a network; what holds it back is that all layers share one
view of the prompt (`_SharedTrunk`), noise on what it sees, and weight decay.

Dimension legend: N prompts, L layers, P pools, H head dim, F features of a layer's router.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from flux_vllm.router.inputs import RouterInputs
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from training.config import FitSettings, LossSettings
from training.costs.measurements import Measurements
from training.costs.quadratic import QuadraticCosts
from training.losses import excess_confidence
from training.standardize import StandardizedRouter

_FIRST_MULTIPLIER = 1.0
"""Low: a layer that was once surely FULL hardly comes back."""
_MOST_MULTIPLIER = 1000.0
_MOST_EXCESS = 3.0
_BETAS = (0.9, 0.98)
_HEAD = ("head.0", "head.2", "head.4")
_LEAST_DEVIATION = 0.1
"""Deviations below this share of the median are raised to it: they are noise."""
_BIAS_RATE = 10
_LEAST_NATS = 3e-3
_LENGTH_WEIGHT = 2.0
"""Of a prompt's length beside one number of a query."""


def assemble(measured: Measurements, inputs: RouterInputs) -> torch.Tensor:
    """Give all routers' inputs: [L, N, F] float32."""
    pooled = torch.from_numpy(measured.pooled).float()
    return inputs.assemble(pooled.transpose(0, 1))


def fit_router(
    measured: Measurements,
    costs: QuadraticCosts,
    inputs: RouterInputs,
    widths: tuple[int, ...],
    loss: LossSettings,
    settings: FitSettings,
    seed: int,
) -> tuple[StandardizedRouter, dict[str, Any]]:
    """Fit routers.

    Args:
        measured: training prompts.
        costs: theirs.
        inputs: what the routers look at.
        widths: of the routers.
        loss: the budget.
        settings: of the fit.
        seed: of initial weights and noise.

    Returns: the routers, and the fit's last share of SPARSE, nats and multiplier.
    """
    torch.manual_seed(seed)
    seen = assemble(measured, inputs)
    network = _SharedTrunk(seen, inputs, measured.pooled.shape[-1], widths)
    decayed = [p for name, p in network.named_parameters() if name.endswith("weight")]
    biases = [
        p
        for name, p in network.named_parameters()
        if name.endswith("bias") and name != "heads.head_4_bias"
    ]
    groups: list[dict[str, Any]] = [
        {"params": decayed},
        {"params": biases, "weight_decay": 0.0},
        # What all prompts need alike comes first.
        {"params": [network.heads["head_4_bias"]], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(
        groups, lr=settings.learning_rate, betas=_BETAS, weight_decay=settings.weight_decay
    )
    view = network.view(seen)
    need = torch.log(costs.nats(torch.ones_like(costs.lengths)) + _LEAST_NATS)
    need = (need - need.mean()) / need.std()
    multiplier, state = _FIRST_MULTIPLIER, {}
    for step in range(settings.steps):
        rate = settings.learning_rate * _rate(step, settings.steps)
        for group, times in zip(optimizer.param_groups, (1, 1, _BIAS_RATE), strict=True):
            group["lr"] = rate * times
        rows = torch.randperm(len(view))[: settings.batch_size]
        noise = settings.input_noise * torch.randn(len(rows), view.shape[1])
        logits = network(view[rows] + noise * network.is_noisy)
        sparse = logits.softmax(-1)[..., Route.SPARSE].T
        nats = costs.take(rows).expected_nats(sparse)
        answers = settings.most_nats * -torch.expm1(-nats / settings.most_nats).mean()
        full_share = 1 - sparse.mean()
        excess = excess_confidence(logits, loss.logit_bound) / len(logits)
        guess = network.guess_need(view[rows] + noise * network.is_noisy)
        miss = (guess - need[rows]).square().mean()
        total = multiplier * answers + full_share + loss.logit_penalty * excess
        optimizer.zero_grad()
        (total + settings.need_weight * miss).backward()
        optimizer.step()
        beyond = min(answers.item() / loss.budget_nats - 1, _MOST_EXCESS)
        multiplier *= math.exp(loss.multiplier_rate * beyond)
        multiplier = min(max(multiplier, 1 / _MOST_MULTIPLIER), _MOST_MULTIPLIER)
        state = {
            "sparse_share": round(1 - full_share.item(), 4),
            "nats": round(answers.item(), 5),
            "multiplier": round(multiplier, 3),
        }
    return network.to_router(), state


def _rate(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / 20) * (0.02 + 0.49 * (1 + math.cos(math.pi * step / steps)))


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
        kinds = [pool.kind == "length" for pool in inputs.pools] * len(inputs.context_layers)
        is_length = torch.tensor(kinds).repeat_interleave(head_dim)
        self.is_noisy = (~is_length).float()
        least = _LEAST_DEVIATION * deviation[~is_length].median()
        scale = torch.where(is_length, deviation, deviation.maximum(least)).clamp(min=1e-6)
        # A length stands there as many equal numbers, which count as one.
        self.scale = torch.where(
            is_length, _LENGTH_WEIGHT / math.sqrt(max(1, int(is_length.sum()))) / scale, 1 / scale
        )
        first, second, third, fourth = widths
        self.first, self.second = nn.Linear(len(self.mean), first), nn.Linear(first, second)
        heads = LayerRouter(len(seen), head_dim, 1, (first, second, third, fourth))
        self.heads = nn.ParameterDict(
            {
                f"{name.replace('.', '_')}_{kind}": nn.Parameter(tensor.detach())
                for name in _HEAD
                for kind, tensor in zip(("weight", "bias"), heads.linear(name), strict=True)
            }
        )
        self.need = nn.Linear(second, 1)
        with torch.no_grad():
            self.heads["head_4_weight"].mul_(0.1)
            self.heads["head_4_bias"].zero_()

    def view(self, seen: torch.Tensor) -> torch.Tensor:
        """Standardise what the context layers say: [L, N, F] to [N, F']."""
        return (seen[0, :, self.own :] - self.mean) * self.scale

    def trunk(self, view: torch.Tensor) -> torch.Tensor:
        """Compute what all layers share: [N, F'] to [N, w]."""
        hidden: torch.Tensor = self.second(functional.silu(self.first(view)))
        return hidden

    def forward(self, view: torch.Tensor) -> torch.Tensor:
        """Score all layers: [N, F'] to router_logits [L, N, 2]."""
        x = self.trunk(view).expand(self.shape[0], -1, -1)
        for name in ("head_0", "head_2", "head_4"):
            weight, bias = self.heads[f"{name}_weight"], self.heads[f"{name}_bias"]
            x = torch.baddbmm(bias[:, None], x, weight.transpose(1, 2))
            x = functional.silu(x) if name != "head_4" else x
        return x

    def guess_need(self, view: torch.Tensor) -> torch.Tensor:
        """Guess the standardised log cost of all SPARSE: [N, F'] to [N]."""
        return self.need(self.trunk(view))[:, 0]  # type: ignore[no-any-return]

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
            weight, bias = router.router.linear(name)
            weight.copy_(self.heads[f"{name.replace('.', '_')}_weight"])
            bias.copy_(self.heads[f"{name.replace('.', '_')}_bias"])
        return router


@torch.no_grad()
def describe(
    router: LayerRouter,
    measured: Measurements,
    costs: QuadraticCosts,
    inputs: RouterInputs,
    thresholds: tuple[float, ...],
) -> list[dict[str, float]]:
    """Say what routers would do with prompts, by the model of costs.

    Returns: a row a threshold: share of SPARSE, mean nats, and the rank correlation of a prompt's
        FULL layers with what all SPARSE was measured to cost it.
    """
    logits = router.forward_all(assemble(measured, inputs))
    probability = logits.softmax(-1)[..., Route.FULL].T
    need = np.nanmax(np.where(measured.sparse.all(-1), measured.nats, np.nan), axis=1)
    rows = []
    for threshold in thresholds:
        sparse = (probability < threshold).float()
        rows.append(
            {
                "threshold": threshold,
                "sparse_share": round(float(sparse.mean()), 4),
                "nats": round(float(costs.nats(sparse).mean()), 5),
                "need_correlation": rank_correlation((1 - sparse).sum(1).numpy(), need),
            }
        )
    return rows


def rank_correlation(left: np.ndarray, right: np.ndarray) -> float:
    """Give Spearman's correlation; NaN where either is the same for all prompts."""
    ranks = [_ranks(left), _ranks(right)]
    if any(rank.std() == 0 for rank in ranks):
        return math.nan
    return round(float(np.corrcoef(ranks)[0, 1]), 4)


def _ranks(values: np.ndarray) -> np.ndarray:
    """Rank values, equal ones by the mean of their places."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]
