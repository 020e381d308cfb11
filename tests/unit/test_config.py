"""The operator's configuration: what is accepted, and every error by its message.

Oracle: the keys and ranges of docs/CONFIGURATION.md. Pinned: a bool is no whole number (Python
says `isinstance(True, int)`), and `sparse_layers` belongs to policy `static` and to no other.
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from flux_vllm.config import FluxConfig
from flux_vllm.errors import FluxConfigError
from flux_vllm.router.checkpoint import SPARSE_PATTERNS, RouterInfo

INFO = RouterInfo(
    base_model="m", num_layers=4, head_dim=8, pool_tokens=16, sink_tokens=64, window_tokens=512
)

WHOLE = "a whole number of tokens"
LAYERS = "a list of distinct layer indices such as [0, 2, 5]"
POLICIES = "one of ['router', 'full', 'sparse', 'static']"
PATTERNS = f"one of {list(SPARSE_PATTERNS)}"
OPTIONS = 'an object such as {"threshold": 0.9}'
STATIC = {"policy": "static"}
# (entries, key named in the message, what it expected, what it found)
BAD_VALUES = [
    ({"router": 3}, "router", "a path", 3),
    ({"router": ["a"]}, "router", "a path", ["a"]),
    ({"router": True}, "router", "a path", True),
    ({"policy": "dense"}, "policy", POLICIES, "dense"),
    ({"policy": "FULL"}, "policy", POLICIES, "FULL"),
    ({"policy": None}, "policy", POLICIES, None),
    ({"policy": 1}, "policy", POLICIES, 1),
    ({"policy": ["full"]}, "policy", POLICIES, ["full"]),
    ({"threshold": "0.5"}, "threshold", "a number", "0.5"),
    ({"threshold": True}, "threshold", "a number", True),
    ({"threshold": None}, "threshold", "a number", None),
    ({"threshold": -0.01}, "threshold", "a number from 0 to 1", -0.01),
    ({"threshold": 1.01}, "threshold", "a number from 0 to 1", 1.01),
    ({"threshold": float("nan")}, "threshold", "a number from 0 to 1", float("nan")),
    ({"threshold": float("inf")}, "threshold", "a number from 0 to 1", float("inf")),
    ({"sink_tokens": -1}, "sink_tokens", f"a whole number from 0 to {2**30}", -1),
    ({"full_decode_tokens": -1}, "full_decode_tokens", f"a whole number from 0 to {2**30}", -1),
    ({"full_decode_tokens": 8.0}, "full_decode_tokens", WHOLE, 8.0),
    ({"sparse_prefill": 1}, "sparse_prefill", "true or false", 1),
    ({"sink_tokens": 1.0}, "sink_tokens", WHOLE, 1.0),
    ({"sink_tokens": True}, "sink_tokens", WHOLE, True),
    ({"sink_tokens": "128"}, "sink_tokens", WHOLE, "128"),
    ({"window_tokens": 0}, "window_tokens", f"a whole number from 1 to {2**30}", 0),
    ({"window_tokens": 10**30}, "window_tokens", f"a whole number from 1 to {2**30}", 10**30),
    ({"window_tokens": False}, "window_tokens", WHOLE, False),
    ({"window_tokens": 1024.0}, "window_tokens", WHOLE, 1024.0),
    ({"window_tokens": [1024]}, "window_tokens", WHOLE, [1024]),
    ({"sparse_pattern": "Streaming"}, "sparse_pattern", PATTERNS, "Streaming"),
    ({"sparse_pattern": ["streaming"]}, "sparse_pattern", PATTERNS, ["streaming"]),
    ({"pattern_options": 3}, "pattern_options", OPTIONS, 3),
    ({"pattern_options": [0.9]}, "pattern_options", OPTIONS, [0.9]),
    ({"kernels": "cutlass"}, "kernels", "one of ['fa3', 'triton']", "cutlass"),
    ({"kernels": True}, "kernels", "one of ['fa3', 'triton']", True),
    ({"kernels": ["fa3"]}, "kernels", "one of ['fa3', 'triton']", ["fa3"]),
    ({"free_kv": 1}, "free_kv", "true or false", 1),
    ({"free_kv": "true"}, "free_kv", "true or false", "true"),
    ({"free_kv": None}, "free_kv", "true or false", None),
    ({**STATIC, "sparse_layers": 3}, "sparse_layers", LAYERS, 3),
    ({**STATIC, "sparse_layers": "0,1"}, "sparse_layers", LAYERS, "0,1"),
    ({**STATIC, "sparse_layers": {"0": 1}}, "sparse_layers", LAYERS, {"0": 1}),
    ({**STATIC, "sparse_layers": [0, "1"]}, "sparse_layers", LAYERS, [0, "1"]),
    ({**STATIC, "sparse_layers": [0, 1.0]}, "sparse_layers", LAYERS, [0, 1.0]),
    ({**STATIC, "sparse_layers": [True]}, "sparse_layers", LAYERS, [True]),
    ({**STATIC, "sparse_layers": [1, 1]}, "sparse_layers", LAYERS, [1, 1]),
    ({**STATIC, "sparse_layers": [2, -1]}, "sparse_layers", LAYERS, [2, -1]),
    ({**STATIC, "sparse_layers": [[0]]}, "sparse_layers", LAYERS, [[0]]),
]


def read(entries: Any) -> FluxConfig:
    return FluxConfig.from_additional_config({"flux": entries})


def value_id(case: Any) -> str:
    return repr(case)


class TestDefaults:
    def test_values(self) -> None:
        config = FluxConfig()
        assert dataclasses.asdict(config) == {
            "router": None,
            "policy": "router",
            "sparse_layers": None,
            "threshold": 0.5,
            "sink_tokens": None,
            "window_tokens": None,
            "sparse_pattern": None,
            "pattern_options": None,
            "full_decode_tokens": None,
            "sparse_prefill": False,
            "kernels": None,
            "free_kv": False,
        }

    def test_frozen(self) -> None:
        with pytest.raises(dataclasses.FrozenInstanceError):
            FluxConfig().policy = "full"  # type: ignore[misc]

    def test_no_new_attributes(self) -> None:
        assert not hasattr(FluxConfig(), "__dict__")


class TestBadValues:
    @pytest.mark.parametrize(
        ("entries", "key", "expected", "found"),
        BAD_VALUES,
        ids=[f"{key}={found!r}" for _, key, _, found in BAD_VALUES],
    )
    def test_message(self, entries: dict, key: str, expected: str, found: object) -> None:
        with pytest.raises(FluxConfigError) as error:
            read(entries)
        assert str(error.value) == (
            f'flux config: expected {expected} for "{key}", found {found!r}; change it in '
            "--additional-config '{\"flux\": {...}}'"
        )

    @pytest.mark.parametrize(
        "entries",
        [
            {"threshold": 0},
            {"threshold": 1},
            {"threshold": 1.0},
            {"sink_tokens": 0},
            {"window_tokens": 1},
            {"router": "~/r.safetensors", "policy": "sparse"},
            {**STATIC, "sparse_layers": []},
        ],
        ids=value_id,
    )
    def test_edge_of_range_is_accepted(self, entries: dict) -> None:
        config = read(entries)
        for key, value in entries.items():
            found = getattr(config, key)
            assert (list(found) if key == "sparse_layers" else found) == value

    def test_sparse_layers_are_sorted_and_hashable(self) -> None:
        assert read({**STATIC, "sparse_layers": [5, 0, 2]}).sparse_layers == (0, 2, 5)

    def test_error_is_a_value_error(self) -> None:
        assert issubclass(FluxConfigError, ValueError)


class TestContradictions:
    @pytest.mark.parametrize("policy", ["router", "full", "sparse"])
    @pytest.mark.parametrize("layers", [[0, 1], []], ids=["some-layers", "no-layers"])
    def test_sparse_layers_without_static(self, policy: str, layers: list[int]) -> None:
        with pytest.raises(FluxConfigError) as error:
            read({"policy": policy, "sparse_layers": layers})
        assert str(error.value) == (
            'flux config: expected "sparse_layers" together with "policy": "static" and only '
            f"then, found policy '{policy}' and sparse_layers {layers}; "
            'set "policy": "static" or drop it'
        )

    def test_static_without_sparse_layers(self) -> None:
        with pytest.raises(FluxConfigError) as error:
            read({"policy": "static"})
        assert str(error.value) == (
            'flux config: expected "sparse_layers" together with "policy": "static" and only '
            "then, found policy 'static' and sparse_layers None; add \"sparse_layers\""
        )

    def test_free_kv_with_policy_full(self) -> None:
        with pytest.raises(FluxConfigError) as error:
            read({"policy": "full", "free_kv": True})
        assert str(error.value) == (
            'flux config: expected a policy with SPARSE layers together with "free_kv", found '
            "policy 'full', which reads every key again; drop \"free_kv\" or change the policy"
        )

    @pytest.mark.parametrize("threshold", [0, 0.0])
    def test_free_kv_with_threshold_0(self, threshold: float) -> None:
        with pytest.raises(FluxConfigError) as error:
            read({"free_kv": True, "threshold": threshold})
        assert str(error.value) == (
            "flux config: expected a threshold above 0 with \"free_kv\" and policy 'router', found "
            '0, which makes every layer FULL; raise it, or drop "free_kv"'
        )
        assert read({"free_kv": True, "threshold": 0.01}).free_kv
        static = {**STATIC, "sparse_layers": [0], "free_kv": True, "threshold": threshold}
        assert read(static).free_kv


class TestLayers:
    @pytest.mark.parametrize(
        ("layers", "beyond"),
        [([4], [4]), ([0, 3, 5, 9], [5, 9])],
        ids=["first-beyond", "some-beyond"],
    )
    def test_out_of_range(self, layers: list[int], beyond: list[int]) -> None:
        config = read({**STATIC, "sparse_layers": layers})
        with pytest.raises(FluxConfigError) as error:
            config.check_layers(4)
        assert str(error.value) == (
            "flux config: expected sparse_layers from 0 to 3 (the model has 4 layers), found "
            f"{beyond}; remove them"
        )

    @pytest.mark.parametrize("layers", [[], [0], [3], [0, 1, 2, 3]], ids=value_id)
    def test_in_range(self, layers: list[int]) -> None:
        read({**STATIC, "sparse_layers": layers}).check_layers(4)

    def test_other_policies_have_none_to_check(self) -> None:
        read({"policy": "full"}).check_layers(1)


class TestAdditionalConfig:
    @pytest.mark.parametrize(
        "given",
        [{}, {"flux": {}}, {"gdn_prefill_backend": "x"}, None, 3, "flux"],
        ids=value_id,
    )
    def test_no_entry_means_defaults(self, given: object) -> None:
        assert FluxConfig.from_additional_config(given) == FluxConfig()

    def test_others_entries_are_left_alone(self) -> None:
        given = {"gdn_prefill_backend": 1, "flux": {"policy": "full"}}
        assert FluxConfig.from_additional_config(given) == FluxConfig(policy="full")

    def test_an_object_passes_through(self) -> None:
        config = FluxConfig(policy="sparse", sink_tokens=1, window_tokens=2)
        assert FluxConfig.from_additional_config({"flux": config}) is config

    def test_all_keys(self) -> None:
        entries = {
            "router": "r",
            "policy": "static",
            "sparse_layers": [1],
            "threshold": 0.25,
            "sink_tokens": 3,
            "window_tokens": 4,
            "sparse_pattern": "streaming",
            "pattern_options": {"an_option": 0.5},
            "full_decode_tokens": 8,
            "sparse_prefill": True,
            "kernels": "triton",
            "free_kv": True,
        }
        found = dataclasses.asdict(read(entries))
        assert found == {**entries, "sparse_layers": (1,)}

    @pytest.mark.parametrize("entries", ["full", None, ["policy", "full"], 3, True], ids=value_id)
    def test_entry_of_wrong_type(self, entries: object) -> None:
        with pytest.raises(FluxConfigError) as error:
            read(entries)
        assert str(error.value) == (
            '--additional-config: expected an object under "flux", such as '
            f'{{"flux": {{"policy": "full"}}}}, found {entries!r}'
        )

    @pytest.mark.parametrize(
        ("entries", "unknown"),
        [
            ({"polcy": "full"}, ["polcy"]),
            ({"policy": "full", "Sink_tokens": 1, "block_size": 2}, ["Sink_tokens", "block_size"]),
            ({"flux": {"policy": "full"}}, ["flux"]),
            ({3: 4}, [3]),
        ],
        ids=value_id,
    )
    def test_unknown_keys(self, entries: dict, unknown: list) -> None:
        with pytest.raises(FluxConfigError) as error:
            read(entries)
        keys = [field.name for field in dataclasses.fields(FluxConfig)]
        assert str(error.value) == (
            f"flux config: expected keys among {keys}, found {unknown}; remove or correct them"
        )

    @pytest.mark.parametrize(
        ("given", "misplaced"),
        [
            ({"policy": "full"}, ["policy"]),
            ({"flux": {}, "threshold": 0.2, "router": "r"}, ["threshold", "router"]),
        ],
        ids=value_id,
    )
    def test_keys_beside_flux(self, given: dict, misplaced: list[str]) -> None:
        """They would be passed over in silence."""
        with pytest.raises(FluxConfigError) as error:
            FluxConfig.from_additional_config(given)
        assert str(error.value) == (
            f'--additional-config: expected {misplaced} inside "flux", found them beside it; '
            f'write {{"flux": {{"{misplaced[0]}": ...}}}}'
        )


class TestRouterPath:
    def test_default_is_the_models_folder(self) -> None:
        assert FluxConfig().router_path("/models/m") == Path("/models/m")

    def test_given_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HOME", "/home/u")
        config = FluxConfig(router="~/routers/r.safetensors")
        assert config.router_path("/models/m") == Path("/home/u/routers/r.safetensors")

    @pytest.mark.parametrize("policy", ["router", "full", "sparse"])
    def test_needs_router(self, policy: str) -> None:
        assert FluxConfig(policy=policy).needs_router == (policy == "router")
        assert not FluxConfig(policy="static", sparse_layers=()).needs_router


class TestWindow:
    @pytest.mark.parametrize("policy", ["router", "full", "sparse"])
    def test_the_routers_own(self, policy: str) -> None:
        assert FluxConfig(policy=policy).window(INFO) == (64, 512)

    @pytest.mark.parametrize(
        ("given", "expected"),
        [
            ({"sink_tokens": 0}, (0, 512)),
            ({"window_tokens": 1}, (64, 1)),
            ({"sink_tokens": 7, "window_tokens": 9}, (7, 9)),
        ],
        ids=value_id,
    )
    def test_the_operators_wins(self, given: dict, expected: tuple[int, int]) -> None:
        assert FluxConfig(**given).window(INFO) == expected
        assert FluxConfig(policy="sparse", **given).window(INFO) == expected

    def test_full_without_router_needs_none(self) -> None:
        sink, window = FluxConfig(policy="full").window(None)
        assert sink >= 0
        assert window >= 1

    @pytest.mark.parametrize("policy", ["sparse", "static"])
    @pytest.mark.parametrize("given", [{}, {"sink_tokens": 0}, {"window_tokens": 8}], ids=value_id)
    def test_neither_says(self, policy: str, given: dict) -> None:
        layers = {"sparse_layers": (0,)} if policy == "static" else {}
        config = FluxConfig(policy=policy, **layers, **given)
        expected = (
            f'flux config: expected "sink_tokens" and "window_tokens" with policy {policy!r} and '
            f"no router to take them from, found sink_tokens {given.get('sink_tokens')} and "
            f"window_tokens {given.get('window_tokens')}; add both"
        )
        with pytest.raises(FluxConfigError, match="^" + re.escape(expected)):
            config.window(None)

    def test_sparse_prefill_is_not_of_policy_full(self) -> None:
        with pytest.raises(FluxConfigError, match='use "policy": "static" with "sparse_layers": '):
            FluxConfig(policy="full", sparse_prefill=True)
        assert FluxConfig(policy="static", sparse_layers=(), sparse_prefill=True).sparse_prefill

    def test_full_decode_tokens(self) -> None:
        trained = dataclasses.replace(INFO, full_decode_tokens=32)
        assert FluxConfig().full_decode(None) == 0
        assert FluxConfig().full_decode(trained) == 32
        assert FluxConfig(full_decode_tokens=0).full_decode(trained) == 0
        assert FluxConfig(full_decode_tokens=8).full_decode(trained) == 8

    def test_both_given_need_no_router(self) -> None:
        assert FluxConfig(policy="sparse", sink_tokens=0, window_tokens=5).window(None) == (0, 5)
