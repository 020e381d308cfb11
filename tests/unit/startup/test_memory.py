"""Which layers the buffers are counted for: those with a KV cache, and those that share one.

Oracle: the groups written down by hand; grouping itself is vLLM's.
"""

from types import SimpleNamespace

import pytest
import torch

from flux_vllm.startup import memory

pytestmark = pytest.mark.vllm


def test_layers_that_share_a_kv_cache_are_of_its_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheGroupSpec

    spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    groups = [KVCacheGroupSpec(["layers.0"], spec), KVCacheGroupSpec(["layers.1"], spec)]
    monkeypatch.setattr(memory, "_all_groups", lambda config, specs: groups)
    owners = {"layers.0": None, "layers.1": None, "layers.2": "layers.0", "layers.3": "layers.1"}
    context = {
        name: SimpleNamespace(kv_sharing_target_layer_name=owner) for name, owner in owners.items()
    }
    context["layers.4"] = SimpleNamespace()  # with a state, no attention
    worker = SimpleNamespace(
        vllm_config=SimpleNamespace(
            compilation_config=SimpleNamespace(static_forward_context=context)
        ),
        get_kv_cache_spec=lambda: {"layers.0": spec, "layers.1": spec},
    )
    found = [group.layer_names for group in memory._kv_cache_groups(worker)]
    assert found == [["layers.0", "layers.2"], ["layers.1", "layers.3"]]
