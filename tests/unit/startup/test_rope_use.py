"""Whether a layer rotates its queries and what it does to them next, by source and attributes.

Oracle: vLLM's models, read by a person; methods written here, each with one way to put a condition.
"""

import importlib
from typing import Any

import pytest
import torch
from torch import nn

from flux_vllm.startup.rope_use import change_after_rope, rotates

pytestmark = pytest.mark.vllm

FULL_NOPE = {"sliding_window": None, "apply_rope_all_layers": False}


@pytest.mark.parametrize(
    ("module", "name", "attributes", "expected"),
    [
        ("llama", "LlamaAttention", {}, True),
        ("qwen2", "Qwen2Attention", {}, True),
        ("qwen3", "Qwen3Attention", {}, True),
        ("gemma3", "Gemma3Attention", {}, True),
        ("mixtral", "MixtralAttention", {}, True),
        ("granite", "GraniteAttention", {"use_rope": True}, True),
        ("granite", "GraniteAttention", {"use_rope": False}, False),
        ("granite", "GraniteAttention", {}, None),  # as if the attribute had another name
        ("commandr", "CohereAttention", {"v1": True, "sliding_window": None}, True),
        ("commandr", "CohereAttention", {"v1": False, "sliding_window": None}, False),
        ("commandr", "CohereAttention", {"v1": False, "sliding_window": 4097}, True),
        ("exaone4", "Exaone4Attention", FULL_NOPE, False),
        ("exaone4", "Exaone4Attention", FULL_NOPE | {"apply_rope_all_layers": True}, True),
        ("llama4", "Llama4Attention", {"rotary_emb": None}, False),
        ("llama4", "Llama4Attention", {"rotary_emb": object()}, True),
        ("iquest_loopcoder", "LoopCoderAttention", {}, None),  # depends on the loop
        ("opt", "OPTAttention", {}, False),
        ("nemotron_h", "NemotronHAttention", {}, False),
        ("falcon_h1", "FalconH1AttentionDecoderLayer", {}, True),
        ("chatglm", "GLMAttention", {}, True),
    ],
)
def test_rotates_on_vllms_models(
    module: str, name: str, attributes: dict, expected: bool | None
) -> None:
    attention = blank(f"vllm.model_executor.models.{module}", name, attributes)
    assert rotates(attention) is expected


def blank(module: str, name: str, attributes: dict[str, Any]) -> nn.Module:
    """Make a module of a class without its __init__."""
    kind = getattr(importlib.import_module(module), name)
    attention: nn.Module = kind.__new__(kind)
    nn.Module.__init__(attention)
    vars(attention).update(attributes)
    return attention


@pytest.mark.parametrize(
    ("module", "name", "attributes", "expected", "change"),
    [
        ("arcee", "ArceeAttention", {}, True, None),
        ("seed_oss", "SeedOssAttention", {}, True, None),
        ("olmo3", "Olmo3Attention", {}, True, None),
        ("smollm3", "SmolLM3Attention", {"use_rope": 1}, True, None),
        ("smollm3", "SmolLM3Attention", {"use_rope": 0}, False, None),
        ("gpt_neox", "GPTNeoXAttention", {}, True, None),
        ("gpt_bigcode", "GPTBigCodeAttention", {}, False, None),
        ("phi", "PhiAttention", {"qk_layernorm": False}, True, "torch.cat"),
        ("hunyuan_v1_dense", "HunYuanDenseV1Attention", {}, True, "self.query_layernorm"),
    ],
)
def test_transformers_own_models(
    module: str, name: str, attributes: dict, expected: bool, change: str | None
) -> None:
    attention = blank(f"transformers.models.{module}.modeling_{module}", name, attributes)
    assert rotates(attention) is expected
    found = change_after_rope(attention) if expected else None
    assert found is None if change is None else change in str(found)


