"""Compare what a server scored with what is scored offline, and put quality beside speed.

Rows as `serve_quality` keeps them; P prompts, in the order of their file.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from training.data.encoding import Encoded
from training.evaluation.scoring import group_of, metric_of
from training.evaluation.statistics import JUDGED_GROUPS, Cells, interval

Row = dict[str, Any]


def score(prompt: Encoded, chosen: Sequence[int]) -> float:
    """Score one answer by its task's metric, as offline scoring does.

    Args:
        prompt: with the right answer.
        chosen: tokens the server found most likely where the answer's tokens belong.

    Returns: `exact`: 1 or 0; `tokens`: share of right tokens.
    Raises: ValueError: not as many tokens as the answer has.
    """
    answer = answer_tokens(prompt)
    if len(chosen) != len(answer):
        raise ValueError(
            f"expected {len(answer)} tokens of an answer, found {len(chosen)}; the server cut it"
        )
    right = np.equal(chosen, answer)
    return float(right.all() if metric_of(prompt.task) == "exact" else right.mean())


def prefix_tokens(prompt: Encoded) -> list[int]:
    """Return the answer's prefix, which is forced."""
    tokens: list[int] = prompt.token_ids[prompt.prompt_len :][: prompt.prefix_len].tolist()
    return tokens


def answer_tokens(prompt: Encoded) -> list[int]:
    """Return what is scored."""
    tokens: list[int] = prompt.token_ids[prompt.prompt_len + prompt.prefix_len :].tolist()
    return tokens


def tokens_to_force(prompt: Encoded) -> list[int]:
    """Return what the server has to decode: the prefix, and for `tokens` the answer as well.

    An exact match is greedy decoding's own; a share of right tokens is one after right ones.
    """
    exact = metric_of(prompt.task) == "exact"
    return prefix_tokens(prompt) + ([] if exact else answer_tokens(prompt))


def route_letters(sparse: np.ndarray) -> list[str]:
    """Write routes as the request view does.

    Args:
        sparse: [P, L], 1 where a layer's route is SPARSE.

    Returns: P strings of L letters.
    """
    return ["".join("FS"[int(layer)] for layer in row) for row in sparse]


def sparse_share(routes: Sequence[str]) -> np.ndarray:
    """Return each prompt's share of SPARSE layers, [P]."""
    return np.array([letters.count("S") / len(letters) for letters in routes])


def agreement(prompts: Sequence[Encoded], cells: Cells, server: Row, offline: Row) -> list[Row]:
    """Compare a server's scores with those offline, by group and for the judged groups together.

    Args:
        prompts: P of them.
        cells: of the prompts.
        server: `score` [P]; `routes`, P strings or None.
        offline: of the same.

    Returns: a row for each group and for `overall`.
    """
    ours, theirs = np.array(server["score"]), np.array(offline["score"])
    exact = np.array([metric_of(prompt.task) == "exact" for prompt in prompts])
    found = []
    for group, members in _groups(prompts, cells).items():
        values = {"offline": theirs, "server": ours}
        statistic = cells.overall if group == "overall" else lambda v, g=group: cells.by_group(v)[g]
        row: Row = {
            "group": group,
            "prompts": len(members),
            "offline": statistic(theirs),
            "server": statistic(ours),
            "difference": statistic(ours) - statistic(theirs),
            "interval": interval(cells, values, group)["server-offline"],
            "exact": int(exact[members].sum()),
            "exact_alike": int((exact & (ours == theirs))[members].sum()),
        }
        if server["routes"]:
            equal = np.array(
                [
                    np.equal(list(one), list(other)).mean()
                    for one, other in zip(server["routes"], offline["routes"], strict=True)
                ]
            )
            row["layers_alike"] = float(equal[members].mean())
            row["routes_alike"] = float((equal[members] == 1).mean())
            row["share"] = statistic(sparse_share(server["routes"]))
        found.append(row)
    return found


def _groups(prompts: Sequence[Encoded], cells: Cells) -> dict[str, np.ndarray]:
    """Give the rows of each group, and of the judged ones together."""
    of = np.array([group_of(prompt.task) for prompt in prompts])
    found = {str(name): np.flatnonzero(of == name) for name in dict.fromkeys(of.tolist())}
    judged = [found[name] for name in JUDGED_GROUPS if name in found] or list(found.values())
    return found | {"overall": np.concatenate(judged)}


