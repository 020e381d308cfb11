"""Language models of checkpoints that take images. Oracle: the plain text model, same weights."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedConfig, Qwen2Config, Qwen3Config, T5Config

from flux_vllm.errors import UnsupportedConfigurationError
from tests.helpers.models import give_images, random_prompt, write_tiny_model
from training.attach import RoutedModel
from training.language_model import load_language_model
from training.model_loading import model_limit

SECTIONS = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}


@pytest.mark.parametrize(
    ("config_class", "kind"),
    [
        (Qwen2Config, "Qwen2_5_VLForConditionalGeneration"),
        (Qwen3Config, "Qwen3VLForConditionalGeneration"),
    ],
)
def test_a_model_that_takes_images_computes_text_as_its_text_model(
    config_class: type[PreTrainedConfig], kind: str, tmp_path: Path
) -> None:
    folder, exact = tmp_path / "model", tmp_path / "exact"
    write_tiny_model(folder, config_class, heads=4, rope_parameters=SECTIONS)
    give_images(folder, exact)
    assert model_limit(str(folder)) == 8192
    tokens = torch.tensor([random_prompt(100, seed) for seed in range(2)])
    routes = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [1.0, 1.0]])
    outer = load_language_model(str(folder), torch.float32)
    assert type(outer).__name__ == kind
    logits = []
    for model in (load_language_model(str(exact), torch.float32), outer):
        routed = RoutedModel(model, 4, 16)
        logits.append(routed.logits(routed.forward(tokens, routes)))
    torch.testing.assert_close(*logits)


def test_slopes_of_a_model_that_takes_images_are_its_text_models(tmp_path: Path) -> None:
    """With its activations recomputed."""
    folder, exact = tmp_path / "model", tmp_path / "exact"
    write_tiny_model(folder, Qwen2Config, heads=4, layers=2, rope_parameters=SECTIONS)
    give_images(folder, exact)
    tokens = torch.tensor([random_prompt(60, seed=1)])
    slopes = []
    for path in (exact, folder):
        routed = RoutedModel(load_language_model(str(path), torch.float32), 4, 16)
        if path == folder:
            routed.recompute_activations()
        routes = torch.full((2, 1), 0.5, requires_grad=True)
        routed.logits(routed.forward(tokens, routes)).logsumexp(dim=-1).sum().backward()
        slopes.append(routes.grad)
    assert slopes[0].abs().min() > 0.01
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3)


def test_others_are_refused(tmp_path: Path) -> None:
    T5Config().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedConfigurationError, match="found T5Config"):
        load_language_model(str(tmp_path), torch.float32)
