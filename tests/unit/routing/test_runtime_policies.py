"""What an operator fixes: routes without a router, and the threshold of one, while it runs.

Oracle: routes written down by hand.
"""

import pytest

from flux_vllm.errors import FluxConfigError, UnsupportedConfigurationError
from tests.unit.routing.worker import (
    ANSWERS,
    FULL,
    OPEN,
    ROUTED,
    SPARSE,
    batch,
    make,
    recorded,
    run,
)


class TestFixedRoutes:
    @pytest.mark.parametrize(
        ("config", "routes"),
        [
            ({"policy": "full"}, [FULL, FULL, OPEN, FULL]),
            (
                {"policy": "sparse", "sink_tokens": 1, "window_tokens": 2},
                [SPARSE, SPARSE, OPEN, SPARSE],
            ),
            (
                {
                    "policy": "static",
                    "sparse_layers": (1,),
                    "sink_tokens": 1,
                    "window_tokens": 2,
                },
                [FULL, SPARSE, OPEN, FULL],
            ),
            (
                {"policy": "static", "sparse_layers": (), "sink_tokens": 1, "window_tokens": 2},
                [FULL, FULL, OPEN, FULL],
            ),
        ],
        ids=["full", "sparse", "static-1", "static-none"],
    )
    def test_policy(self, config: dict, routes: list[int]) -> None:
        """Layer 2 keeps a sliding window of its own and has no route."""
        runtime = make(**config)
        assert runtime.fixed_routes == routes
        assert run(runtime, batch(("a", 0, 9, 9), ("b", 0, 3, 8))) == ["a", "b"]
        assert runtime.table.routes[runtime.table.slots(["a", "b"])].tolist() == [routes] * 2
        kept = [routes[layer] for layer in ROUTED]
        assert recorded(runtime) == [(("a", "b"), [kept, kept], [True, True])]
        assert run(runtime, batch(("b", 3, 5, 8)), announced="b") == []

    def test_new_pattern_is_for_all_requests(self) -> None:
        runtime = make("static", sparse_layers=(1,), sink_tokens=1, window_tokens=2)
        run(runtime, batch(("a", 0, 9, 9)))
        runtime.fix_routes((0, 3))
        run(runtime, batch(("a", 9, 1, 9), ("b", 0, 9, 9)))
        assert recorded(runtime)[-1][1] == [[SPARSE, FULL, SPARSE]] * 2

    def test_keys_given_back_fix_them(self) -> None:
        sizes = {"sink_tokens": 1, "window_tokens": 2}
        runtime = make("static", sparse_layers=(1,), free_kv=True, **sizes)
        with pytest.raises(UnsupportedConfigurationError) as error:
            runtime.fix_routes((0, 3))
        assert str(error.value) == (
            'flux_fix_routes: expected an engine without "free_kv", found one that has given back '
            'keys of the layers that were SPARSE; start it without "free_kv"'
        )
        assert runtime.fixed_routes == [FULL, SPARSE, OPEN, FULL]

    def test_router_has_none(self) -> None:
        runtime = make()
        assert runtime.fixed_routes is None
        with pytest.raises(AssertionError):
            runtime.fix_routes((0,))


class TestSetThreshold:
    def test_config_and_probe_follow(self) -> None:
        runtime = make(answers=ANSWERS)
        runtime.set_threshold(0.8)
        assert runtime.config.threshold == 0.8
        assert runtime.probe.thresholds == [0.8]  # type: ignore[union-attr]

    def test_value_out_of_range_changes_nothing(self) -> None:
        runtime = make(answers=ANSWERS)
        with pytest.raises(FluxConfigError, match="expected a number from 0 to 1"):
            runtime.set_threshold(1.5)
        assert runtime.probe.thresholds == []  # type: ignore[union-attr]

    def test_layers_whose_keys_are_given_back_stay_sparse(self) -> None:
        runtime = make(answers=ANSWERS, free_kv=True)
        runtime.set_threshold(0.01)
        with pytest.raises(FluxConfigError, match='a threshold above 0 with "free_kv"'):
            runtime.set_threshold(0)
        assert runtime.config.threshold == 0.01
        assert runtime.probe.thresholds == [0.01]  # type: ignore[union-attr]

    def test_fixed_routes_have_none(self) -> None:
        with pytest.raises(AssertionError, match="the policy is not `router`"):
            make("full").set_threshold(0.5)
