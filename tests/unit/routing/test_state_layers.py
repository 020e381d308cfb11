"""A hybrid's layers with a state, in a probe. The real ones run in tests/e2e/test_layer_kinds.py.

Oracle: what a fake layer and its metadata builder were asked for.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flux_vllm.routing.state_layers import StateLayers

pytestmark = pytest.mark.vllm

CPU = torch.device("cpu")
TOKENS = 256


class Builder:
    """Gives back the batch that metadata is asked for."""

    def __init__(self, spec: Any, names: list[str], vllm_config: Any, device: Any) -> None:
        self.facts = SimpleNamespace(spec=spec, names=names)

    def build(self, common_prefix_len: int, batch: Any) -> Any:
        """Keep it."""
        assert common_prefix_len == 0
        return SimpleNamespace(batch=batch, **vars(self.facts))


def make_layer(shapes: tuple, mode: str = "none", block_size: int = 4096) -> Any:
    """Make a layer that vLLM takes for one with a state."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.v1.kv_cache_interface import MambaSpec

    class Layer(MambaBase):
        kv_cache = ("of requests",)
        get_state_shape = get_state_dtype = mamba_type = None

        def get_kv_cache_spec(self, vllm_config: Any) -> MambaSpec:
            return MambaSpec(
                shapes=shapes,
                dtypes=(torch.float32,) * len(shapes),
                block_size=block_size,
                mamba_cache_mode=mode,
                num_prefill_checkpoint_blocks=1,
                prefill_checkpoint_alignment=1,
            )

        def get_attn_backend(self) -> Any:
            return SimpleNamespace(get_builder_cls=lambda: Builder)

    return Layer()


@pytest.fixture
def make_states(monkeypatch: pytest.MonkeyPatch) -> Any:
    from contextlib import nullcontext

    monkeypatch.setattr("vllm.config.set_current_vllm_config", lambda config: nullcontext())

    def make(**layers: Any) -> StateLayers:
        context = {"attention": object()} | layers
        compilation = SimpleNamespace(static_forward_context=context)
        return StateLayers(SimpleNamespace(compilation_config=compilation), TOKENS, CPU)

    return make


def test_model_of_attention_alone(make_states: Any) -> None:
    states = make_states()
    assert (len(states), states.metadata) == (0, {})
    with states.apart():
        pass


def test_a_probe_is_one_prompt_without_a_past(make_states: Any) -> None:
    states = make_states(a=make_layer(((2, 3),)))
    metadata = states.metadata["a"]
    batch = metadata.batch
    assert metadata.names == ["a"]
    assert batch.query_start_loc.tolist() == batch.query_start_loc_cpu.tolist() == [0, TOKENS]
    assert batch.seq_lens.tolist() == batch.seq_lens_cpu_upper_bound.tolist() == [TOKENS]
    assert (batch.num_reqs, batch.num_actual_tokens) == (1, TOKENS)
    assert (batch.max_query_len, batch.max_seq_len) == (TOKENS, TOKENS)
    assert batch.is_prefilling.tolist() == [True]
    # Block 0 is vLLM's null block.
    assert batch.block_table_tensor.tolist() == [[1]]
    # No state from within the prompt, whatever the prefix cache wants of requests.
    assert metadata.spec.num_prefill_checkpoint_blocks == 0


def test_columns_of_a_prefix_cache(make_states: Any) -> None:
    states = make_states(a=make_layer(((2, 3),), mode="align", block_size=100))
    assert states.metadata["a"].batch.block_table_tensor.tolist() == [[1] * 4]


def test_states_are_kept_apart(make_states: Any) -> None:
    """Layers of the same shapes share memory, and have their own back even after an error."""
    layers = {"a": make_layer(((2, 3), (4,))), "b": make_layer(((2, 3), (4,)))}
    layers["c"] = make_layer(((5,),))
    states = make_states(**layers)
    with states.apart():
        assert [tuple(s.shape) for s in layers["a"].kv_cache] == [(2, 2, 3), (2, 4)]
        assert layers["a"].kv_cache is layers["b"].kv_cache
        assert layers["c"].kv_cache[0].shape == (2, 5)
    with pytest.raises(KeyboardInterrupt), states.apart():
        raise KeyboardInterrupt
    assert all(layer.kv_cache == ("of requests",) for layer in layers.values())
