"""The router under conditions it may meet, against full attention and itself without them.

Dimension legend: P prompts.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from training.data.encoding import WRAPPERS
from training.evaluation.compare_patterns import compare
from training.evaluation.prompts import PromptSet
from training.evaluation.stored_scores import StoredScorer
from training.policies import Policy, StaticPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One condition, as its name says."""

    name: str
    setting: dict[str, Any] = field(default_factory=dict)
    """Fields of PromptSetting that differ from the test prompts'."""


def read_variant(name: str) -> Variant:
    """Read a variant's name.

    Raises: ValueError: an unknown one.
    """
    kind, _, value = name.partition(":")
    if name == "plain":
        return Variant(name=name)
    if name == "begun":
        return Variant(name=name, setting={"begun": True})
    if name == "wording":
        return Variant(name=name, setting={"held_out_wording": True})
    if kind == "wrapper" and value in WRAPPERS:
        return Variant(name=name, setting={"wrapper": value})
    raise ValueError(
        "expected a variant among plain, begun, wording and wrapper:NAME, found "
        f"{name!r}; correct --variants"
    )


def measure_variant(
    variant: Variant,
    make: Callable[..., PromptSet],
    scorer: StoredScorer,
    policy: Policy,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Measure a router under one condition.

    Args:
        variant: the condition.
        make: makes the variant's prompts; takes fields of PromptSetting.
        scorer: runs the model.
        policy: the router's.

    Returns: the comparison with full attention on the same prompts; and by prompt [P] `NAME/task`,
        `NAME/length`, `NAME/full`, `NAME/router`, `NAME/share`.
    """
    made = make(**variant.setting)
    prompts, cells = made.prompts, made.cells
    full = scorer.score(prompts, StaticPolicy.all_full(scorer.routed.num_layers))
    routed = scorer.score(prompts, policy)
    by_prompt = {
        "task": np.array([prompt.task for prompt in prompts]),
        "length": np.array(made.lengths),
        "full": full.score,
        "router": routed.score,
        "share": routed.sparse.mean(axis=1),
    }
    named = {f"{variant.name}/{name}": values for name, values in by_prompt.items()}
    return compare(cells, full, routed), named
