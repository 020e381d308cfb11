"""Static baselines: the same layers SPARSE for every prompt.

Dimension legend: P prompts.
"""

import random
from collections.abc import Sequence

from flux_vllm.router.route import Route
from training.data.encoding import Encoded
from training.evaluation.statistics import Cells
from training.evaluation.stored_scores import StoredScorer
from training.policies import StaticPolicy


def pattern(num_layers: int, sparse_layers: Sequence[int]) -> StaticPolicy:
    """Make a policy that is SPARSE in the given layers."""
    chosen = set(sparse_layers)
    return StaticPolicy(
        [Route.SPARSE if layer in chosen else Route.FULL for layer in range(num_layers)]
    )


def layers_by_sensitivity(
    scorer: StoredScorer, prompts: Sequence[Encoded], cells: Cells
) -> list[int]:
    """Order layers by what making each alone SPARSE costs, cheapest first.

    The cost is the mean surprise of the answers, which ranks layers that no score tells apart.
    """
    layers = scorer.routed.num_layers
    costs = [
        cells.overall(scorer.score(prompts, pattern(layers, [layer])).surprise)
        for layer in range(layers)
    ]
    return sorted(range(layers), key=lambda layer: costs[layer])


def best_pattern(
    scorer: StoredScorer,
    prompts: Sequence[Encoded],
    cells: Cells,
    order: list[int],
    count: int,
    random_patterns: int,
) -> tuple[list[int], dict[str, object]]:
    """Choose the best pattern of `count` SPARSE layers on validation prompts.

    Args:
        scorer: runs the model.
        prompts: validation prompts.
        cells: of these prompts.
        order: of `layers_by_sensitivity`; its first `count` are the greedy pattern.
        count: SPARSE layers.
        random_patterns: further candidates, the same in every run.

    Returns: the SPARSE layers, and the candidates' validation scores.
    """
    layers = scorer.routed.num_layers
    rng = random.Random(f"patterns/{count}")
    candidates = [sorted(order[:count])]
    candidates += [sorted(rng.sample(range(layers), count)) for _ in range(random_patterns)]
    if count in (0, layers):
        candidates = candidates[:1]
    scores = [
        cells.overall(scorer.score(prompts, pattern(layers, chosen)).score) for chosen in candidates
    ]
    best = max(range(len(candidates)), key=lambda index: scores[index])
    return candidates[best], {
        "greedy": round(scores[0], 4),
        "random": [round(score, 4) for score in sorted(scores[1:], reverse=True)],
        "chosen": "greedy" if best == 0 else "random",
    }
