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
from training.evaluation.scoring import Condition, Scores
from training.evaluation.statistics import Cells, interval
from training.evaluation.stored_scores import StoredScorer
from training.policies import Policy, StaticPolicy


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One condition, as its name says."""

    name: str
    setting: dict[str, Any] = field(default_factory=dict)
    """Fields of PromptSetting that differ from the test prompts'."""
    chunk_tokens: int | None = None
    """Prefill chunk; None: the prompt in one."""
    cached: bool = False
    """After a local question on the same context."""
    without: str = ""
    """What the report calls the router on these very prompts without chunks or a cached context;
    empty where neither is meant."""


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
    if name == "cached":
        return Variant(name=name, setting={"same_context": True}, cached=True, without="alone")
    if kind == "wrapper" and value in WRAPPERS:
        return Variant(name=name, setting={"wrapper": value})
    if kind == "chunks" and value.isdecimal() and int(value) > 0:
        return Variant(name=name, chunk_tokens=int(value), without="one_chunk")
    raise ValueError(
        "expected a variant among plain, begun, wording, wrapper:NAME, chunks:TOKENS and cached, "
        f"found {name!r}; correct --variants"
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

    Returns: the comparison with full attention on the same prompts, and with the router without
        the condition where the variant names that; and by prompt [P] `NAME/task`, `NAME/length`,
        `NAME/full`, `NAME/router`, `NAME/share` and the score without the condition.
    """
    made = make(**variant.setting)
    prompts, cells = made.prompts, made.cells
    condition = Condition(chunk_tokens=variant.chunk_tokens)
    if variant.cached:
        before = make(**variant.setting, ask_locally=True)
        condition = Condition(cached=scorer.score(before.prompts, policy))
    full = scorer.score(prompts, StaticPolicy.all_full(scorer.routed.num_layers))
    routed = scorer.score(prompts, policy, condition)
    report = compare(cells, full, routed)
    by_prompt = {
        "task": np.array([prompt.task for prompt in prompts]),
        "length": np.array(made.lengths),
        "full": full.score,
        "router": routed.score,
        "share": routed.sparse.mean(axis=1),
    }
    if variant.without:
        without = scorer.score(prompts, policy)
        report[variant.without] = _compare_without(cells, variant.without, without, routed)
        by_prompt[variant.without] = without.score
    return report, {f"{variant.name}/{name}": values for name, values in by_prompt.items()}


def _compare_without(cells: Cells, name: str, without: Scores, routed: Scores) -> dict[str, Any]:
    """Say what the router scores without the condition, and what the condition changes."""
    share = without.sparse.mean(axis=1)
    groups = cells.by_group(without.score)
    values = {name: without.score, "router": routed.score}
    return {
        "share": cells.overall(share),
        "share_by_group": cells.by_group(share),
        "score": cells.overall(without.score),
        "score_by_group": groups,
        "intervals": interval(cells, values, "overall"),
        "retrieval_intervals": interval(cells, values, "retrieval")
        if "retrieval" in groups
        else {},
    }
