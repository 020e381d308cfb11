"""Answer task families through one engine for all the variants that share it, and keep results."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from benchmarks.real_tasks.agreement import Teacher, compare
from benchmarks.real_tasks.engine import Answer, Request, RequestRoutes, ServedEngine
from benchmarks.real_tasks.samples import Asked, Encoder, digest
from benchmarks.real_tasks.speed import SpeedCases, time_engine
from benchmarks.real_tasks.store import ResultFolder, Row
from benchmarks.real_tasks.tasks import COMPARED
from benchmarks.real_tasks.variants import BASELINES, EngineOptions, Variant, flux_config
from benchmarks.row_file import say

SPEED: Final = "speed"
"""The measure beside the families."""
_ROUTES_OF: Final = 8
"""Timed prompts, of each case, whose routes are told."""
_ROUNDED: Final = 0.0011
"""P(FULL) comes with three digits: so near the threshold it does not say what was decided."""


@dataclass(frozen=True, slots=True)
class Family:
    """A family's prompts in the model's tokens."""

    name: str
    asked: list[Asked]
    digest: str

    @classmethod
    def of(cls, name: str, asked: list[Asked]) -> "Family":
        """Name what tells these prompts from others."""
        return cls(name, asked, digest(asked))

    @property
    def is_compared(self) -> bool:
        """Whether agreement with full attention is measured."""
        return self.name in COMPARED


def settings_of(options: EngineOptions, variant: Variant, prompts: str) -> Row:
    """Return what a result depends on, beside the code."""
    settings: Row = {
        "model": options.model.name,
        "dtype": options.dtype,
        "max_model_len": options.max_model_len,
        "chunk": options.chunk,
        "prompts": prompts,
    }
    if variant.policy not in BASELINES:
        config = flux_config(options, [variant])
        own = {"policy": variant.policy, "sparse_layers": list(variant.layers or ())}
        settings["flux"] = config | own | {"threshold": variant.threshold}
    return settings


class Answering:
    """Asks one engine, variant by variant, what has no result yet.

    Args:
        options: of the engine.
        variants: that share it.
        num_layers: of the model.
        results: where results are kept.
        in_time: whether another measure may begin.
    """

    def __init__(
        self,
        options: EngineOptions,
        variants: Sequence[Variant],
        num_layers: int,
        results: ResultFolder,
        in_time: Callable[[], bool],
    ) -> None:
        self._options = options
        self._variants = variants
        self._num_layers = num_layers
        self._results = results
        self._in_time = in_time

    def is_anything_missing(
        self, families: Sequence[Family], compared: Sequence[Family], speeds: SpeedCases | None
    ) -> bool:
        """Say whether there is a need for the engine at all."""
        wanted = [(family.name, family.digest) for family in families]
        wanted += [(_agreement_with(family), family.digest) for family in compared]
        wanted += [] if speeds is None else [(SPEED, str(speeds))]
        return any(
            not self._results.has(
                variant.label, measure, settings_of(self._options, variant, prompts)
            )
            for variant in self._variants
            for measure, prompts in wanted
        )

    def answer(self, engine: ServedEngine, families: Sequence[Family]) -> None:
        """Let every variant answer every family freely, greedily."""
        for variant in self._variants:
            for family in families:
                settings = settings_of(self._options, variant, family.digest)
                if not self._is_wanted(variant, family.name, settings):
                    continue
                is_teacher = variant.policy in BASELINES and family.is_compared
                answers = self._ask(
                    engine,
                    variant,
                    [
                        Request(
                            token_ids=one.token_ids,
                            max_tokens=one.sample.max_new_tokens,
                            min_tokens=one.sample.min_new_tokens,
                            with_logprobs=is_teacher,
                        )
                        for one in family.asked
                    ],
                    family.name,
                )
                routes = self._routes(engine, variant, answers)
                if is_teacher:
                    teacher = Teacher.of(family.digest, answers)
                    teacher.write(teacher_file(self._results.path / variant.label, family.name))
                rows = [
                    _answer_row(*each) for each in zip(family.asked, answers, routes, strict=True)
                ]
                self._keep(variant, family.name, settings, rows)

    def agree(
        self,
        engine: ServedEngine,
        families: Sequence[Family],
        teacher_folder: Path,
        wait_seconds: float,
    ) -> None:
        """Force full attention's answers on every variant, and compare what each would say.

        vLLM's own backend is compared with its own answers too: what rounding alone changes, when
        other requests share its steps.

        Raises: RuntimeError: the teacher's answers do not come in time.
        """
        for family in families:
            measure = _agreement_with(family)
            for variant in self._variants:
                settings = settings_of(self._options, variant, family.digest)
                if not self._is_wanted(variant, measure, settings):
                    continue
                teacher = _wait_for(teacher_file(teacher_folder, family.name), family.digest,
                                    wait_seconds)  # fmt: skip
                rows = self._compare(engine, variant, family, teacher)
                self._keep(variant, measure, settings, rows)

    def _compare(
        self, engine: ServedEngine, variant: Variant, family: Family, teacher: Teacher
    ) -> list[Row]:
        requests = [
            Request(
                token_ids=one.token_ids,
                max_tokens=len(forced),
                forced=tuple(forced),
                with_logprobs=True,
            )
            for one, forced in zip(family.asked, teacher.answers, strict=True)
        ]
        answers = self._ask(engine, variant, requests, _agreement_with(family))
        routes = self._routes(engine, variant, answers)
        rows = []
        for one, full, answer, decided in zip(
            family.asked, teacher.top_logprobs, answers, routes, strict=True
        ):
            row = _row_head(one, decided)
            rows.append(row | dataclasses.asdict(compare(full, answer.top_logprobs)))
        return rows

    def measure_speed(self, engine: ServedEngine, cases: SpeedCases, encoder: Encoder) -> None:
        """Time every variant."""
        for variant in self._variants:
            settings = settings_of(self._options, variant, str(cases))
            if self._is_wanted(variant, SPEED, settings):
                self._switch_to(engine, variant)
                rows = time_engine(
                    engine, encoder, cases, variant.label, partial(self._share_of, engine, variant)
                )
                self._keep(variant, SPEED, settings, rows)

    def _share_of(
        self, engine: ServedEngine, variant: Variant, prompts: Sequence[list[int]]
    ) -> float | None:
        """Ask a few of these once more for their routes, which no neighbour changes."""
        if variant.policy in BASELINES:
            return None
        requests = [Request(token_ids=prompt, max_tokens=1) for prompt in prompts[:_ROUTES_OF]]
        answers = self._ask(engine, variant, requests, "timed prompts' routes")
        shares = [one.sparse_share for one in self._routes(engine, variant, answers) if one]
        return round(fmean(shares), 6) if shares else None

    def _is_wanted(self, variant: Variant, measure: str, settings: Row) -> bool:
        if self._results.has(variant.label, measure, settings):
            return False
        if not self._in_time():
            say(f"no time is left for {variant.label}, {measure}")
            return False
        return True

    def _keep(self, variant: Variant, measure: str, settings: Row, rows: list[Row]) -> None:
        about = dataclasses.asdict(variant)
        self._results.write(variant.label, measure, settings, about, rows)
        say(f"{variant.label}, {measure}: {_summary(rows)}")

    def _ask(
        self, engine: ServedEngine, variant: Variant, requests: list[Request], title: str
    ) -> list[Answer]:
        self._switch_to(engine, variant)
        return engine.ask(requests, f"{variant.label}, {title}")

    def _switch_to(self, engine: ServedEngine, variant: Variant) -> None:
        if variant.policy == "router":
            engine.call_worker("flux_set_threshold", variant.threshold)
        elif variant.policy not in BASELINES:
            engine.call_worker("flux_fix_routes", variant.sparse_layers(self._num_layers))

    def _routes(
        self, engine: ServedEngine, variant: Variant, answers: Sequence[Answer]
    ) -> list[RequestRoutes | None]:
        if variant.policy in BASELINES:
            return [None] * len(answers)
        found = engine.routes([answer.id for answer in answers], f"{variant.label}, routes")
        for routes in found:
            if routes is not None:
                check_routes(variant, routes, self._num_layers)
        return found


def check_routes(variant: Variant, routes: RequestRoutes, num_layers: int) -> None:
    """Check that a request was routed as its variant says.

    Raises: RuntimeError: it was not.
    """
    if variant.policy == "router":
        assert variant.threshold is not None
        expected = [
            letter
            if probability is None or abs(probability - variant.threshold) < _ROUNDED
            else "FS"[probability < variant.threshold]
            for letter, probability in zip(routes.letters, routes.full_probability, strict=True)
        ]
    else:
        sparse = set(variant.sparse_layers(num_layers))
        expected = ["FS"[layer in sparse] for layer in range(num_layers)]
    wrong = [
        layer
        for layer, (letter, wanted) in enumerate(zip(routes.letters, expected, strict=True))
        if letter not in (wanted, "-")
    ]
    if wrong:
        raise RuntimeError(
            f"{variant.label}: expected the routes {''.join(expected)}, found {routes.letters} "
            f"(layers {wrong} differ); the engine did not switch to this variant"
        )


def _agreement_with(family: Family) -> str:
    return f"{family.name}-agreement"


def teacher_file(folder: Path, family: str) -> Path:
    """Return where vLLM's own backend keeps its answers for others."""
    return folder / f"{family}.teacher.npz"


