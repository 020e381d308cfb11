"""What a probe needs of each layer: whose queries it keeps, how they are rotated back, its end.

Oracle: layers written down by hand; the messages.
"""

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.checkpoint import RouterInfo, write_router
from flux_vllm.startup.attach import _probed_layers, attach
from flux_vllm.startup.layers import attention_layers
from tests.unit.startup.fakes import (
    CPU,
    H,
    L,
    Model,
    SometimesRotating,
    SometimesScaling,
    make_attention,
    make_config,
    runner_of,
)

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize(
    ("own", "always_sparse", "last"),
    [((), (), 1), ((0,), (), 1), ((0, 2), (), 2), ((3,), (3,), 1)],
    ids=["none", "earlier", "later", "always sparse"],
)
@pytest.mark.usefixtures("_one_rank")
def test_layers_that_no_router_reads(
    tmp_path: Path, rope: Any, own: tuple, always_sparse: tuple, last: int
) -> None:
    """Layer 1 is read by all, and its own layer's queries by the routers of `own`."""
    info = RouterInfo(
        base_model="",
        num_layers=L,
        head_dim=H,
        pool_tokens=1,
        sink_tokens=64,
        window_tokens=256,
        pools=("tail:8", "length"),
        context_layers=(1,),
        always_sparse=always_sparse,
    )
    router = info.make_router()
    columns = router.linear("features.0")[0].data.view(L, -1, 4, H)
    columns[[layer for layer in range(L) if layer not in own], :, 0] = 0
    write_router(tmp_path, router, info)
    attentions = [make_attention(i) for i in range(L)]
    probe = attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU).probe
    read = sorted({1, *own} - set(always_sparse))
    data = [probe._metadata[attention.layer_name] for attention in attentions]
    assert [i for i, d in enumerate(data) if d.mean_query is not None] == read
    assert [i for i, d in enumerate(data) if d.is_last] == [last]
    assert probe._rotations[0].layers.tolist() == read


def probed(model: nn.Module) -> list[Any]:
    layers = attention_layers(model)
    return _probed_layers(layers, {layer.index for layer in layers}, CPU)


def test_conditional_rotation_is_refused(rope: Any) -> None:
    """Queries that were not rotated in a call would be rotated back."""
    model = Model([make_attention(0)], rope, SometimesRotating)
    with pytest.raises(UnsupportedConfigurationError, match="SometimesRotating, which applies"):
        probed(model)


def test_queries_scaled_after_rope_are_refused(rope: Any, monkeypatch) -> None:
    """Rotating back would leave a temperature in: Ministral's, Llama4's."""
    model = Model([make_attention(0)], rope, SometimesScaling)
    with pytest.raises(UnsupportedConfigurationError) as error:
        probed(model)
    assert str(error.value) == (
        "--attention-backend flux: expected queries that reach attention as RoPE made them, found "
        "`query = query * positions.log()` after it in SometimesScaling, which a router cannot see "
        "through; serve this model without --attention-backend flux"
    )
    monkeypatch.setattr(SometimesScaling, "do_scaling", False)
    assert len(probed(model)) == 1
