"""From a published Flux-Attention checkpoint to a folder that vLLM serves, in one atomic step."""

import shutil
import tempfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path

from safetensors import SafetensorError

from flux_vllm import __version__
from flux_vllm.errors import CheckpointImportError
from flux_vllm.importer.config import (
    ModelShape,
    RouterSettings,
    read_settings,
    read_shape,
    standard_config,
)
from flux_vllm.importer.report import ImportReport, make_report
from flux_vllm.importer.source import INDEX, checkpoint_name, read_headers, read_json
from flux_vllm.importer.tensors import SortedTensors, sort_tensors
from flux_vllm.importer.weights import (
    check_tied_head,
    write_imported_router,
    write_json,
    write_weights,
)
from flux_vllm.router.checkpoint import RouterInfo, read_router
from flux_vllm.router.place import beside_weights

REPORT = "flux_import.json"

# Copied beside the weights. Never code: a standard model needs none.
_COPIED = (
    "added_tokens.json",
    "chat_template.*",
    "generation_config.json",
    "LICEN[CS]E*",
    "merges.txt",
    "NOTICE*",
    "special_tokens_map.json",
    "tokenizer*.json",
    "tokenizer*.model",
    "USE_POLICY*",
    "vocab.json",
)
_SPARE_BYTES = 64 << 20  # headers, JSON files, what a file system keeps for itself


def import_checkpoint(
    checkpoint: Path,
    out: Path,
    progress: Callable[[str], None] = lambda text: None,
) -> ImportReport:
    """Write a standard Llama or Qwen3 folder with its router.

    Args:
        checkpoint: folder of a `PawLlamaForCausalLM` or `PawQwen3ForCausalLM`.
        out: folder to make; new or empty.
        progress: called with a line of text at each step.

    Returns: ImportReport: what was kept, dropped and assumed; also in OUT.
    Raises: CheckpointImportError, RouterCheckpointError: whatever cannot be imported; OUT is as it
        was.
    """
    out = out.resolve()
    _check_out(checkpoint, out)
    progress(f"reading the headers of {checkpoint}")
    config = read_json(checkpoint / "config.json")
    shape = read_shape(config)
    settings = read_settings(config)
    tensors = sort_tensors(read_headers(checkpoint), shape, settings.use_softmax)
    check_tied_head(tensors)
    copied, left = _side_files(checkpoint, tensors)
    _check_space(out, tensors, [checkpoint / name for name in copied])
    written_config, dropped_fields = standard_config(config, shape)
    name, made_by = checkpoint_name(checkpoint), f"flux-vllm {__version__} import"
    report = make_report(
        made_by=made_by,
        checkpoint=name,
        config=config,
        shape=shape,
        settings=settings,
        tensors=tensors,
        dropped_fields=dropped_fields,
        copied_files=copied,
        left_files=left,
    )

    def fill(folder: Path) -> None:
        write_weights(tensors.model, folder, progress)
        progress("writing the router")
        info = _router_info(name, shape, settings)
        file = write_imported_router(tensors.router, info, beside_weights(folder))
        read_router(file)  # what the server will do: values that are not finite end the import
        write_json(folder / "config.json", written_config)
        write_json(folder / REPORT, report.to_json())
        for copy in copied:
            shutil.copyfile(checkpoint / copy, folder / copy)

    _make_folder(out, fill)
    progress("done")
    return report


def _router_info(name: str, shape: ModelShape, settings: RouterSettings) -> RouterInfo:
    return RouterInfo(
        base_model=name,
        num_layers=shape.num_layers,
        head_dim=shape.head_dim,
        pool_tokens=settings.pool_tokens,
        sink_tokens=settings.sink_tokens,
        window_tokens=settings.window_tokens,
        sparse_pattern=settings.sparse_pattern,
        provenance={
            "imported_from": name,
            "imported_by": f"flux-vllm {__version__}",
            "authors_fields": dict(settings.fields),
        },
    )


def _check_out(checkpoint: Path, out: Path) -> None:
    if not checkpoint.is_dir():
        raise CheckpointImportError(
            f"expected the folder of a Flux-Attention checkpoint at {checkpoint}, found none; "
            "download one and give its folder"
        )
    if out.is_relative_to(checkpoint.resolve()):
        raise CheckpointImportError(
            f"expected OUT to be another folder than CHECKPOINT and not in it, found {out} for "
            f"{checkpoint.resolve()}; the checkpoint stays as it is"
        )
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        what = "a folder with files in it" if out.is_dir() else "a file"
        raise CheckpointImportError(
            f"expected {out} to be new or empty, found {what}; choose another, or remove it"
        )


def _check_space(out: Path, tensors: SortedTensors, copied: list[Path]) -> None:
    parent = next(folder for folder in out.parents if folder.exists())
    needed = _SPARE_BYTES + sum(file.stat().st_size for file in copied)
    needed += sum(stored.nbytes for stored in (*tensors.model.values(), *tensors.router.values()))
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise CheckpointImportError(
            f"expected {needed / 1e9:.1f} GB free under {parent}, found {free / 1e9:.1f} GB; make "
            "room, or choose another disk"
        )


def _side_files(checkpoint: Path, tensors: SortedTensors) -> tuple[list[str], list[str]]:
    """List the files to copy, and the entries of the folder that are left behind.

    Raises: CheckpointImportError: a file to copy is a link to nothing, as in a hub's cache cut
        short.
    """
    read = {stored.file.name for stored in (*tensors.model.values(), *tensors.router.values())}
    copied, left = [], []
    for entry in sorted(checkpoint.iterdir()):
        wanted = entry.suffix != ".py" and any(fnmatch(entry.name, name) for name in _COPIED)
        if wanted and entry.is_file():
            copied.append(entry.name)
        elif wanted and not entry.exists():
            raise CheckpointImportError(
                f"expected a file at {entry}, found a link to nothing; download the checkpoint "
                "again"
            )
        elif entry.name not in read | {"config.json", INDEX}:
            left.append(entry.name)
    return copied, left


def _make_folder(out: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary sibling and rename it; whatever goes wrong, `out` stays as it was."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.importing-"))
        try:
            fill(temporary)
            # Made private to their owner; a server may run as another user.
            for entry in (temporary, *temporary.rglob("*")):
                entry.chmod(0o755 if entry.is_dir() else 0o644)
            temporary.replace(out)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointImportError(
            f"expected to write {out}, found: {error}; nothing was left there, mend that and run "
            "again"
        ) from error