def differing(prompts: Sequence[Encoded], server: Row, offline: Row) -> list[str]:
    """Name the exact-match prompts that server and offline scoring judge differently."""
    return [
        f"prompt {at} ({prompt.task}): offline {offline['score'][at]:.0f}, server "
        f"{server['score'][at]:.0f}, which answered {server['answer'][at]!r}"
        for at, prompt in enumerate(prompts)
        if metric_of(prompt.task) == "exact" and offline["score"][at] != server["score"][at]
    ]


def spread(values: Sequence[float]) -> Row:
    """Give median, 10th and 90th percentile."""
    low, median, high = np.percentile(values, [10, 50, 90])
    return {"median": float(median), "low": float(low), "high": float(high)}


def agreement_table(name: str, rows: Sequence[Row]) -> str:
    """Write what `agreement` found as Markdown."""
    lines = [
        f"{name}: server against offline scoring of the same prompts",
        "",
        (
            "| group | prompts | offline | server | difference [95%] | exact answers judged alike"
            " | routes alike: layers / requests | SPARSE |"
        ),
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        low, high = row["interval"]
        routes = share = "-"
        if "share" in row:
            routes = f"{row['layers_alike']:.2%} / {row['routes_alike']:.1%}"
            share = f"{row['share']:.3f}"
        lines.append(
            f"| {row['group']} | {row['prompts']} | {row['offline']:.3f} | {row['server']:.3f} "
            f"| {row['difference']:+.3f} [{low:+.3f}, {high:+.3f}] "
            f"| {row['exact_alike']} of {row['exact']} | {routes} | {share} |"
        )
    return "\n".join(lines)


def quality_and_speed_table(
    prompts: Sequence[Encoded], lengths: Sequence[int], servers: dict[str, dict[str, Row]]
) -> str:
    """Write quality and speed at the greatest length, one line a server, as Markdown.

    Args:
        prompts: P of them.
        lengths: length bucket of each.
        servers: by name, rows by measure: `quality`, and `speed at N` requests at a time.
    """
    longest = [at for at, length in enumerate(lengths) if length == max(lengths)]
    cells = Cells([prompts[at].task for at in longest], [max(lengths)] * len(longest))
    groups = sorted(_groups([prompts[at] for at in longest], cells))
    speeds = sorted(
        {name for rows in servers.values() for name in rows if name.startswith("speed")},
        key=lambda name: int(name.split()[-1]),
    )
    heads = [f"score: {group}" for group in groups] + ["SPARSE"]
    for name in speeds:
        heads += [f"TTFT {name[6:]}, ms", f"ms a token {name[6:]}", f"bursts {name[6:]}"]
    lines = [
        (
            f"At {max(lengths)} tokens, {len(longest)} prompts; times with so many requests in "
            "flight, median (10th to 90th percentile); bursts: answers whose tokens came at once"
        ),
        "",
        f"| server | {' | '.join(heads)} |",
        "|---" * (len(heads) + 1) + "|",
    ]
    for server, rows in servers.items():
        fields = [server]
        quality = rows["quality"]
        scores = np.array(quality["score"])[longest]
        by_group = cells.by_group(scores) | {"overall": cells.overall(scores)}
        fields += [f"{by_group[group]:.3f}" for group in groups]
        routes = quality["routes"]
        share = sparse_share([routes[at] for at in longest]) if routes else None
        fields.append("-" if share is None else f"{cells.overall(share):.3f}")
        for name in speeds:
            times = rows.get(name, {})
            fields += [_times(times.get("ttft_ms")), _times(times.get("token_ms"))]
            bursts = times.get("bursts")
            fields.append("-" if bursts is None else f"{sum(bursts)} of {len(bursts)}")
        lines.append(f"| {' | '.join(fields)} |")
    return "\n".join(lines)


def cached_table(prompts: Sequence[Encoded], cells: Cells, alone: Row, after: Row) -> str:
    """Write as Markdown what a context cached by a local question costs a retrieval question."""
    values = {"alone": np.array(alone["score"]), "after": np.array(after["score"])}
    low, high = interval(cells, values, "overall")["after-alone"]
    means = {name: cells.overall(value) for name, value in values.items()}
    return "\n".join(
        [
            "Retrieval questions on a document, alone and after a local question on it",
            "",
            "| prompts | alone | after | difference [95%] | prompt tokens from the cache |",
            "|---|---|---|---|---|",
            (
                f"| {len(prompts)} | {means['alone']:.3f} | {means['after']:.3f} "
                f"| {means['after'] - means['alone']:+.3f} [{low:+.3f}, {high:+.3f}] "
                f"| {after['cached_share']:.1%} |"
            ),
        ]
    )


def _times(found: Row | None) -> str:
    if found is None:
        return "-"
    return f"{found['median']:.1f} ({found['low']:.1f} to {found['high']:.1f})"
