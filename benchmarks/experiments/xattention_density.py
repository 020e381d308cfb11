"""How dense XAttention is on real text: the attended share of query-key pairs, by layer.

    python -m benchmarks.experiments.xattention_density --model M --out OUT.json \\
        --thresholds 0.9 0.95 --tokens 2100 7600 -- FILE [FILE ...]

Every layer is SPARSE under XAttention, the text is prefilled in one chunk, and of the pairs of a
query and a key up to it those count that a query attends to, over all query heads. Runs on a CPU
too: 8,000 tokens of the sample model take some minutes.
"""

import argparse
import statistics
from pathlib import Path

import torch

from benchmarks.row_file import RowFile, say
from flux_vllm.patterns import xattention
from flux_vllm.router.route import Route
from training.attach import RoutedModel
from training.config import SystemSettings
from training.distributed import start_world
from training.model_loading import load_routed, load_tokenizer
from training.pattern_attention import (
    ChunkEnds,
    PatternAttention,
    PromptAttention,
    make_pattern_attention,
)

SINK_TOKENS, WINDOW_TOKENS = 64, 512  # of decode; they do not enter a prompt's attention


class _ByLayer:
    """Keeps each layer's density."""

    def __init__(self, attend: PatternAttention) -> None:
        self._attend = attend
        self.density: list[float] = []

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, ends: ChunkEnds
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, density = self._attend(q, k, v, scale, ends)
        self.density.append(float(density[0]))
        return out, density


def main() -> None:
    """Measure every text, length and threshold."""
    args = _parse()
    world = start_world("auto")
    tokenizer = load_tokenizer(str(args.model))
    routed = load_routed(str(args.model), SINK_TOKENS, WINDOW_TOKENS, SystemSettings(), world)
    rows = RowFile(args.out)
    for file in args.files:
        ids = tokenizer(file.read_text(encoding="utf-8"))["input_ids"]
        for tokens in args.tokens:
            if tokens > len(ids):
                say(f"{file}: {len(ids)} tokens, {tokens} were asked for; left out")
                continue
            for threshold in args.thresholds:
                density = measure(routed, ids[:tokens], threshold)
                row = {
                    "metric": "density",
                    "text": file.name,
                    "tokens": tokens,
                    "threshold": threshold,
                    "density": statistics.mean(density),
                    "by_layer": density,
                }
                low, high = min(density), max(density)
                line = f"{file.name}, {tokens} tokens, threshold {threshold}: "
                line += f"{row['density']:.3f} [{low:.3f}, {high:.3f}]"
                rows.keep((file.name, tokens, threshold), row, line)


def measure(routed: RoutedModel, token_ids: list[int], threshold: float) -> list[float]:
    """Prefill a text with every layer SPARSE.

    Returns: the density of each layer.
    """
    pattern = xattention.Pattern(
        sink_tokens=SINK_TOKENS, window_tokens=WINDOW_TOKENS, threshold=threshold
    )
    attend = make_pattern_attention(pattern, routed.sparse_attention, routed.sparse_kernel)
    by_layer, ends = _ByLayer(attend), [[len(token_ids)]]
    device = routed.device
    with torch.inference_mode():
        routed.forward(
            torch.tensor([token_ids], device=device),
            torch.full((routed.num_layers, 1), float(Route.SPARSE), device=device),
            sparse=PromptAttention(by_layer, ends, device),
        )
    return by_layer.density


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of a Llama, Qwen2, Qwen3 or Mistral")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--tokens", type=int, nargs="+", default=[2048, 7600], help="prompt lengths, tokens")
    add("--thresholds", type=float, nargs="+", default=[0.9, 0.95])
    add("files", type=Path, nargs="+", help="texts, after `--`; each is cut to every length")
    return parser.parse_args()


if __name__ == "__main__":
    main()
