"""Attaching to a loaded model: which layers get a route, which models are refused.

Oracle: the messages, and the layers written down by hand; vLLM's real Attention and rotary classes.
Pinned: layers with a sliding window of their own stay unrouted, and attention of another kind
(chunked local) does not pass for full attention.
"""

import gc
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from flux_vllm.errors import FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.route import Route
from flux_vllm.startup.attach import attach
from tests.unit.startup.fakes import (
    CPU,
    H,
    L,
    Model,
    RotatingWhereTold,
    make_attention,
    make_config,
    runner_of,
    write,
)

pytestmark = pytest.mark.vllm

OPEN, SPARSE, FULL = (int(r) for r in (Route.UNDECIDED, Route.SPARSE, Route.FULL))
STATIC = {"policy": "static", "sink_tokens": 1, "window_tokens": 2}


@pytest.mark.usefixtures("_one_rank")
class TestAttach:
    WINDOWED = {1: 128}

    def attentions(self, windows: dict[int, int] | None = None, **options: Any) -> list[Any]:
        return [make_attention(i, (windows or {}).get(i), **options) for i in range(L)]

    def test_all_layers(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        attentions = self.attentions()
        runtime = attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (0, 1, 2, 3)
        for index, attention in enumerate(attentions):
            binding = attention.impl.binding
            assert binding.layer == index
            assert binding.runtime is runtime
            assert attention.query_quant is None
        assert (runtime.sink_tokens, runtime.window_tokens) == (64, 256)
        assert len(runtime.probe._rotations) == 1  # one table for all
        assert len(runtime.table.settled_prompt_len) == 8

    def test_sliding_window_layers_stay_unrouted(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        attentions = self.attentions(self.WINDOWED)
        runtime = attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (0, 2, 3)
        assert attentions[1].impl.binding is None
        assert [a.impl.binding.layer for a in attentions if a.impl.binding] == [0, 2, 3]
        assert runtime.probe._metadata[attentions[1].layer_name].mean_query is None
        assert runtime.probe._is_routed.tolist() == [True, False, True, True]

    def test_context_layer_with_a_sliding_window(self, tmp_path: Path, rope: Any) -> None:
        """It gets no route, and every router looks at its queries."""
        write(tmp_path, context_layers=(1,), pools=("tail:8",))
        attentions = self.attentions(self.WINDOWED)
        runtime = attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert attentions[1].impl.binding is None
        assert runtime.probe._metadata[attentions[1].layer_name].mean_query.shape == (256, H)
        assert runtime.probe._rotations[0].layers.tolist() == [0, 1, 2, 3]

    def rotating(self, rope: Any, *layers: int) -> Model:
        """Make a model in which only these layers use RoPE."""
        model = Model(self.attentions(), rope, RotatingWhereTold)
        for index, layer in enumerate(reversed(model.layers)):
            layer.self_attn.use_rope = index in layers
        return model

    def test_layers_without_rope_stay_full(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        model = self.rotating(rope, 0, 2)
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (0, 2)
        assert all(layer.self_attn.attn.impl.binding for layer in model.layers)
        assert runtime.probe._is_routed.tolist() == [True, False, True, False]
        assert runtime.probe._rotations[0].layers.tolist() == [0, 2]

    @pytest.mark.parametrize("layer", [0, 1])
    def test_always_sparse_layer_without_rope(self, tmp_path: Path, rope: Any, layer: int) -> None:
        """It would attend FULL while its keys are given back."""
        write(tmp_path, always_sparse=(layer,))
        runner = runner_of(self.rotating(rope, 0, 2))
        if layer == 0:
            attach(runner, make_config(tmp_path), CPU)
            return
        with pytest.raises(RouterCheckpointError) as error:
            attach(runner, make_config(tmp_path), CPU)
        assert str(error.value) == (
            "router: expected always_sparse layers with full attention and RoPE in the model, "
            "and with those whose KV cache they share, found [1] without (trained for "
            "'org/Other'); give this model's own router"
        )

    def shared(self, rope: Any) -> Model:
        """Like Gemma 3n's: the last layers attend to the keys of the last ones before of a kind."""
        kinds = [{"window": 128}, {}, {"window": 128, "owner": 0}, {"owner": 1}]
        return Model([make_attention(i, **kind) for i, kind in enumerate(kinds)], rope)

    def test_layers_that_share_a_kv_cache_take_its_owners_route(
        self, tmp_path: Path, rope: Any
    ) -> None:
        write(tmp_path)
        runtime = attach(runner_of(self.shared(rope)), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (1, 3)
        assert runtime._unread_routes == [OPEN, FULL, OPEN, FULL]
        data = list(runtime.probe._metadata.values())
        assert [d.owner for d in data] == [None, None, data[0], data[1]]
        assert [d.is_shared for d in data] == [True, True, False, False]
        # The sharer's own queries decide nothing.
        assert [d.mean_query is not None for d in data] == [False, True, False, False]
        assert runtime.probe._owners.tolist() == [0, 1, 2, 1]  # layer 2 has no route
        assert runtime.probe._is_routed.tolist() == [False, True, False, True]

    def test_fixed_routes_of_layers_that_share_a_kv_cache(self, tmp_path: Path, rope: Any) -> None:
        flux = STATIC | {"sparse_layers": [1, 3]}
        runtime = attach(runner_of(self.shared(rope)), make_config(tmp_path, flux), CPU)
        assert runtime.fixed_routes == [OPEN, SPARSE, OPEN, SPARSE]
        runtime.fix_routes((1,))
        assert runtime.fixed_routes == [OPEN, SPARSE, OPEN, SPARSE]
        runtime.fix_routes((3,))  # its owner's counts
        assert runtime.fixed_routes == [OPEN, FULL, OPEN, FULL]

    def test_an_owner_alone_brings_its_sharers(self, tmp_path: Path, rope: Any) -> None:
        flux = STATIC | {"sparse_layers": [1]}
        runtime = attach(runner_of(self.shared(rope)), make_config(tmp_path, flux), CPU)
        assert runtime.fixed_routes == [OPEN, SPARSE, OPEN, SPARSE]

    def test_a_sharer_alone_cannot_be_sparse(self, tmp_path: Path, rope: Any) -> None:
        flux = STATIC | {"sparse_layers": [3]}
        with pytest.raises(FluxConfigError) as error:
            attach(runner_of(self.shared(rope)), make_config(tmp_path, flux), CPU)
        assert str(error.value) == (
            "flux config: expected sparse_layers with layer 1, whose KV cache and route layer 3 "
            "shares, found 3 without it; name layer 1"
        )
        write(tmp_path, always_sparse=(3,))
        with pytest.raises(RouterCheckpointError, match=r"KV cache they share, found \[3\]"):
            attach(runner_of(self.shared(rope)), make_config(tmp_path), CPU)

    def test_a_sharer_of_a_sliding_window_has_no_route(self, tmp_path: Path, rope: Any) -> None:
        """Its keys may be gone: vLLM keeps those of the owner's window."""
        write(tmp_path)
        owners = {3: 0}
        model = Model(
            [make_attention(i, {0: 128}.get(i), owner=owners.get(i)) for i in range(L)], rope
        )
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (1, 2)
        assert runtime.probe._is_routed.tolist() == [False, True, True, False]

    def test_fixed_policies_route_layers_without_rope(self, tmp_path: Path, rope: Any) -> None:
        flux = {"policy": "static", "sparse_layers": [1], "sink_tokens": 1, "window_tokens": 2}
        runtime = attach(runner_of(self.rotating(rope, 0, 2)), make_config(tmp_path, flux), CPU)
        assert runtime.routed_layers == (0, 1, 2, 3)

    def test_model_without_rope_is_routed_by_queries_as_they_are(
        self, tmp_path: Path, rope: Any
    ) -> None:
        write(tmp_path)
        runtime = attach(runner_of(self.rotating(rope)), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (0, 1, 2, 3)
        assert runtime.probe._rotations == []
        assert all(data.mean_query is not None for data in runtime.probe._metadata.values())

    def test_rope_beside_sliding_windows_alone(self, tmp_path: Path, rope: Any) -> None:
        """Like Cohere2's: layers that see everything have none."""
        write(tmp_path)
        model = Model(self.attentions({1: 128}), rope, RotatingWhereTold)
        for index, layer in enumerate(reversed(model.layers)):
            layer.self_attn.use_rope = index == 1
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(model), make_config(tmp_path), CPU)
        assert str(error.value) == (
            '--attention-backend flux with policy "router": expected rotary position embeddings '
            "(RoPE) in layers with full attention, found none in Model, whose layers with a "
            "sliding window have them; choose a policy without a router "
            '("full", "sparse", "static")'
        )

    def test_context_layer_without_rope(self, tmp_path: Path, rope: Any) -> None:
        """Nothing is undone there."""
        write(tmp_path, context_layers=(1,), pools=("tail:8",))
        runtime = attach(runner_of(self.rotating(rope, 0, 2)), make_config(tmp_path), CPU)
        assert runtime.probe._rotations[0].layers.tolist() == [0, 2]
        pooled = [data.mean_query is not None for data in runtime.probe._metadata.values()]
        assert pooled == [True, True, True, False]

    def test_static_on_a_sliding_window_layer(self, tmp_path: Path, rope: Any) -> None:
        flux = {"policy": "static", "sparse_layers": [0, 1], "sink_tokens": 1, "window_tokens": 2}
        model = Model(self.attentions(self.WINDOWED), rope)
        with pytest.raises(FluxConfigError) as error:
            attach(runner_of(model), make_config(tmp_path, flux), CPU)
        assert str(error.value) == (
            "flux config: expected sparse_layers with full attention in the model, found [1], "
            "which have none (a sliding window of the model's own, or a state); remove them"
        )

    def test_only_sliding_windows(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        attentions = self.attentions(dict.fromkeys(range(L), 128))
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert str(error.value) == (
            "--attention-backend flux: expected layers with full attention in Model, found none; "
            "serve it without --attention-backend flux"
        )

    def test_queries_of_policy_full_are_quantized_by_vllms_layer(self, tmp_path: Path) -> None:
        """Its calls are then vLLM's own in every bit, also where the layer is compiled."""
        for flux, by_layer in (({"policy": "full"}, True), (STATIC | {"sparse_layers": []}, False)):
            attentions = self.attentions()
            attach(runner_of(Model(attentions, None)), make_config(tmp_path, flux), CPU)
            for attention in attentions:
                assert (attention.query_quant is not None) == by_layer

    def test_fixed_policies_need_no_rope(self, tmp_path: Path) -> None:
        config = make_config(tmp_path, {"policy": "full"})
        attach(runner_of(Model(self.attentions(), None)), config, CPU)

    def test_no_rope(self, tmp_path: Path) -> None:
        write(tmp_path)
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(Model(self.attentions(), None)), make_config(tmp_path), CPU)
        assert str(error.value) == (
            "--attention-backend flux: expected rotary position embeddings (RoPE) as `rotary_emb` "
            "of a layer, or none at all, found others in model.layers.0.self_attn.attn "
            "(SelfAttention); serve this model without --attention-backend flux"
        )

    def test_layer_on_another_backend(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        attentions = [*self.attentions()[:3], make_attention(3, backend="CPU_ATTN")]
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert str(error.value) == (
            "--attention-backend flux: expected all attention layers to use it, found "
            "model.layers.3.self_attn.attn on CPU_ATTN; serve this model without "
            "--attention-backend flux"
        )

    def test_chunked_local_attention(self, tmp_path: Path, rope: Any) -> None:
        """It has no sliding window, a rotary embedding and our backend's name."""
        write(tmp_path)
        attentions = [*self.attentions()[:3], make_attention(3, cls="ChunkedLocalAttention")]
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)
        assert str(error.value) == (
            "--attention-backend flux: expected plain causal attention in every layer, found "
            "ChunkedLocalAttention in model.layers.3.self_attn.attn; serve this model without "
            "--attention-backend flux"
        )

    def test_rope_that_cannot_be_undone(self, tmp_path: Path) -> None:
        write(tmp_path)
        model = Model(self.attentions(), nn.Linear(2, 2))
        with pytest.raises(UnsupportedConfigurationError, match=r"found Linear \(no single table"):
            attach(runner_of(model), make_config(tmp_path), CPU)

    def test_head_dim_of_one_layer(self, tmp_path: Path, rope: Any) -> None:
        """A model whose layers differ is told by the layers themselves."""
        write(tmp_path)
        attentions = [*self.attentions()[:3], make_attention(3, head_size=2 * H)]
        with pytest.raises(RouterCheckpointError, match="expected head_dim 64 .* found 32"):
            attach(runner_of(Model(attentions, rope)), make_config(tmp_path), CPU)

    def test_pattern_of_the_router_or_the_configuration(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path, sparse_pattern="triangle")
        model = Model(self.attentions(), rope)
        pattern = attach(runner_of(model), make_config(tmp_path), CPU).pattern
        assert pattern == make_pattern("triangle", 64, 256, {"tail_tokens": 128})
        flux = {"sparse_pattern": "xattention", "pattern_options": {"stride": 8}}
        pattern = attach(runner_of(model), make_config(tmp_path, flux), CPU).pattern
        assert pattern == make_pattern("xattention", 64, 256, {"stride": 8, "threshold": 0.9})

    def test_the_router_is_there_once(self, tmp_path: Path, rope: Any) -> None:
        def routers() -> dict[int, LayerRouter]:
            gc.collect()
            return {id(one): one for one in gc.get_objects() if isinstance(one, LayerRouter)}

        write(tmp_path)
        before = routers()
        runtime = attach(runner_of(Model(self.attentions(), rope)), make_config(tmp_path), CPU)
        assert list(routers().keys() - before) == [id(runtime.probe._router)]

    def test_fixed_policies_hold_no_router(self, tmp_path: Path, rope: Any) -> None:
        write(tmp_path)
        config = make_config(tmp_path, {"policy": "full"})
        assert attach(runner_of(Model(self.attentions(), rope)), config, CPU).probe is None


@pytest.mark.usefixtures("_one_rank")
def test_a_context_layer_without_attention_is_refused(tmp_path: Path, rope: Any) -> None:
    write(tmp_path, context_layers=(3,), pools=("tail:8",))
    model = Model([make_attention(i) for i in (0, 1, 2)], rope, RotatingWhereTold)
    with pytest.raises(RouterCheckpointError, match=r"context_layers with attention, found \[3\]"):
        attach(runner_of(model), make_config(tmp_path), CPU)
