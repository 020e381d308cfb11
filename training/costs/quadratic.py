"""A second-order model of what SPARSE layers cost a prompt.

Near full attention a divergence is quadratic in what disturbs it. Layer l, SPARSE, moves prompt
n's answers by a vector; the vectors of several layers add, and half the sum's squared length is
the divergence. Their directions are taken to be the model's and their lengths the prompt's:

    nats(n, sparse) = 1/2 | sum_l  sparse_l  length_nl  direction_l |^2

Directions have no negative part: what one layer loses never makes up for what another loses.
Measured slopes of SPARSE layers are negative in one case of 25; a model that may cancel finds
patterns that cost little because of its errors.

One measured gradient and two measured values a prompt settle its L lengths, and what any other
routes would cost follows without running the model.

Dimension legend: N prompts, K samples, L layers, R dimensions of the vectors.
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

from training.costs.measurements import Measurements

_LEAST_NATS = 3e-4
"""Costs below this are told apart no better than rounding tells them."""
_LARGEST_ERROR = 3.0
_SLOPE_WEIGHT = 0.5
_SHARPNESS = 4.0
"""Of the softplus that keeps directions positive."""


@dataclass(frozen=True, slots=True)
class QuadraticCosts:
    """The costs of N prompts."""

    lengths: torch.Tensor
    """[N, L] float32."""
    directions: torch.Tensor
    """[L, R] float32, unit vectors without negative part."""

    def take(self, rows: torch.Tensor) -> "QuadraticCosts":
        """Keep some prompts."""
        return QuadraticCosts(self.lengths[rows], self.directions)

    def nats(self, sparse: torch.Tensor) -> torch.Tensor:
        """Give the cost of routes [N, L], 1 for SPARSE, to [N]; shares of SPARSE are mixtures."""
        moved = (self.lengths * sparse) @ self.directions
        return 0.5 * moved.square().sum(dim=1)

    def expected_nats(self, sparse: torch.Tensor) -> torch.Tensor:
        """Give the mean cost of routes drawn with P(SPARSE) [N, L], each by itself, to [N]."""
        spread = sparse * (1 - sparse) * self.lengths.square()
        return self.nats(sparse) + 0.5 * spread.sum(dim=1)


def fit_costs(
    measured: Measurements, rank: int = 12, steps: int = 350, prior_weight: float = 0.005
) -> QuadraticCosts:
    """Fit the model to measurements, by log costs and relative slopes.

    Args:
        measured: of N prompts.
        rank: R.
        steps: of Adam.
        prior_weight: pulls a prompt's lengths to the model's mean profile times a factor.
    """
    sparse = torch.from_numpy(measured.sparse).float()
    nats = torch.from_numpy(measured.nats)
    slopes = torch.from_numpy(measured.slopes)
    has_nats, has_slopes = ~nats.isnan(), ~slopes.isnan()
    nats, slopes = nats.nan_to_num(), slopes.nan_to_num()
    prompts, _, layers = sparse.shape
    generator = torch.Generator().manual_seed(0)
    directions = 0.5 + 0.5 * torch.randn(layers, rank, generator=generator)
    profile = torch.full((layers,), -2.3)
    factor, own = torch.zeros(prompts, 1), torch.zeros(prompts, layers)
    slow, fast = [directions, profile], [factor, own]
    for tensor in slow + fast:
        tensor.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": slow, "lr": 0.03}, {"params": fast, "lr": 0.05}])
    for _ in range(steps):
        unit = _unit(directions)
        lengths = torch.exp(profile + factor + own)
        moved = torch.einsum("nkl,nl,lr->nkr", sparse, lengths, unit)
        log_error = torch.log(0.5 * moved.square().sum(-1) + _LEAST_NATS) - torch.log(
            nats + _LEAST_NATS
        )
        slope = lengths[:, None] * torch.einsum("nkr,lr->nkl", moved, unit)
        slope_error = (slope - slopes) / (nats[..., None] + _LEAST_NATS)
        slope_error = slope_error.clamp(-_LARGEST_ERROR, _LARGEST_ERROR)
        loss = (log_error.square() * has_nats).sum()
        loss = loss + _SLOPE_WEIGHT * (slope_error.square() * has_slopes).sum()
        loss = (loss + prior_weight * own.square().sum()) / prompts
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    with torch.no_grad():
        lengths = torch.exp(profile + factor + own)
        return QuadraticCosts(lengths, _unit(directions))


def _unit(directions: torch.Tensor) -> torch.Tensor:
    """Make unit vectors without negative part of any [L, R]."""
    return functional.normalize(functional.softplus(directions, beta=_SHARPNESS), dim=1)


def nested_patterns(costs: QuadraticCosts, counts: list[int]) -> dict[int, list[int]]:
    """Give the best static patterns that greedy choice finds.

    Args:
        costs: of training prompts.
        counts: numbers of SPARSE layers.

    Returns: SPARSE layers, ascending, by their number; each pattern contains the smaller ones.
    """
    prompts, layers = costs.lengths.shape
    sparse = torch.ones(layers)
    found = {}
    for count in range(layers, min(counts) - 1, -1):
        if count in counts:
            found[count] = sparse.nonzero()[:, 0].tolist()
        trials = {
            layer: costs.nats(
                (sparse - functional.one_hot(torch.tensor(layer), layers)).expand(prompts, -1)
            )
            for layer in sparse.nonzero()[:, 0].tolist()
        }
        if trials:
            sparse[min(trials, key=lambda layer: float(trials[layer].mean()))] = 0
    return found
