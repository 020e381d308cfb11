"""Rows as Markdown tables."""

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def all_tables(rows: Sequence[Row]) -> list[str]:
    """Write, for each model, scores, scores by task, agreement and speed, where they are known."""
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        of_model = [row for row in rows if row["model"] == model]
        found += [f"## {model}", score_table(of_model), task_table(of_model)]
        if any(row["agreement"] for row in of_model):
            found.append(agreement_table(of_model))
        if any(row["beside_static"] for row in of_model):
            found.append(static_table(of_model))
        if any("speed" in row for row in of_model):
            found.append(speed_table(of_model))
    return found


def score_table(rows: Sequence[Row]) -> str:
    """Write each variant's scores, and the interval of its share of full attention's."""
    families = [
        name
        for name in ("longbench", "needles", "gsm8k", "gsm8k_list", "chains")
        if any(row[name] is not None for row in rows)
    ]
    heads = ["variant", "SPARSE"]
    for family in families:
        heads += [family, "of full [95%]"]
    lines = [_line(heads), _rule(heads)]
    for row in rows:
        fields = [row["label"], _share(row["sparse_share"])]
        for family in families:
            fields += _score_fields(row, family)
        lines.append(_line(fields))
    return "\n".join(lines)


def _score_fields(row: Row, family: str) -> list[str]:
    if row[family] is None:
        return ["-", "-"]
    low, high = row["intervals"][family]["ratio"]
    full = row[f"{family}_full"]
    ratio = f"{row[family] / full:.1%}" if full else "-"
    return [f"{row[family]:.3f}", f"{ratio} [{100 * low:.1f}, {100 * high:.1f}]"]


def task_table(rows: Sequence[Row]) -> str:
    """Write each task's score under each variant."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    heads = ["variant", *tasks]
    lines = [_line(heads), _rule(heads)]
    for row in rows:
        scores = [
            f"{row['tasks'][task]['score']:.3f}" if task in row["tasks"] else "-" for task in tasks
        ]
        lines.append(_line([row["label"], *scores]))
    return "\n".join(lines)


def agreement_table(rows: Sequence[Row]) -> str:
    """Write how far each variant's tokens are full attention's own, by family of prompts."""
    families = list(dict.fromkeys(name for row in rows for name in row["agreement"]))
    heads = ["variant"]
    for family in families:
        count = next(r["agreement"][family]["prompts"] for r in rows if family in r["agreement"])
        heads += [f"{family} ({count}): equal tokens [95%]", "same prefix", "KL"]
    lines = [_line(heads), _rule(heads)]
    for row in rows:
        fields = [row["label"]]
        for family in families:
            found = row["agreement"].get(family)
            if found is None:
                fields += ["-"] * 3
                continue
            low, high = found["equal_tokens_interval"]
            fields.append(f"{found['equal_tokens']:.2%} [{100 * low:.2f}, {100 * high:.2f}]")
            fields += [f"{found['same_prefix']:.1%}", f"{found['kl']:.4f}"]
        lines.append(_line(fields))
    return "\n".join(lines)


def static_table(rows: Sequence[Row]) -> str:
    """Write what routers gain over the static pattern of the nearest share, in points."""
    heads = ["variant", "SPARSE", "static pattern", "its SPARSE"]
    heads += ["longbench, points more [95%]", "equal tokens, points more [95%]"]
    lines = [_line(heads), _rule(heads)]
    for row in rows:
        beside = row["beside_static"]
        if beside is None:
            continue
        fields = [row["label"], _share(row["sparse_share"]), beside["label"]]
        fields.append(_share(beside["sparse_share"]))
        fields += [_points(beside.get(name)) for name in ("longbench", "agreement")]
        lines.append(_line(fields))
    return "\n".join(lines)


def _points(found: Row | None) -> str:
    if found is None:
        return "-"
    low, high = found["interval"]
    return f"{100 * found['difference']:+.2f} [{100 * low:+.2f}, {100 * high:+.2f}]"


def speed_table(rows: Sequence[Row]) -> str:
    """Write quality beside speed, and each time as a share of full attention's."""
    timed = [row for row in rows if "speed" in row]
    full = next((row for row in timed if row["policy"].endswith("_attn")), None)
    cases = [(case["prompt_tokens"], case["at_once"]) for case in timed[0]["speed"]]
    heads = ["variant", "SPARSE", "longbench"]
    for tokens, at_once in cases:
        heads += [f"{tokens} x {at_once}: TTFT, ms", "ms a token"]
    lines = [
        "Median times (of full attention's); prompt tokens x requests at once",
        "",
        _line(heads),
        _rule(heads),
    ]
    for row in timed:
        score = "-" if row["longbench"] is None else f"{row['longbench']:.3f}"
        fields = [row["label"], _share(row["sparse_share"]), score]
        for case in cases:
            for name in ("ttft_ms", "token_ms"):
                beside = _median(full, case, name) if full else None
                fields.append(_time(_median(row, case, name), beside))
        lines.append(_line(fields))
    return "\n".join(lines)


def _median(row: Row, case: tuple[int, int], name: str) -> float | None:
    for timed in row["speed"]:
        if (timed["prompt_tokens"], timed["at_once"]) == case:
            median: float = timed[name]["median"]
            return median
    return None


def _time(value: float | None, full: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.2f} ({value / full:.2f})" if full else f"{value:.2f}"


def _share(share: float | None) -> str:
    return "-" if share is None else f"{share:.3f}"


def _line(fields: Sequence[str]) -> str:
    return f"| {' | '.join(fields)} |"


def _rule(heads: Sequence[str]) -> str:
    return "|---" * len(heads) + "|"
