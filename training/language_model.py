"""Load the language model of a checkpoint, be it all of it or inside a model that takes images."""

from typing import Any

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
)

from flux_vllm.errors import UnsupportedConfigurationError


def load_language_model(model: str, dtype: torch.dtype) -> Any:
    """Load a model of transformers that continues token ids.

    One that takes images comes whole where transformers has no class for its text alone
    (Qwen2.5-VL, Qwen3-VL). On text it needs no weights for images, and its positions are [B, T]
    as of any other.

    Args:
        model: folder or name.
        dtype: of its weights.

    Returns: the model.
    Raises: UnsupportedConfigurationError: transformers knows no language model for it.
    """
    config = type(AutoConfig.from_pretrained(model))
    if config in MODEL_FOR_CAUSAL_LM_MAPPING:
        return AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    if config in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        return AutoModelForImageTextToText.from_pretrained(model, dtype=dtype)
    raise UnsupportedConfigurationError(
        f"expected a causal language model, or one that takes images beside text, at {model}, "
        f"found {config.__name__}; give the folder or the name of such a model"
    )
