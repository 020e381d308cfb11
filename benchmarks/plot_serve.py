"""Plot what `bench_serve.py` measured: speed-up over FLASH_ATTN by context, with the ideal drawn.

    python -m benchmarks.plot_serve RESULTS.json OUT_PREFIX

writes OUT_PREFIX_ttft.png and OUT_PREFIX_decode.png (one row a request).
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_TITLES = {
    "ttft_s": ("ttft", "Time to first token, one prompt"),
    "tpot_ms": ("decode", "Time per decoded token, one row"),
}


def main() -> None:
    """Plot both metrics."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, help="JSON file of bench_serve.py")
    parser.add_argument("prefix", help="of the files to write")
    args = parser.parse_args()
    rows = json.loads(args.results.read_text())
    for metric, (suffix, title) in _TITLES.items():
        # Of what was measured again, the last.
        chosen = {
            (row["context"], row["sparse_share"]): row
            for row in rows
            if row["metric"] == metric and row["batch"] == 1
        }
        if chosen:
            _plot([*chosen.values()], title, Path(f"{args.prefix}_{suffix}.png"))


def _plot(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    shares = sorted({row["sparse_share"] for row in rows}, reverse=True)
    contexts = sorted({row["context"] for row in rows})
    for index, share in enumerate(shares):
        line = sorted((r for r in rows if r["sparse_share"] == share), key=lambda r: r["context"])
        x = [row["context"] for row in line]
        color = plt.get_cmap("viridis")(index / max(1, len(shares) - 1) * 0.85)
        marker = "o" if len(line) > 1 else "D"
        label = f"{100 * share:.3g}% of layers SPARSE"
        axes.plot(x, [r["speedup"] for r in line], marker=marker, color=color, label=label)
        axes.plot(x, [r.get("bound") for r in line], ls="--", lw=1, marker="_", color=color)
    axes.plot([], [], ls="--", lw=1, color="grey", label="ideal")
    axes.axhline(1, lw=0.8, color="black")
    axes.set_xscale("log", base=2)
    axes.set_xticks(contexts, [f"{n // 1024}K" for n in contexts])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("times as fast as FLASH_ATTN")
    source = rows[0]["provenance"]
    axes.set_title(f"{title} ({source['gpu']}, vLLM {source['versions'].get('vllm', '')})")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    main()