def _wait_for(path: Path, prompts: str, seconds: float) -> Teacher:
    """Read the teacher's answers once another process has written them."""
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > seconds:
            raise RuntimeError(
                f"expected full attention's answers in {path} within {seconds:.0f} s, found none; "
                "run the variant flash_attn beside this one or before it, or name its folder with "
                "--teacher"
            )
        time.sleep(1)
    return Teacher.read(path, prompts)


def _row_head(one: Asked, routes: RequestRoutes | None) -> Row:
    return {
        "task": one.sample.task,
        "id": one.sample.id,
        "prompt_tokens": len(one.token_ids),
        "cut_tokens": one.cut_tokens,
        "routes": routes.letters if routes else None,
        "sparse_share": round(routes.sparse_share, 6) if routes else None,
    }


def _answer_row(one: Asked, answer: Answer, routes: RequestRoutes | None) -> Row:
    return _row_head(one, routes) | {
        "score": one.sample.score(answer.text),
        "finish_reason": answer.finish_reason,
        "text": answer.text,
        "token_ids": answer.token_ids,
    }


def _summary(rows: Sequence[Row]) -> str:
    parts = [f"{len(rows)} rows"]
    for name in ("score", "equal_tokens", "kl", "sparse_share"):
        values: list[Any] = [row[name] for row in rows if row.get(name) is not None]
        if values:
            parts.append(f"mean {name} {sum(values) / len(values):.4f}")
    return ", ".join(parts)