class Attention(nn.Module):
    """Each method puts the rotation under another condition; the attributes say yes."""

    use_rope = True
    layer_types = ("full", "sliding")
    index = 1

    def told(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate by an attribute."""
        if self.use_rope and self.index != 0:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def told_not_to(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate in the other branch."""
        if not self.use_rope:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def either_way(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate in each of two branches, of which one is taken."""
        if self.use_rope is None:
            q, _ = self.rotary_emb(positions, q, None)
        elif self.use_rope:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def by_the_call(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate long inputs."""
        if positions.shape[0] > 1:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def by_both(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate by an attribute, and by the call."""
        if self.use_rope and positions is not None:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def within(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate under a condition of the call within one of the module."""
        if self.use_rope:
            k = k.contiguous()
            if positions is not None:
                q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def in_an_expression(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate in a conditional expression."""
        q, k = self.rotary_emb(positions, q, k) if positions is not None else (q, k)
        return self.attn(q, k, k)

    def in_a_loop(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate as often as there are types."""
        for _ in self.layer_types:
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def by_an_index(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate by what is looked up: more than is evaluated here."""
        if self.layer_types[self.index] == "sliding":
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def by_a_call(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate by what a method says, which may change."""
        if self.told(positions, q, k):
            q, k = self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("told", True),
        ("told_not_to", False),
        ("either_way", True),
        ("by_the_call", None),
        ("by_both", None),
        ("within", None),
        ("in_an_expression", None),
        ("in_a_loop", None),
        ("by_an_index", None),
        ("by_a_call", None),
    ],
)
def test_rotates_by_conditions(method: str, expected: bool | None) -> None:
    names = {"forward": vars(Attention)[method]} | {
        name: value for name, value in vars(Attention).items() if not callable(value)
    }
    assert rotates(type(method, (nn.Module,), names)()) is expected


def test_what_a_condition_switches_off_changes_nothing() -> None:
    """A branch that is not taken neither scales queries nor hands them on."""

    class Scaling(nn.Module):
        scales, is_shared = False, False

        def forward(self, positions: Any, q: Any, k: Any) -> Any:
            q, k = self.rotary_emb(positions, q, k)
            if self.scales or self.is_shared:
                q = q * 2
            return self.attn(q, k, k)

    module = Scaling()
    assert change_after_rope(module) is None
    module.is_shared = True
    assert change_after_rope(module) == "q = q * 2"


@pytest.mark.parametrize(
    ("module", "name", "attributes", "change"),
    [
        ("llama", "LlamaAttention", {}, None),
        ("qwen3", "Qwen3Attention", {}, None),
        ("mixtral", "MixtralAttention", {}, None),
        ("lfm2", "Lfm2Attention", {}, None),  # reshapes queries after RoPE
        ("mistral", "MistralAttention", {"do_llama_4_scaling": False}, None),
        (
            "mistral",
            "MistralAttention",
            {"do_llama_4_scaling": True},
            "q = (q * attn_scale).to(q.dtype)",
        ),
        (
            "llama4",
            "Llama4Attention",
            {},
            "q = self.qk_norm(q.float()).reshape(-1, self.q_size).to(q.dtype)",
        ),
    ],
)
def test_change_after_rope_on_vllms_models(
    module: str, name: str, attributes: dict, change: str | None
) -> None:
    kind = getattr(importlib.import_module(f"vllm.model_executor.models.{module}"), name)
    attention = kind.__new__(kind)
    nn.Module.__init__(attention)
    vars(attention).update(attributes)
    assert change_after_rope(attention) == change


class Changing(nn.Module):
    """Each method is what a model might do between RoPE and attention."""

    def product_in_the_call(self, positions: Any, q: Any, k: Any) -> Any:
        """Scale on the way."""
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q * 2, k, k)

    def clamped_in_the_call(self, positions: Any, q: Any, k: Any) -> Any:
        """Change values by a method, behind one that does not."""
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(q.clamp(-1, 1).view(-1, 32), k, k)

    def product_by_a_method(self, positions: Any, q: Any, k: Any) -> Any:
        """Scale by a method."""
        q, k = self.rotary_emb(positions, q, k)
        q = q.mul(2)
        return self.attn(q, k, k)

    def in_place(self, positions: Any, q: Any, k: Any) -> Any:
        """Scale without an assignment."""
        q, k = self.rotary_emb(positions, q, k)
        q.mul_(2)
        return self.attn(q, k, k)

    def under_another_name(self, positions: Any, q: Any, k: Any) -> Any:
        """Rename, then scale."""
        q, k = self.rotary_emb(positions, q, k)
        query = q
        query *= 2
        return self.attn(query, k, k)

    def slice_of_it(self, positions: Any, q: Any, k: Any) -> Any:
        """Scale a part."""
        q, k = self.rotary_emb(positions, q, k)
        q[..., :8] = 0
        return self.attn(q, k, k)

    def by_a_function(self, positions: Any, q: Any, k: Any) -> Any:
        """Let another write into it."""
        q, k = self.rotary_emb(positions, q, k)
        torch.mul(k, 2, out=q)
        return self.attn(q, k, k)

    def two_at_once(self, positions: Any, q: Any, k: Any) -> Any:
        """Scale in a tuple."""
        q, k = self.rotary_emb(positions, q, k)
        k, q = k, q * 2
        return self.attn(q, k, k)

    def handed_out(self, positions: Any, q: Any, k: Any) -> Any:
        """Attend elsewhere."""
        q, k = self.rotary_emb(positions, q, k)
        return q, k

    def something_else(self, positions: Any, q: Any, k: Any) -> Any:
        """Attend with another tensor."""
        raw = q
        q, k = self.rotary_emb(positions, q, k)
        return self.attn(raw, k, k)

    def in_place_rotation(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate without an assignment."""
        self.rotary_emb(positions, q, k)
        return self.attn(q, k, k)

    def renamed_and_reshaped(self, positions: Any, q: Any, k: Any) -> Any:
        """Change nothing."""
        q, k = self.rotary_emb(positions, q, k)
        query = q.view(-1, 4, 8).flatten(1)
        attended = self.attn(query, k, k, output_shape=q.shape)
        return attended.view(q.shape[0], -1)


@pytest.mark.parametrize(
    ("method", "change"),
    [
        ("product_in_the_call", "return self.attn(q * 2, k, k)"),
        ("clamped_in_the_call", "return self.attn(q.clamp(-1, 1).view(-1, 32), k, k)"),
        ("product_by_a_method", "q = q.mul(2)"),
        ("in_place", "q.mul_(2)"),
        ("under_another_name", "query *= 2"),
        ("slice_of_it", "q[..., :8] = 0"),
        ("by_a_function", "torch.mul(k, 2, out=q)"),
        ("two_at_once", "k, q = (k, q * 2)"),
        ("handed_out", "handed_out() without self.attn(q, ...)"),
        ("something_else", "something_else() without self.attn(q, ...)"),
        ("in_place_rotation", "self.rotary_emb(positions, q, k)"),
        ("renamed_and_reshaped", None),
    ],
)
def test_change_after_rope_accepts_known_shapes_alone(method: str, change: str | None) -> None:
    kind = type(method, (nn.Module,), {"forward": vars(Changing)[method]})
    assert change_after_rope(kind()) == change


class Helped(nn.Module):
    """Rotates in a method of its own, like Qwen3-Next's."""

    scales = False

    def project(self, positions: Any, q: Any, k: Any) -> Any:
        """Rotate, and hand on among other things."""
        q, k = self.rotary_emb(positions, q, k)
        return k, q, None

    def forward(self, positions: Any, q: Any, k: Any) -> Any:
        """Attend."""
        k, q, _ = self.project(positions, q, k)
        if self.scales:
            q = q * 2
        return self.attn(q, k, k)


def test_queries_are_followed_through_a_method_that_returns_them() -> None:
    module = Helped()
    assert rotates(module) is True
    assert change_after_rope(module) is None
    module.scales = True
    assert change_after_rope(module) == "q = q * 2"


def test_queries_that_nobody_takes_are_not_known() -> None:
    class Alone(nn.Module):
        project = Helped.project

    assert change_after_rope(Alone()) == "project() without self.attn(q, ...)"
