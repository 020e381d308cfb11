"""A model in GGUF, dequantized to bfloat16 as a Hugging Face folder.

transformers reads the file and unpacks it tensor by tensor; what it would leave out without an
error is refused here.
"""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flux_vllm.cli.console import CommandError, require

_BYTES_PER_WEIGHT = 2  # bfloat16
_SPARE_BYTES = 100 << 20  # tokenizer, configuration and room to breathe
_SHARD = "1GB"


def require_gguf_readers() -> None:
    """Check that all that reads a GGUF file is installed.

    Raises: CommandError: a package is missing.
    """
    for module in ("gguf", "accelerate", "transformers"):
        require(module, "run `make install`, or `pip install 'flux-vllm[sample-model]'`")


def dequantize(gguf: Path, folder: Path, name: str, progress: Callable[[str], None]) -> None:
    """Write a GGUF file's model, tokenizer and chat template as a Hugging Face folder.

    The weights are bfloat16, in shards of at most 1 GB. Needs memory for the weights in bfloat16
    and one tensor in float32, beside the file.

    Args:
        gguf: the file.
        folder: an existing folder to write into.
        name: the model's name for its configuration.
        progress: called with a line of text at each step.

    Raises: CommandError: the file is no GGUF, is one of several, has an architecture or a scaling
        of RoPE that transformers does not read, or the disk is too small.
    """
    # A local file: nothing may ask a hub about it.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    progress("loading transformers")
    from transformers import AutoTokenizer, GenerationConfig

    reader = _open(gguf)
    _check_disk(sum(int(tensor.n_elements) for tensor in reader.tensors), folder)
    progress(f"reading {gguf}")
    model = _load(gguf)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    _set_special_tokens(reader, tokenizer)
    config = model.config
    _check_rope(reader, config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = name
    tokenizer.model_max_length = config.max_position_embeddings
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    progress("writing safetensors in bfloat16")
    model.save_pretrained(folder, max_shard_size=_SHARD)
    tokenizer.save_pretrained(folder)
    # save_pretrained makes the weights private to their owner; a server may run as another user.
    for shard in folder.glob("*.safetensors"):
        shard.chmod(0o644)
    _check_tokenizer(reader, AutoTokenizer.from_pretrained(folder))


def license_of(gguf: Path) -> str:
    """Give the licence that a GGUF file names, or "unknown"."""
    return str(_value(_open(gguf), "general.license") or "unknown")


def _open(gguf: Path) -> Any:
    from gguf import GGUFReader

    try:
        reader = GGUFReader(gguf)
    except (ValueError, IndexError) as error:
        raise CommandError(
            f"expected {gguf} to be a whole GGUF file, found one that cannot be read ({error}); "
            "fetch it again"
        ) from error
    if (count := _value(reader, "split.count") or 1) > 1:
        raise CommandError(
            f"expected {gguf} to be a whole model, found one of {count} files; join them with "
            "llama.cpp's `llama-gguf-split --merge`"
        )
    return reader


def _value(reader: Any, key: str) -> Any:
    field = reader.get_field(key)
    return None if field is None else field.contents()


def _check_disk(num_weights: int, folder: Path) -> None:
    needed = num_weights * _BYTES_PER_WEIGHT + _SPARE_BYTES
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CommandError(
            f"expected {needed / 1e9:.2f} GB free in {folder.parent} for the model in bfloat16, "
            f"found {free / 1e9:.2f} GB; make room or choose another place"
        )


def _load(gguf: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM, GgufConfig

    try:
        model, loaded = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.bfloat16,
            output_loading_info=True,
        )
    except (ValueError, NotImplementedError) as error:
        raise CommandError(
            f"expected {gguf} to hold a model that transformers reads from GGUF, found one that it "
            f"does not ({error}); start from the model's safetensors instead"
        ) from error
    if loaded["missing_keys"] or loaded["mismatched_keys"]:
        wrong = sorted({*loaded["missing_keys"], *(key for key, *_ in loaded["mismatched_keys"])})
        raise CommandError(
            f"expected all weights of {type(model).__name__} in {gguf}, found none that fit "
            f"{', '.join(map(str, wrong[:5]))}{' ...' if len(wrong) > 5 else ''}; start from the "
            "model's safetensors instead"
        )
    return model


def _check_rope(reader: Any, config: Any) -> None:
    """Refuse a scaling of RoPE that did not reach the configuration: positions would be wrong."""
    rope = getattr(config, "rope_parameters", None) or {}
    kind = _value(reader, f"{_value(reader, 'general.architecture')}.rope.scaling.type")
    by_factors = any(tensor.name.startswith("rope_") for tensor in reader.tensors)
    scaled = by_factors or kind not in (None, "none")
    if scaled and rope.get("rope_type", "default") == "default":
        raise CommandError(
            f"expected RoPE without scaling, found {kind or 'factors'!r} in the GGUF file, which "
            "transformers does not read; start from the model's safetensors instead"
        )


def _set_special_tokens(reader: Any, tokenizer: Any) -> None:
    """Give a tokenizer the file's special tokens: transformers 5.17 keeps an architecture's own."""
    for token, key in (("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding")):
        number = _value(reader, f"tokenizer.ggml.{key}_token_id")
        if number is not None:
            setattr(tokenizer, token, tokenizer.convert_ids_to_tokens(int(number)))


def _check_tokenizer(reader: Any, tokenizer: Any) -> None:
    """Compare the tokenizer as a server will read it with the GGUF file's own words."""
    template = _value(reader, "tokenizer.chat_template")
    end = _value(reader, "tokenizer.ggml.eos_token_id")
    for what, expected, found in (
        ("chat template", template, tokenizer.chat_template),
        ("end-of-sequence token", end, tokenizer.eos_token_id),
    ):
        if expected is not None and expected != found:
            raise CommandError(
                f"expected the {what} of the GGUF file, {expected!r}, in the folder that was made, "
                f"found {found!r}; report it with your version of transformers"
            )
