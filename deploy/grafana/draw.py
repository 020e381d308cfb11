"""Draws what the dashboard's queries answer: `python -m deploy.grafana.draw` makes docs/images.

A real server with the sample model answers prompts of two kinds, a real Prometheus scrapes it, and
matplotlib draws the answers. No picture of Grafana itself: that is in no package registry here.
"""

import json
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import httpx
import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

import flux_vllm
from demo.server import Server, leave_on_signals
from deploy.grafana.dashboard import FILE
from tests.helpers.prometheus import Prometheus

REPOSITORY = Path(__file__).resolve().parents[2]
MODEL = REPOSITORY / "models" / "SmolLM2-135M-Instruct"
ROUTER = Path(flux_vllm.__file__).parent / "data" / "smollm2-135m-instruct"
IMAGES = REPOSITORY / "docs" / "images"
SECONDS = 240
STEP = 5
WINDOW = "20s"


def prompt(kind: str) -> str:
    """Write a prompt of a chapter of Python's manual and a question of a kind."""
    name = random.choice([name for name, text in topics.items() if 4_000 < len(text) < 9_000])
    text = topics[name]
    if kind == "retrieval":
        at = text.index("\n", len(text) // 3)
        text = f"{text[:at]}\nThe secret code is {random.randrange(10**5)}.\n{text[at:]}"
        return f"{text}\n\nWhat is the secret code?"
    return f"{text}\n\nRepeat the last words of the text."


def send(url: str, begin: float) -> None:
    """Ask for `SECONDS`: the last words at first, then a code far back, then both in turn."""
    number = 0
    with httpx.Client(timeout=300) as client:
        while (passed := time.time() - begin) < SECONDS:
            number += 1
            third = int(3 * passed / SECONDS)
            kind = ("local", "retrieval", ("local", "retrieval")[number % 2])[third]
            body = {"model": "sample", "max_tokens": 24, "temperature": 0}
            body["messages"] = [{"role": "user", "content": prompt(kind)}]
            client.post(f"{url}/v1/chat/completions", json=body).raise_for_status()


def draw_lines(axes: Axes, series: list) -> None:
    """Draw a line a series."""
    for labels, points in series:
        times, values = zip(*points, strict=True)
        axes.plot(times, values, label=" ".join(labels.values()) or None)
    if any(labels for labels, _ in series):
        axes.legend(frameon=False)


def draw_rows(axes: Axes, series: list) -> None:
    """Draw a heat map with a row a series, in the order of their label."""
    times = sorted({time for _, points in series for time, _ in points})
    rows = sorted(series, key=lambda entry: float(next(iter(entry[0].values()))))
    cells = np.full((len(rows), len(times)), np.nan)
    for row, (_, points) in enumerate(rows):
        for at, value in points:
            cells[row, times.index(at)] = value
    if "le" in rows[0][0]:
        cells = np.diff(cells, axis=0, prepend=0)
    mesh = axes.pcolormesh(times, range(len(rows)), cells, shading="nearest")
    labels = [next(iter(labels.values())) for labels, _ in rows]
    every = 1 + len(rows) // 12
    axes.set_yticks(range(0, len(rows), every), labels[::every])
    plt.colorbar(mesh, ax=axes, pad=0.01)


def draw(prometheus: Prometheus, begin: float, name: str, titles: dict[str, Callable]) -> None:
    """Draw panels of the dashboard, by title, one below the other."""
    panels = {panel["title"]: panel for panel in json.loads(FILE.read_text())["panels"]}
    figure, rows = plt.subplots(
        len(titles), figsize=(8, 2.4 * len(titles)), squeeze=False, layout="constrained"
    )
    for axes, (title, drawer) in zip(rows[:, 0], titles.items(), strict=True):
        series = []
        for target in panels[title]["targets"]:
            query = target["expr"].replace("$model", ".+").replace("$instance", ".+")
            query = query.replace("$__rate_interval", WINDOW)
            found = prometheus.query_range(query, begin, time.time(), STEP)
            named = {"series": target["legendFormat"]}
            plain = "{{" not in target["legendFormat"]
            series += [
                (
                    named if plain else {k: v for k, v in labels.items() if k != "instance"},
                    [(at - begin, value) for at, value in points if np.isfinite(value)],
                )
                for labels, points in found
            ]
        drawer(axes, [entry for entry in series if entry[1]])
        unit = panels[title].get("fieldConfig", {}).get("defaults", {}).get("unit")
        axes.set_title(f"{title}, in s" if unit == "s" else title, loc="left", fontsize=10)
        axes.set_xlim(0, SECONDS)
    rows[-1, 0].set_xlabel("s: 'repeat the last words', then 'what is the code', then both")
    figure.savefig(IMAGES / f"dashboard_{name}.png", dpi=80)


def main() -> None:
    """Serve, ask, scrape, draw."""
    leave_on_signals()
    mpl.use("Agg")
    random.seed(7)
    flux = json.dumps({"flux": {"router": str(ROUTER)}})
    arguments = [
        *(str(MODEL), "--attention-backend", "flux", "--additional-config", flux),
        *("--enforce-eager", "--served-model-name", "sample", "--max-model-len", "4096"),
        *("--kv-cache-memory-bytes", str(512 << 20), "--max-num-batched-tokens", "4096"),
    ]
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        server = Server(arguments, Path(folder) / "log")
        with server, Prometheus(Path(folder) / "prometheus", [server.url]) as prometheus:
            begin = time.time()
            send(server.url, begin)
            share, saved = "Share of SPARSE route decisions", "KV reading saved"
            saved += ", of what full attention reads"
            layers = "Share of SPARSE, by layer"
            requests = "Requests by their share of SPARSE layers"
            draw(prometheus, begin, "routes", {share: draw_lines, layers: draw_rows})
            draw(prometheus, begin, "requests", {requests: draw_rows, saved: draw_lines})
            server_panels = ("Time to first token", "Tokens a second", "KV cache in use")
            draw(prometheus, begin, "server", dict.fromkeys(server_panels, draw_lines))


if __name__ == "__main__":
    main()
