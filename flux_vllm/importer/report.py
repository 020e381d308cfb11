"""What an import kept, dropped and assumed, for the terminal and for `flux_import.json`."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from flux_vllm.importer.config import (
    XATTENTION,
    ModelShape,
    RouterSettings,
    unknown_fields,
)
from flux_vllm.importer.source import StoredTensor
from flux_vllm.importer.tensors import TIED_HEAD, SortedTensors

_DTYPE_NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ImportReport:
    """The report of one import; every entry is one statement."""

    made_by: str
    checkpoint: str
    kept: list[str]
    dropped: list[str]
    assumed: list[str]
    warnings: list[str]
    authors_fields: dict[str, object]
    """The router's fields of config.json as found, or the authors' defaults."""

    def to_json(self) -> dict[str, Any]:
        """Return it as an object for JSON."""
        return asdict(self)

    def render(self) -> str:
        """Draw it as text, warnings last so that they are seen."""
        lines: list[str] = []
        for title, entries in (
            ("kept", self.kept),
            ("dropped", self.dropped),
            ("assumed", self.assumed),
            ("WARNING", self.warnings),
        ):
            if entries:
                lines += [title, *(f"  - {entry}" for entry in entries)]
        return "\n".join(lines)


def make_report(
    *,
    made_by: str,
    checkpoint: str,
    config: Mapping[str, Any],
    shape: ModelShape,
    settings: RouterSettings,
    tensors: SortedTensors,
    dropped_fields: list[str],
    copied_files: list[str],
    left_files: list[str],
) -> ImportReport:
    """Say what becomes of every tensor, field and file of a checkpoint."""
    size = sum(weight.nbytes for weight in tensors.model.values()) / 1e9
    looks = f"looks at the prompt's first and last {settings.pool_tokens} tokens"
    sparse = f"the first {settings.sink_tokens} and the latest {settings.window_tokens} tokens"
    kept = [
        f"{len(tensors.model)} weights, {size:.2f} GB in {_dtypes(tensors.model)}",
        f"the router, {shape.num_layers} layers in {_dtypes(tensors.router)}: {looks}",
        f"SPARSE means {settings.sparse_pattern} in prompts, {sparse} in decode",
    ]
    if copied_files:
        kept.append(f"files: {', '.join(copied_files)}")
    dropped = [f"{_counted(names)}: {why}" for why, names in sorted(tensors.dropped.items())]
    if tensors.tied_head is not None:
        dropped.append(f"{TIED_HEAD}: equals the embeddings that config.json ties it to")
    if dropped_fields:
        dropped.append(f"fields of config.json: {', '.join(sorted(dropped_fields))}")
    if left_files:
        dropped.append(f"files: {', '.join(left_files)}")
    return ImportReport(
        made_by=made_by,
        checkpoint=checkpoint,
        kept=kept,
        dropped=dropped,
        assumed=_assumed(config, settings, tensors),
        warnings=_warnings(config, copied_files),
        authors_fields=dict(settings.fields),
    )


def _warnings(config: Mapping[str, Any], copied_files: list[str]) -> list[str]:
    found = []
    unknown = unknown_fields(config)
    if unknown:
        found.append(
            f"config.json has fields that are not known here: {', '.join(unknown)}; they stay as "
            "they are; if one is of the router, its routes may not be the authors'"
        )
    if not any(name.startswith("tokenizer") or name == "vocab.json" for name in copied_files):
        found.append("the checkpoint holds no tokenizer: put its base model's into the folder")
    return found


def _assumed(
    config: Mapping[str, Any], settings: RouterSettings, tensors: SortedTensors
) -> list[str]:
    fields = settings.fields
    found = [
        f"pool_size {fields['pool_size']} is the number of tokens pooled at each end of the prompt",
        _assumed_of_pattern(settings),
    ]
    if settings.by_default:
        given = ", ".join(f"{name} {fields[name]!r}" for name in settings.by_default)
        found.append(f"config.json lacks fields, which take the authors' defaults: {given}")
    sizes = (settings.sink_tokens, settings.window_tokens)
    if sizes != (fields["sink_size"], fields["local_window_size"]):
        found.append(
            f"sink_size {fields['sink_size']} and local_window_size {fields['local_window_size']} "
            f"round up to {sizes[0]} and {sizes[1]}, whole blocks of 128 as the authors' code takes"
        )
    if not settings.use_softmax:
        found.append(
            "use_softmax false: P(FULL) is the sigmoid of the router's one logit, without the "
            "noise that the authors' inference code adds to it"
        )
    said = config.get("dtype") or config.get("torch_dtype")
    stored = {weight.dtype for weight in tensors.model.values()}
    if isinstance(said, str) and stored != {_DTYPE_NAMES.get(said)}:
        found.append(
            f"config.json says dtype {said}, the weights are stored in {_dtypes(tensors.model)}: "
            "both stay, vLLM's --dtype chooses"
        )
    return found


def _assumed_of_pattern(settings: RouterSettings) -> str:
    if settings.sparse_pattern == "xattention":
        return (
            f"xattention: threshold {XATTENTION['xattn_threshold']}, stride "
            f"{XATTENTION['xattn_stride']}, norm {XATTENTION['xattn_norm']}; sink and window do "
            "not enter in prompts"
        )
    tail = (
        f"the prompt's last {settings.fields['triangle_n_last']} queries attend to everything, "
        "before them "
        if settings.sparse_pattern == "triangle"
        else ""
    )
    return (
        f"{settings.sparse_pattern}: {tail}sink and window are counted in tokens; the authors' "
        "kernel attends to whole blocks of 128"
    )


def _dtypes(tensors: Mapping[str, StoredTensor]) -> str:
    return " and ".join(sorted({tensor.dtype for tensor in tensors.values()}))


def _counted(names: list[str]) -> str:
    others = len(names) - 1
    return f"{min(names)} and {others} more" if others else names[0]
