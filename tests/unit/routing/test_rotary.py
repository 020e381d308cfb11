"""Rotating back what vLLM's rotary embeddings rotated, and refusing those that cannot be undone.

Oracle: the query before vLLM's real class rotates it, on its native path and on its CPU kernel.
Bound: float32 rounding where the module's table is float32; 8 bits of mantissa where bfloat16.
Pinned: trying the module out must leave its table as it was, for vLLM's kernel reads it in the
model's dtype; a module that returns another shape is refused, not an error of torch. Dual chunk
attention's class is built around its constructor, which wants a CUDA device.
"""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.routing.rotary import RotaryInverse

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
H, MAX_POSITION = 32, 1024
GPTJ = {"is_neox_style": False}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
SECTIONS = {"mrope_section": [4, 6, 6]}
# name: (rope_parameters, other arguments of get_rope, class)
SUPPORTED: dict[str, tuple[dict, dict, str]] = {
    "default": ({}, {}, "RotaryEmbedding"),
    "theta-1e6": ({"rope_theta": 1e6}, {}, "RotaryEmbedding"),
    "gptj": ({}, GPTJ, "RotaryEmbedding"),
    "partial": ({"partial_rotary_factor": 0.5}, {}, "RotaryEmbedding"),
    "partial-quarter-gptj": ({"partial_rotary_factor": 0.25}, GPTJ, "RotaryEmbedding"),
    "linear": ({"rope_type": "linear", "factor": 4.0}, {}, "LinearScalingRotaryEmbedding"),
    "ntk": ({"rope_type": "ntk", "factor": 4.0}, {}, "NTKScalingRotaryEmbedding"),
    "ntk-mixed": (
        {"rope_type": "ntk", "factor": 4.0, "mixed_b": 0.625},
        {},
        "NTKScalingRotaryEmbedding",
    ),
    "dynamic-factor": (
        {"rope_type": "dynamic", "factor": 4.0},
        {},
        "DynamicNTKScalingRotaryEmbedding",
    ),
    "dynamic-alpha": (
        {"rope_type": "dynamic", "alpha": 1000.0},
        {},
        "DynamicNTKAlphaRotaryEmbedding",
    ),
    "llama3": (LLAMA3, {}, "Llama3RotaryEmbedding"),
    "llama3-partial": (LLAMA3 | {"partial_rotary_factor": 0.5}, {}, "Llama3RotaryEmbedding"),
    "yarn": (YARN, {}, "YaRNScalingRotaryEmbedding"),
    "yarn-mscale": (
        YARN | {"mscale": 1.0, "mscale_all_dim": 0.5},
        {},
        "YaRNScalingRotaryEmbedding",
    ),
    "yarn-attention-factor": (YARN | {"attention_factor": 2.5}, {}, "YaRNScalingRotaryEmbedding"),
    "yarn-gptj": (YARN, GPTJ, "YaRNScalingRotaryEmbedding"),
    "proportional": (
        {"rope_type": "proportional", "partial_rotary_factor": 0.25},
        {},
        "Gemma4RotaryEmbedding",
    ),
    "mrope": (SECTIONS, {}, "MRotaryEmbedding"),
    "mrope-interleaved": (SECTIONS | {"mrope_interleaved": True}, {}, "MRotaryEmbedding"),
    "mrope-yarn": (YARN | SECTIONS, {}, "MRotaryEmbedding"),
    "bailing-mrope": (
        SECTIONS | {"rope_type": "bailing_mrope"},
        {},
        "BailingMRotaryEmbedding",
    ),
    "pangu-mrope": (
        SECTIONS | {"rope_type": "openpangu", "mrope_interleaved": True},
        {},
        "MRotaryEmbeddingInterleaved",
    ),
}
REFUSED: dict[str, tuple[dict, dict, str]] = {
    "longrope": (
        {
            "rope_type": "longrope",
            "short_factor": [1.0] * (H // 2),
            "long_factor": [2.0] * (H // 2),
            "original_max_position_embeddings": 256,
        },
        {},
        "Phi3LongRoPEScaledRotaryEmbedding",
    ),
    "fourier": (
        {
            "use_fope": True,
            "num_key_value_heads": 2,
            "num_inv_freq": 8,
            "fope_sep_head": True,
            "fope_init_factor": 0.1,
        },
        {},
        "FourierRotaryEmbedding",
    ),
    "vision": ({"rope_type": "mllama4"}, {}, "Llama4VisionRotaryEmbedding"),
    "deepseek-yarn": (YARN | {"rope_type": "deepseek_yarn"}, {}, "DeepseekScalingRotaryEmbedding"),
    "deepseek-v4": (
        YARN | {"rope_type": "deepseek_yarn", "is_deepseek_v4": True},
        {},
        "DeepseekV4ScalingRotaryEmbedding",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _vllm_config() -> Iterator[None]:
    """vLLM's layers ask for the engine's configuration when they are made."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig()
    config.model_config = SimpleNamespace(max_model_len=MAX_POSITION)  # longrope asks for it
    with set_current_vllm_config(config):
        yield


def make_rope(
    parameters: dict[str, Any], arguments: dict[str, Any], dtype: torch.dtype, head_size: int = H
) -> Any:
    """Make a module of its own; vLLM would share it with other tests."""
    from vllm.model_executor.layers import rotary_embedding

    rotary_embedding._ROPE_DICT.clear()
    parameters = {"rope_theta": 10000.0} | parameters
    rope = rotary_embedding.get_rope(
        head_size, MAX_POSITION, rope_parameters=parameters, dtype=dtype, **arguments
    )
    rotary_embedding._ROPE_DICT.clear()
    return rope


@pytest.fixture(params=SUPPORTED)
def case(request: pytest.FixtureRequest) -> tuple[dict, dict, str]:
    return SUPPORTED[request.param]


def positions_of(inverse: RotaryInverse) -> torch.Tensor:
    last = len(inverse.cos) - 1
    return torch.cat([torch.arange(0, last, 13), torch.tensor([last, 1, 0])])


def rotate(rope: Any, positions: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Rotate as a model does; a text has the same position on each axis."""
    if hasattr(rope, "mrope_section"):
        positions = positions.expand(3, -1)
    return rope.forward_native(positions, query.clone(), query.clone())[0]


def undo(inverse: RotaryInverse, query: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    cos, sin = map(torch.from_numpy, inverse.rows(positions.numpy()))
    return inverse.undo(query, cos, sin)


class TestInverse:
    def test_rotated_and_back(self, case) -> None:
        rope = make_rope(*case[:2], torch.float32)
        assert type(rope).__name__ == case[2]
        inverse = RotaryInverse(rope, H, CPU)
        positions = positions_of(inverse)
        query = torch.randn(len(positions), H)
        rotated = rotate(rope, positions, query)
        # Nothing to rotate at position 0 alone: elsewhere the rotation must be there to undo.
        assert (rotated - query)[positions > 0].abs().amax(dim=1).min() > 0.01
        back = undo(inverse, rotated, positions)
        assert back.dtype == torch.float32
        torch.testing.assert_close(back, query, rtol=0, atol=2e-6)

    def test_bfloat16_table(self, case) -> None:
        """vLLM keeps cos and sin in the model's dtype: only their rounding is left."""
        rope = make_rope(*case[:2], torch.bfloat16)
        inverse = RotaryInverse(rope, H, CPU)
        positions = positions_of(inverse)
        query = torch.randn(len(positions), H).bfloat16().float()
        rotated = rotate(rope, positions, query.bfloat16())  # as the model does it
        back = undo(inverse, rotated.float(), positions)
        torch.testing.assert_close(back, query, rtol=0, atol=0.05)

    def test_same_inverse_whatever_the_table(self, case) -> None:
        """cos and sin are computed in float32, not read from the module's table."""
        first, second = (
            RotaryInverse(make_rope(*case[:2], dtype), H, CPU)
            for dtype in (torch.float32, torch.bfloat16)
        )
        assert torch.equal(first.cos, second.cos)
        assert torch.equal(first.sin, second.sin)
        assert first.cos.dtype == torch.float32

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_table_stays(self, case, dtype: torch.dtype) -> None:
        rope = make_rope(*case[:2], dtype)
        table, copy = rope.cos_sin_cache, rope.cos_sin_cache.clone()
        RotaryInverse(rope, H, CPU)
        assert rope.cos_sin_cache is table
        assert table.dtype == dtype
        assert torch.equal(table, copy)
        assert dict(rope.named_buffers())["cos_sin_cache"] is table

    @pytest.mark.parametrize("name", ["default", "gptj", "partial", "yarn-mscale"])
    def test_mean_over_heads_after_the_cpu_kernel(self, name: str) -> None:
        """What the backend does: average 5 heads after RoPE, then rotate the mean back."""
        rope = make_rope(*SUPPORTED[name][:2], torch.float32)
        inverse = RotaryInverse(rope, H, CPU)
        positions = torch.randint(0, len(inverse.cos), (40,))
        query = torch.randn(40, 5 * H)
        rotated, key = query.clone(), torch.randn(40, H)
        rope.forward_cpu(positions, rotated, key)  # in place
        assert (rotated - query).abs().max() > 0.1
        mean = undo(inverse, rotated.view(40, 5, H).mean(dim=1), positions)
        torch.testing.assert_close(mean, query.view(40, 5, H).mean(dim=1), rtol=0, atol=1e-5)

    def test_many_layers_at_once(self) -> None:
        inverse = RotaryInverse(make_rope({}, {}, torch.float32), H, CPU)
        positions = torch.tensor([0, 5, 1000])
        query = torch.randn(4, 3, H)
        together = undo(inverse, query, positions)
        for layer in range(4):
            assert torch.equal(together[layer], undo(inverse, query[layer], positions))

    def test_positions_beyond_the_table_count_as_its_last(self) -> None:
        """vLLM serves such positions where it is told to, with whatever answers."""
        inverse = RotaryInverse(make_rope({}, {}, torch.float32), H, CPU)
        last = len(inverse.cos) - 1
        query = torch.randn(1, H).expand(3, H)
        back = undo(inverse, query, torch.tensor([last, last + 1, 10**6]))
        assert torch.equal(back[1], back[0])
        assert torch.equal(back[2], back[0])


class TestRefused:
    def refused(self, rope: Any, head_dim: int = H) -> str:
        with pytest.raises(UnsupportedConfigurationError) as error:
            RotaryInverse(rope, head_dim, CPU)
        message = str(error.value)
        assert message.startswith(
            "layer routes: expected a rotary embedding with one position per token, found "
            f"{type(rope).__name__} ("
        )
        assert message.endswith("; serve this model with vLLM's own attention backend")
        return message

    @pytest.mark.parametrize("name", REFUSED)
    def test_class(self, name: str) -> None:
        parameters, arguments, class_name = REFUSED[name]
        rope = make_rope(parameters, arguments, torch.float32)
        assert type(rope).__name__ == class_name
        self.refused(rope)

    def test_dual_chunk(self) -> None:
        from vllm.model_executor.layers.rotary_embedding import DualChunkRotaryEmbedding

        rope = DualChunkRotaryEmbedding.__new__(DualChunkRotaryEmbedding)
        torch.nn.Module.__init__(rope)
        rope.head_size = rope.rotary_dim = H
        rope.max_position_embeddings, rope.base, rope.is_neox_style = 256, 10000.0, True
        rope.chunk_size, rope.local_size = 128, 32
        rope.dtype, rope.device = torch.float32, CPU
        self.refused(rope)

    def test_not_a_rotary_embedding(self) -> None:
        message = self.refused(torch.nn.Linear(2, 2))
        assert "(no single table of cos and sin)" in message

    def test_rotation_that_is_not_the_tables(self) -> None:
        """A class that rotates otherwise than its table says is found by trying it."""
        rope = make_rope({}, {}, torch.float32)
        native = rope.forward_native
        rope.forward_native = lambda positions, q, k: native(positions + 1, q, k)
        rope.cos_sin_cache = torch.cat([rope.cos_sin_cache, rope.cos_sin_cache[-1:]])
        assert "rotating back misses by" in self.refused(rope)

    def test_table_stays_when_the_trial_fails(self) -> None:
        rope = make_rope({}, {}, torch.bfloat16)
        native, table = rope.forward_native, rope.cos_sin_cache

        def fails(*arguments: torch.Tensor) -> None:
            native(*arguments)  # leaves a float32 table behind
            raise ValueError("no")

        rope.forward_native = fails
        assert "(no)" in self.refused(rope)
        assert rope.cos_sin_cache is table

    def test_more_rotated_dimensions_than_the_head_has(self) -> None:
        rope = make_rope({}, {}, torch.float32, head_size=2 * H)
        self.refused(rope)

    def test_rotation_of_a_part_that_is_not_the_heads_first(self) -> None:
        """DeepSeek without MLA rotates the last 32 of 96 dimensions by a module made for 32."""
        self.refused(make_rope({}, {}, torch.float32), head_dim=3 * H)
