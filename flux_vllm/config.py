"""The operator's configuration, `--additional-config '{"flux": {...}}'`, checked at start."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from flux_vllm.errors import FluxConfigError
from flux_vllm.router.checkpoint import SPARSE_PATTERNS, RouterInfo
from flux_vllm.router.route import DEFAULT_THRESHOLD

ADDITIONAL_CONFIG_KEY = "flux"
POLICIES = ("router", "full", "sparse", "static")
KERNELS = ("fa3", "triton")
_MOST_TOKENS = 2**30  # sums of two still fit the kernels' int32


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxConfig:
    """What the operator asked for.

    Raises: FluxConfigError: unknown key, wrong type, value out of range, or keys that contradict
        each other.
    """

    router: str | None = None
    """Router file, or a folder that holds one; default: the one beside the model's weights."""
    policy: str = "router"
    """`router`: each request's routes from the Layer Router; `full` and `sparse`: the same for
    all layers; `static`: SPARSE in `sparse_layers`, FULL elsewhere."""
    sparse_layers: tuple[int, ...] | None = None
    """Layer indices, for policy `static` only."""
    threshold: float = DEFAULT_THRESHOLD
    """A layer is FULL where P(FULL) >= threshold; lower is more exact, higher is faster."""
    sink_tokens: int | None = None
    """First tokens a SPARSE layer attends to; default: what the router was trained with."""
    window_tokens: int | None = None
    """Latest tokens a SPARSE layer attends to, the query's own included; default likewise."""
    sparse_pattern: str | None = None
    """What SPARSE means in prefill, one of `SPARSE_PATTERNS`; default: what the router was trained
    with, else `streaming`."""
    pattern_options: Mapping[str, object] | None = field(default=None, hash=False)
    """Of the sparse pattern, each with a default of its own."""
    full_decode_tokens: int | None = None
    """First tokens of an answer for which SPARSE layers attend to everything; default: what the
    router was trained with, else 0."""
    sparse_prefill: bool = False
    """Whether every routed layer computes prompts as SPARSE; its route is then of decode alone."""
    kernels: str | None = None
    """On CUDA: `fa3` or `triton`; default FlashAttention-3 where it runs, else Triton."""
    free_kv: bool = False
    """Whether SPARSE layers give their KV blocks back while requests run."""

    def __post_init__(self) -> None:
        _check_type("router", self.router, str, "a path")
        _check_type("policy", self.policy, str, f"one of {list(POLICIES)}", optional=False)
        if self.policy not in POLICIES:
            raise _error("policy", f"one of {list(POLICIES)}", self.policy)
        _check_type("threshold", self.threshold, (int, float), "a number", optional=False)
        if not 0 <= self.threshold <= 1:
            raise _error("threshold", "a number from 0 to 1", self.threshold)
        for name, least in (("sink_tokens", 0), ("window_tokens", 1), ("full_decode_tokens", 0)):
            value = getattr(self, name)
            _check_type(name, value, int, "a whole number of tokens")
            if value is not None and not least <= value <= _MOST_TOKENS:
                raise _error(name, f"a whole number from {least} to {_MOST_TOKENS}", value)
        patterns = list(SPARSE_PATTERNS)
        _check_type("sparse_pattern", self.sparse_pattern, str, f"one of {patterns}")
        if self.sparse_pattern is not None and self.sparse_pattern not in patterns:
            raise _error("sparse_pattern", f"one of {patterns}", self.sparse_pattern)
        expected = 'an object such as {"threshold": 0.9}'
        _check_type("pattern_options", self.pattern_options, Mapping, expected)
        if self.kernels is not None and self.kernels not in KERNELS:
            raise _error("kernels", f"one of {list(KERNELS)}", self.kernels)
        self._check_full_policy()
        self._check_free_kv()
        self._check_sparse_layers()

    def _check_full_policy(self) -> None:
        if not isinstance(self.sparse_prefill, bool):
            raise _error("sparse_prefill", "true or false", self.sparse_prefill)
        if self.sparse_prefill and self.policy == "full":
            raise FluxConfigError(
                "flux config: expected a policy other than 'full' with \"sparse_prefill\", found "
                "'full', which is vLLM's own attention; for prompts under SPARSE and decode under "
                'FULL use "policy": "static" with "sparse_layers": []'
            )

    def _check_free_kv(self) -> None:
        """Refuse what makes layers FULL for every request: then nothing can be given back."""
        if not isinstance(self.free_kv, bool):
            raise _error("free_kv", "true or false", self.free_kv)
        if self.free_kv and self.policy == "full":
            raise FluxConfigError(
                'flux config: expected a policy with SPARSE layers together with "free_kv", found '
                "policy 'full', which reads every key again; drop \"free_kv\" or change the policy"
            )
        if self.free_kv and self.policy == "router" and self.threshold == 0:
            raise FluxConfigError(
                "flux config: expected a threshold above 0 with \"free_kv\" and policy 'router', "
                'found 0, which makes every layer FULL; raise it, or drop "free_kv"'
            )

    def _check_sparse_layers(self) -> None:
        layers = self.sparse_layers
        if layers is not None:
            expected = "a list of distinct layer indices such as [0, 2, 5]"
            _check_type("sparse_layers", layers, (list, tuple), expected)
            indices = [i for i in layers if isinstance(i, int) and not isinstance(i, bool)]
            if (
                len(indices) != len(layers)
                or len(set(layers)) != len(layers)
                or min(indices, default=0) < 0
            ):
                raise _error("sparse_layers", expected, list(layers))
            object.__setattr__(self, "sparse_layers", tuple(sorted(layers)))
        if (layers is not None) != (self.policy == "static"):
            raise FluxConfigError(
                'flux config: expected "sparse_layers" together with "policy": "static" and only '
                f"then, found policy {self.policy!r} and sparse_layers {layers!r}; "
                + ('add "sparse_layers"' if layers is None else 'set "policy": "static" or drop it')
            )

    @classmethod
    def from_additional_config(cls, additional_config: object) -> "FluxConfig":
        """Read the `flux` entry of vLLM's `additional_config`.

        Args:
            additional_config: a mapping, or whatever else the user gave to vLLM.

        Returns: FluxConfig, all defaults where there is no `flux` entry.
        """
        if not isinstance(additional_config, Mapping):
            return cls()
        known = [known.name for known in fields(cls)]
        misplaced = [key for key in additional_config if key in known]
        if misplaced:
            raise FluxConfigError(
                f'--additional-config: expected {misplaced} inside "flux", found them beside it; '
                f'write {{"flux": {{"{misplaced[0]}": ...}}}}'
            )
        given = additional_config.get(ADDITIONAL_CONFIG_KEY, {})
        if isinstance(given, cls):
            return given
        if not isinstance(given, Mapping):
            raise FluxConfigError(
                '--additional-config: expected an object under "flux", such as '
                f'{{"flux": {{"policy": "full"}}}}, found {given!r}'
            )
        unknown = [key for key in given if key not in known]
        if unknown:
            raise FluxConfigError(
                f"flux config: expected keys among {known}, found {unknown}; remove or correct them"
            )
        return cls(**given)

    @property
    def needs_router(self) -> bool:
        """Whether this policy cannot run without a router checkpoint."""
        return self.policy == "router"

    def router_path(self, model: str) -> Path:
        """Return where the router is looked for: the given place, or beside the model."""
        return Path(self.router if self.router is not None else model).expanduser()

    def window(self, info: RouterInfo | None) -> tuple[int, int]:
        """Settle (sink_tokens, window_tokens) from this config and the router's own.

        Raises: FluxConfigError: neither says, and the policy has SPARSE layers.
        """
        sink, window = self.sink_tokens, self.window_tokens
        if info is not None:
            sink = info.sink_tokens if sink is None else sink
            window = info.window_tokens if window is None else window
        if self.policy == "full":
            return sink or 0, window or 1
        if sink is None or window is None:
            raise FluxConfigError(
                f'flux config: expected "sink_tokens" and "window_tokens" with policy '
                f"{self.policy!r} and no router to take them from, found sink_tokens {sink} and "
                f'window_tokens {window}; add both, such as "sink_tokens": 128, '
                '"window_tokens": 1024'
            )
        return sink, window

    def full_decode(self, info: RouterInfo | None) -> int:
        """Settle `full_decode_tokens` from this config and the router's own."""
        if self.full_decode_tokens is not None:
            return self.full_decode_tokens
        return 0 if info is None else info.full_decode_tokens

    def pattern_name(self, info: RouterInfo | None) -> str:
        """Settle the sparse pattern from this config and the router's own."""
        if self.sparse_pattern is not None:
            return self.sparse_pattern
        return SPARSE_PATTERNS[0] if info is None else info.sparse_pattern

    def check_layers(self, num_layers: int) -> None:
        """Check `sparse_layers` against the model.

        Raises: FluxConfigError: an index the model does not have.
        """
        beyond = [i for i in self.sparse_layers or () if i >= num_layers]
        if beyond:
            raise FluxConfigError(
                f"flux config: expected sparse_layers from 0 to {num_layers - 1} (the model has "
                f"{num_layers} layers), found {beyond}; remove them"
            )


def _check_type(
    name: str,
    value: object,
    kinds: type | tuple[type, ...],
    expected: str,
    optional: bool = True,
) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise _error(name, expected, value)


def _error(name: str, expected: str, found: object) -> FluxConfigError:
    return FluxConfigError(
        f'flux config: expected {expected} for "{name}", found {found!r}; change it in '
        "--additional-config '{\"flux\": {...}}'"
    )
