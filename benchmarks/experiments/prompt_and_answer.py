"""What SPARSE layers lose in the prompt, and what in the answer. On a CPU, without a server.

    python -m benchmarks.experiments.prompt_and_answer --model MODEL --prompts answers.jsonl \
        --sparse-layers 0 1 2 --out OUT.json

Prompts come with the model's own answers under full attention (`python -m training answers`). Each
is computed once in full, then with some layers SPARSE in the prompt and in the answer, in the
prompt alone, or in all layers of the prompt; the divergence is taken over the answer's tokens.
"""

import argparse
import dataclasses
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from benchmarks.row_file import RowFile
from training import recipes
from training.attach import INTERFACE_NAME, RoutedModel
from training.data.batching import MicroBatch, collate
from training.data.prompt_files import encode_prompt, read_prompt_files
from training.distributed import start_world
from training.losses import distillation
from training.model_loading import load_routed, load_tokenizer

_TAIL = 128
"""The prompt's last queries, which see everything."""
_ALL = 2**30


def main() -> None:
    """Measure prompts one by one, and write a row for each."""
    args = _parse()
    config, world = recipes.budget(args.model, ""), start_world("cpu")
    system = dataclasses.replace(config.system, compile_layers=False, device="cpu")
    routed = load_routed(args.model, args.sink_tokens, args.window_tokens, system, world)
    tokenizer, file = load_tokenizer(args.model), RowFile(args.out)
    prompts = list(read_prompt_files([args.prompts]))
    random.Random(args.seed).shuffle(prompts)
    measured = 0
    for number, row in enumerate(prompts):
        encoded = encode_prompt(row, tokenizer, args.tokens[1] + args.answer, args.answer)
        if not args.tokens[0] < encoded.prompt_len < args.tokens[1]:
            continue
        inputs = config.router.inputs(routed.num_layers)
        micro = collate([encoded], [0], inputs, args.answer)
        found = _measure(routed, micro, encoded.prompt_len, set(args.sparse_layers))
        described = {"prompt_tokens": encoded.prompt_len, "window": args.window_tokens}
        file.keep(number, described | {"nats": found}, f"{encoded.prompt_len} tokens: {found}")
        measured += 1
        if measured == args.count:
            return


@torch.no_grad()
def _measure(
    routed: RoutedModel, micro: MicroBatch, prompt_len: int, sparse: set[int]
) -> dict[str, float]:
    """Give the mean divergence over an answer's tokens, nats, of each way to be SPARSE."""
    layers, at = range(routed.num_layers), (micro.answer_rows, micro.answer_positions)
    full = routed.logits(routed.forward(micro.token_ids, torch.ones(len(layers), 1))[at])
    position = torch.arange(micro.token_ids.shape[1])[None]

    def dense(first: int, by_layer: bool = False) -> list[torch.Tensor]:
        """Say which queries see everything: of the answer the first; or all, of FULL layers."""
        last = [_ALL if by_layer and layer not in sparse else first for layer in layers]
        return [(position >= prompt_len - _TAIL) & (position < prompt_len + n) for n in last]

    some = torch.tensor([[0.0 if layer in sparse else 1.0] for layer in layers])
    every = torch.zeros(len(layers), 1)
    found = {}
    for name, routes, shown in (
        ("SPARSE", some, dense(0)),
        ("SPARSE, full decode 32", some, dense(32)),
        ("SPARSE, full decode", some, dense(_ALL)),
        ("sparse_prefill", every, dense(0, by_layer=True)),
        ("sparse_prefill, full decode 32", every, dense(32, by_layer=True)),
        ("all SPARSE", every, dense(0)),
        ("all SPARSE, full decode", every, dense(_ALL)),
    ):
        with _dense_by_layer(routed, shown):
            hidden = routed.forward(micro.token_ids, routes, shown[0])[at]
        found[name] = round(float(distillation(routed.logits(hidden), full).mean()), 5)
    return found


@contextmanager
def _dense_by_layer(routed: RoutedModel, dense: list[torch.Tensor]) -> Iterator[None]:
    """Let the queries [B, T] that see everything differ by layer, of which training has one set."""
    original = ALL_ATTENTION_FUNCTIONS[INTERFACE_NAME]

    def attend(module: Any, *args: Any, **kwargs: Any) -> Any:
        if module.flux_layer.place is not None and routed.step is not None:
            routed.step.is_tail = dense[module.flux_layer.place]
        return original(module, *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register(INTERFACE_NAME, attend)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(INTERFACE_NAME, original)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", required=True, help="folder with weights and tokenizer")
    add("--prompts", type=Path, required=True, help="JSON Lines with answers")
    add("--out", type=Path, required=True, help="JSON file for the rows")
    add("--sparse-layers", type=int, nargs="+", required=True)
    add("--tokens", type=int, nargs=2, default=(2600, 4200), help="shortest and longest prompt")
    add("--answer", type=int, default=96, help="most tokens of an answer (default 96)")
    add("--count", type=int, default=8, help="prompts (default 8)")
    add("--seed", type=int, default=0)
    add("--sink-tokens", type=int, default=128)
    add("--window-tokens", type=int, default=2048)
    return parser.parse_args()


if __name__ == "__main__":
    main()
