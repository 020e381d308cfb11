"""Evaluate one router: quality against sparsity, static baselines, conditions it may meet.

Dimension legend: P prompts, L layers.
"""

import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from flux_vllm.patterns import make_pattern
from flux_vllm.router.checkpoint import read_router
from flux_vllm.router.model import LayerRouter
from training.config import EvalConfig
from training.distributed import World, start_world
from training.evaluation.compare_patterns import compare, compare_pattern
from training.evaluation.prompts import PromptSet, PromptSetting, make_prompts
from training.evaluation.report import plot_report, write_json
from training.evaluation.scoring import Scorer, Scores, group_of
from training.evaluation.static_patterns import best_pattern, layers_by_sensitivity, pattern
from training.evaluation.statistics import Cells, interval
from training.evaluation.stored_scores import StoredScorer
from training.evaluation.variants import Variant, measure_variant, read_variant
from training.model_loading import load_routed, load_tokenizer
from training.policies import Policy, StaticPolicy, ThresholdPolicy
from training.provenance import provenance

_DEFAULT_THRESHOLD = 0.5


class Evaluation:
    """Everything one evaluation run measures.

    Args:
        config: of the run.
        world: this process among the others.

    Raises: ValueError: an unknown variant, a router with `full_decode_tokens`, or static layers
        that the model does not have.
    """

    def __init__(self, config: EvalConfig, world: World) -> None:
        self.config = config
        self.world = world
        self.variants = [read_variant(name) for name in config.variants]
        router, self.info = read_router(Path(config.router))
        if self.info.full_decode_tokens:
            raise ValueError(
                f"expected a router without full_decode_tokens in {config.router}, found "
                f"{self.info.full_decode_tokens}, under which nothing is scored here; measure it "
                "with `python -m training divergence`"
            )
        self.tokenizer = load_tokenizer(config.model)
        self.routed = load_routed(
            config.model, self.info.sink_tokens, self.info.window_tokens, config.system, world
        )
        narrow, self.inputs = self.routed.layers.narrow(router, self.info)
        self.router: LayerRouter = narrow.to(world.device)
        self.static_layers = self.routed.layers.place(config.static_layers, "static_layers")
        self.scorers = {
            name: self._scorer(name)
            for name in dict.fromkeys((self.info.sparse_pattern, *config.patterns))
        }
        # Of the router's own pattern.
        self.scorer = self.scorers[self.info.sparse_pattern]
        self.limit: int = self.routed.config.max_position_embeddings
        self.started = time.monotonic()
        self.report: dict[str, Any] = {}
        self.by_prompt: dict[str, np.ndarray] = {}
        self.test = self._prompts("test", config.prompts, config.lengths)

    def _scorer(self, name: str) -> StoredScorer:
        """Make what scores prompts whose SPARSE layers are prefilled under a pattern."""
        config, info = self.config, self.info
        sparse = make_pattern(name, info.sink_tokens, info.window_tokens)
        return StoredScorer(
            Scorer(
                self.routed,
                sparse,
                self.inputs,
                config.micro_batch_tokens,
                self.world,
            ),
            Path(config.scores or f"{config.out}/stored_scores"),
            {"model": config.model, "dtype": config.system.dtype},
        )

    def _prompts(self, split: str, count: int, lengths: tuple[int, ...], **more: Any) -> PromptSet:
        setting = PromptSetting(
            split=split,  # type: ignore[arg-type]
            seed=self.config.seed,
            lengths=lengths,
            prompts=count,
            **{"wrapper": self.config.data.wrappers[0]} | more,
        )
        return make_prompts(self.config.data, self.tokenizer, setting, self.limit)

    def run(self) -> dict[str, Any]:
        """Measure everything the config names.

        Returns: the contents of `quality.json`.
        """
        layers = self.routed.num_layers
        prompts, cells = self.test.prompts, self.test.cells
        full = self.scorer.score(prompts, StaticPolicy.all_full(layers))
        sparse = self.scorer.score(prompts, pattern(layers, range(layers)))
        default = self.scorer.score(prompts, self.policy(_DEFAULT_THRESHOLD))
        share = cells.by_group(default.sparse.mean(axis=1))
        self.store(
            "default scored",
            full_score=cells.overall(full.score),
            all_sparse_score=cells.overall(sparse.score),
            share_local=share.get("local"),
            share_retrieval=share.get("retrieval"),
            default={"threshold": _DEFAULT_THRESHOLD} | compare(cells, full, default),
            tasks=self._by_task(cells, {"full": full, "all_sparse": sparse, "router": default}),
            layers=list(self.routed.layers.numbers),
            heat_map=heat_map(self.test, default),
            points=[],
        )
        self.by_prompt = {
            "task": np.array([prompt.task for prompt in prompts]),
            "length": np.array(self.test.lengths),
            "full": full.score,
            "sparse": sparse.score,
            "routes": default.sparse.astype(np.uint8),
        }
        self._keep(_DEFAULT_THRESHOLD, default)
        if self.static_layers:
            self._static_layers(full)
        self._patterns(full)
        if self.config.shares or self.config.score_thresholds:
            self._points(full, default)
        found = {}
        for variant in self.variants:
            found[variant.name] = self.variant(variant)
            self.store(f"variant {variant.name}", variants=found)
        if self.world.is_main:
            path = Path(self.config.out) / "scores.npz"
            np.savez_compressed(path, **self.by_prompt)  # type: ignore[arg-type]
        return self.report

    def store(self, what: str, **parts: Any) -> None:
        """Add parts to the report and write it, so that an interrupted run leaves what it has."""
        self.report |= parts | {"provenance": self._provenance()}
        if self.world.is_main:
            write_json(Path(self.config.out) / "quality.json", self.report)
        self.note(what)

    def policy(self, threshold: float) -> Policy:
        """Make the router's policy at a threshold."""
        return ThresholdPolicy(self.router, threshold)

    def _keep(self, threshold: float, routed: Scores) -> None:
        """Keep a threshold's results by prompt, for comparisons with another router's."""
        self.by_prompt[f"router@{threshold}"] = routed.score
        self.by_prompt[f"share@{threshold}"] = routed.sparse.mean(axis=1)

    def note(self, what: str) -> None:
        """Tell how far the run is."""
        if self.world.is_main:
            spent = time.monotonic() - self.started
            tokens = sum(stored.scorer.tokens for stored in self.scorers.values()) / 1e6
            sys.stderr.write(f"[{spent:6.1f} s, {tokens:.1f} M tokens] {what}\n")

    def _static_layers(self, full: Scores) -> None:
        """Score the config's own static pattern."""
        layers = sorted(set(self.static_layers))
        static = self.scorer.score(self.test.prompts, pattern(self.routed.num_layers, layers))
        self.by_prompt["static"] = static.score
        found = compare(self.test.cells, full, static, "static")
        self.store(
            "static layers scored", static={"layers": self.routed.layers.number(layers)} | found
        )

    def _patterns(self, full: Scores) -> None:
        """Score the default threshold and all SPARSE under the config's patterns."""
        prompts, cells = self.test.prompts, self.test.cells
        found: dict[str, Any] = {}
        for name in self.config.patterns or (self.info.sparse_pattern,):
            scorer = self.scorers[name]
            found[name] = compare_pattern(
                cells,
                full,
                scorer.score(prompts, self.policy(_DEFAULT_THRESHOLD)),
                scorer.score(
                    prompts, pattern(self.routed.num_layers, range(self.routed.num_layers))
                ),
            )
            self.store(f"pattern {name}", patterns=found)

    def _points(self, full: Scores, default: Scores) -> None:
        """Score thresholds chosen on validation and given ones, each beside a static pattern.

        The pattern is the best on validation of those with as many SPARSE layers; without
        validation prompts there is none.
        """
        config = self.config
        count, lengths = config.validation_prompts, config.validation_lengths or config.lengths
        if not count:
            for threshold in choose_thresholds({}, (), config.score_thresholds):
                self._add_point(full, self._routed(threshold, default), threshold, [], None)
            return
        validation = self._prompts("validation", count, lengths)
        cells = validation.cells
        tried = {}
        for threshold in config.thresholds if config.shares else ():
            scores = self.scorer.score(validation.prompts, self.policy(threshold))
            share = cells.overall(scores.sparse.mean(axis=1))
            tried[threshold] = (share, cells.overall(scores.score))
        train = self._prompts("train", count, lengths)
        order = layers_by_sensitivity(self.scorer, train.prompts, train.cells)
        number = self.routed.layers.number
        statics: dict[str, Any] = {"order": number(order), "validation_thresholds": tried}
        self.store("thresholds and layers tried", static_patterns=statics)
        scored: dict[int, Scores] = {}
        chosen = choose_thresholds(tried, config.shares, config.score_thresholds)
        for threshold, least_shares in chosen.items():
            routed = self._routed(threshold, default)
            share = self.test.cells.overall(routed.sparse.mean(axis=1))
            layers = int(self.routed.num_layers * share + 1e-3)
            if layers not in scored:
                best, found = best_pattern(
                    self.scorer,
                    validation.prompts,
                    cells,
                    order,
                    layers,
                    config.random_patterns,
                )
                statics[str(layers)] = found | {"layers": number(best)}
                scored[layers] = self.scorer.score(
                    self.test.prompts, pattern(self.routed.num_layers, best)
                )
                self.by_prompt[f"static@{layers}"] = scored[layers].score
            self._add_point(full, routed, threshold, least_shares, scored[layers])

    def _routed(self, threshold: float, default: Scores) -> Scores:
        """Score the router at a threshold; `default` are its scores at the default one."""
        if threshold == _DEFAULT_THRESHOLD:
            return default
        routed = self.scorer.score(self.test.prompts, self.policy(threshold))
        self._keep(threshold, routed)
        return routed

    def _add_point(
        self,
        full: Scores,
        routed: Scores,
        threshold: float,
        least_shares: list[float],
        static: Scores | None,
    ) -> None:
        cells, share = self.test.cells, routed.sparse.mean(axis=1)
        point = {
            "threshold": threshold,
            "least_shares": least_shares,
            "share": cells.overall(share),
            "share_by_group": cells.by_group(share),
        }
        scored = {"router": routed}
        if static is not None:
            point["static_share"] = float(static.sparse.mean())
            scored["static"] = static
        for name, scores in scored.items():
            by_group = cells.by_group(scores.score)
            point[f"{name}_score"] = cells.overall(scores.score)
            point[f"{name}_retrieval"] = by_group.get("retrieval")
            point[f"{name}_local"] = by_group.get("local")
        values = {name: found.score for name, found in {"full": full, **scored}.items()}
        point["intervals"] = interval(cells, values, "overall")
        point["retrieval_intervals"] = {}
        if "retrieval" in cells.by_group(full.score):
            reference = "full" if static is None else "static"
            versus = {name: values[name] for name in (reference, "router")}
            point["retrieval_intervals"] = interval(cells, versus, "retrieval")
        self.store(f"threshold {threshold}", points=[*self.report["points"], point])

    def _by_task(self, cells: Cells, named: dict[str, Scores]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, scores in named.items():
            for task, by_length in cells.by_cell(scores.score).items():
                found.setdefault(task, {"group": group_of(task)})[name] = by_length
        for task, by_length in cells.by_cell(named["router"].sparse.mean(axis=1)).items():
            found[task]["share"] = by_length
        return found

    def variant(self, variant: Variant) -> dict[str, Any]:
        """Measure the router under one condition, and keep its scores by prompt."""
        count, lengths = self.config.variant_prompts, self.config.lengths
        make = partial(self._prompts, "test", count, lengths)
        policy = self.policy(_DEFAULT_THRESHOLD)
        report, by_prompt = measure_variant(variant, make, self.scorer, policy)
        self.by_prompt |= by_prompt
        return {"prompts": count} | report

    def _provenance(self) -> dict[str, Any]:
        return provenance(self.world.device, *self.config.data.sources) | {
            "prompts_per_cell": self.config.prompts,
            "lengths": list(self.config.lengths),
            "seed": self.config.seed,
            "seconds": round(time.monotonic() - self.started, 1),
            "router": {
                "inputs": repr(self.info.inputs),
                "sink_tokens": self.info.sink_tokens,
                "window_tokens": self.info.window_tokens,
                "sparse_pattern": self.info.sparse_pattern,
                "training": self.info.provenance,
            },
        }


def choose_thresholds(
    tried: dict[float, tuple[float, float]],
    shares: tuple[float, ...],
    given: tuple[float, ...] = (),
) -> dict[float, list[float]]:
    """Choose, for each share to reach, the lowest threshold that reaches it on validation.

    More layers are FULL under a lower threshold. The validation scores would tell neighbours apart
    by chance alone.

    Args:
        tried: threshold to (share, score) on validation.
        shares: least shares of SPARSE layers.
        given: thresholds fixed beforehand.

    Returns: thresholds, ascending, each with the shares that it was chosen for; the given ones and
        the default threshold are always among them.
    """
    chosen: dict[float, list[float]] = {threshold: [] for threshold in (_DEFAULT_THRESHOLD, *given)}
    for least in shares:
        good = [threshold for threshold, (share, _) in tried.items() if share >= least]
        if good:
            chosen.setdefault(min(good), []).append(least)
    return dict(sorted(chosen.items()))


def heat_map(made: PromptSet, scores: Scores) -> dict[str, list[float]]:
    """Give the share of SPARSE by task and layer."""
    tasks = np.array([prompt.task for prompt in made.prompts])
    return {
        str(task): [round(float(share), 3) for share in scores.sparse[tasks == task].mean(axis=0)]
        for task in dict.fromkeys(tasks.tolist())
    }


def evaluate(config: EvalConfig) -> dict[str, Any]:
    """Evaluate as a config says, and write `quality.json` and plots.

    Returns: the contents of `quality.json`.
    """
    world = start_world(config.system.device)
    Path(config.out).mkdir(parents=True, exist_ok=True)
    report = Evaluation(config, world).run()
    if world.is_main:
        plot_report(Path(config.out), report)
    world.wait()
    return report
