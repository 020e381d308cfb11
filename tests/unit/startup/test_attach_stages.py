"""Attaching on the first of two pipeline stages: what it takes from the other, and what is refused.

Oracle: the messages, and the layers written down by hand; what the other stage says is made up.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flux_vllm.errors import FluxConfigError, RouterCheckpointError, UnsupportedConfigurationError
from flux_vllm.startup.attach import attach
from tests.unit.startup.fakes import (
    CPU,
    Model,
    RotatingWhereTold,
    make_attention,
    make_config,
    runner_of,
    write,
)

pytestmark = pytest.mark.vllm


class TestStages:
    """The first of two pipeline stages, which has half of the layers."""

    STATIC = {"policy": "static", "sparse_layers": [1, 2], "sink_tokens": 1, "window_tokens": 2}

    @pytest.fixture(autouse=True)
    def _first_of_two(self, _one_rank: None, monkeypatch: pytest.MonkeyPatch) -> None:
        stage = SimpleNamespace(world_size=2, is_first_rank=True, cpu_group=None)
        monkeypatch.setattr("vllm.distributed.get_pp_group", lambda: stage)

    def other_stage_says(self, monkeypatch: pytest.MonkeyPatch, *answers: list) -> None:
        """Let the second stage, which has full attention, answer what this one's calls gather."""
        left = [[True], *answers]

        def gather(parts: list, own: list, group: None) -> None:
            parts[:] = own, left.pop(0)

        monkeypatch.setattr("torch.distributed.all_gather_object", gather)

    def model(self, rope: Any, rotating: bool = True) -> Model:
        model = Model([make_attention(i) for i in range(2)], rope, RotatingWhereTold)
        for layer in model.layers:
            layer.self_attn.use_rope = rotating
        return model

    @pytest.mark.parametrize(("here", "without"), [(True, 1), (False, 0)])
    def test_a_stage_without_full_attention(
        self, tmp_path: Path, rope: Any, monkeypatch: Any, here: bool, without: int
    ) -> None:
        """Both stages are refused, whichever has none."""
        monkeypatch.setattr(
            "torch.distributed.all_gather_object",
            lambda parts, own, group: parts.__setitem__(slice(None), [own, [not here]]),
        )
        attentions = [make_attention(i, None if here else 64) for i in range(2)]
        model = Model(attentions, rope)
        with pytest.raises(UnsupportedConfigurationError) as error:
            attach(runner_of(model), make_config(tmp_path, {"policy": "full"}), CPU)
        assert str(error.value) == (
            "--attention-backend flux: expected layers with full attention on every pipeline "
            f"stage, found none of Model on [{without}] of 2; choose a smaller "
            "--pipeline-parallel-size, or serve it without --attention-backend flux"
        )

    def test_routes_of_all_layers(self, tmp_path: Path, rope: Any, monkeypatch: Any) -> None:
        write(tmp_path)
        self.other_stage_says(monkeypatch, [True], [(3, 3)], [3])
        model = self.model(rope)
        runtime = attach(runner_of(model), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (0, 1, 3)
        assert runtime.probe._is_routed.tolist() == [True, True, False, True]
        assert len(runtime.probe._metadata) == 2  # of the layers that are here
        bindings = [layer.self_attn.attn.impl.binding.layer for layer in model.layers]
        assert sorted(bindings) == [0, 1]

    @pytest.mark.parametrize("there", [[2, 3], [2]], ids=["has it", "has a state instead"])
    def test_a_context_layer_of_another_stage(
        self, tmp_path: Path, rope: Any, monkeypatch: Any, there: list[int]
    ) -> None:
        """Read from that stage's attention, or refused: nothing would be read but zeros."""
        write(tmp_path, context_layers=(3,), pools=("tail:8",))
        self.other_stage_says(monkeypatch, [True], [(n, n) for n in there], there)
        if there == [2, 3]:
            runtime = attach(runner_of(self.model(rope)), make_config(tmp_path), CPU)
            assert runtime.routed_layers == (0, 1, 2, 3)
            return
        with pytest.raises(RouterCheckpointError, match=r"layers with attention, found \[3\]"):
            attach(runner_of(self.model(rope)), make_config(tmp_path), CPU)

    def test_sparse_layers_of_another_stage(
        self, tmp_path: Path, rope: Any, monkeypatch: Any
    ) -> None:
        self.other_stage_says(monkeypatch, [(2, 2), (3, 3)])
        config = make_config(tmp_path, self.STATIC)
        runtime = attach(runner_of(self.model(rope)), config, CPU)
        assert runtime.fixed_routes == [1, 0, 0, 1]

    def test_sparse_layer_that_no_stage_has(
        self, tmp_path: Path, rope: Any, monkeypatch: Any
    ) -> None:
        self.other_stage_says(monkeypatch, [(3, 3)])
        with pytest.raises(FluxConfigError, match=r"found \[2\], which have none"):
            attach(runner_of(self.model(rope)), make_config(tmp_path, self.STATIC), CPU)

    def test_layers_without_rope_beside_a_stage_with_it(
        self, tmp_path: Path, rope: Any, monkeypatch: Any
    ) -> None:
        """One stage alone would take them for a model without any."""
        write(tmp_path)
        self.other_stage_says(monkeypatch, [True], [(2, 2), (3, 3)], [2, 3])
        runtime = attach(runner_of(self.model(rope, rotating=False)), make_config(tmp_path), CPU)
        assert runtime.routed_layers == (2, 3)
