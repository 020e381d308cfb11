"""What is compared: attention backends, and flux under fixed routes or a router's.

A variant is written `[LABEL=]SPEC`:

    flash_attn            vLLM's own backend (cpu_attn on a CPU)
    full, sparse          flux with all layers FULL, all SPARSE
    static:0-3,7          flux with these layers SPARSE
    router:PATH@0.3,0.5   flux with the router of this file or folder, at one or more thresholds

Variants of one backend and router share an engine: routes and thresholds are switched while it
runs.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

BASELINES: Final = ("flash_attn", "cpu_attn")
_FORMS: Final = (
    "flash_attn, cpu_attn, full, sparse, static:LAYERS such as static:0-3,7, or "
    "router:PATH@THRESHOLDS such as router:runs/a@0.3,0.5"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way to attend."""

    label: str
    policy: str
    """One of `BASELINES`, `full`, `sparse`, `static`, `router`."""
    layers: tuple[int, ...] | None = None
    """SPARSE ones, of policy `static`."""
    router: str | None = None
    """Its file or folder, of policy `router`."""
    threshold: float | None = None
    seed: int | None = None
    """Of the router's training."""

    @property
    def engine(self) -> str:
        """Name the engine that it needs; variants of the same name can share one."""
        if self.policy in BASELINES:
            return self.policy
        return f"router:{self.router}" if self.policy == "router" else "fixed"

    def sparse_layers(self, num_layers: int) -> list[int]:
        """Return the SPARSE layers of a policy with fixed routes."""
        if self.policy == "static":
            return list(self.layers or ())
        return list(range(num_layers)) if self.policy == "sparse" else []


def parse_variants(texts: Sequence[str], seed: int | None = None) -> list[Variant]:
    """Read variants as they are written on the command line.

    Args:
        texts: `[LABEL=]SPEC` each.
        seed: of the routers' training.

    Raises: ValueError: another form, or two of the same label.
    """
    found = [variant for text in texts for variant in _parse(text, seed)]
    labels = [variant.label for variant in found]
    twice = sorted({label for label in labels if labels.count(label) > 1})
    if twice:
        raise ValueError(f"expected different labels, found {twice} twice; write LABEL=SPEC")
    return found


def _parse(text: str, seed: int | None) -> list[Variant]:
    match = re.fullmatch(r"(?:(?P<label>[\w.-]+)=)?(?P<kind>\w+)(?::(?P<rest>.+))?", text)
    label, kind, rest = match.group("label", "kind", "rest") if match else (None, "", None)
    if kind in (*BASELINES, "full", "sparse") and rest is None:
        return [Variant(label=label or kind, policy=kind)]
    if kind == "static" and rest and re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", rest):
        layers = _layers(rest)
        name = label or f"static{len(layers)}"
        return [Variant(label=name, policy=kind, layers=layers)]
    if kind == "router" and rest and re.fullmatch(r"[^@]+@[\d.]+(,[\d.]+)*", rest):
        path, _, thresholds = rest.rpartition("@")
        name = label or Path(path).stem
        return [
            Variant(
                label=f"{name}-t{float(threshold):g}",
                policy=kind,
                router=str(Path(path).absolute()),
                threshold=float(threshold),
                seed=seed,
            )
            for threshold in thresholds.split(",")
        ]
    raise ValueError(f"expected a variant such as {_FORMS}, found {text!r}")


def _layers(text: str) -> tuple[int, ...]:
    layers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        layers.update(range(int(first), int(last or first) + 1))
    return tuple(sorted(layers))


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How engines are started, all of them alike."""

    model: Path
    dtype: str = "bfloat16"
    max_model_len: int = 32768
    chunk: int = 8192
    max_num_seqs: int = 64
    kv_gib: float | None = None
    """Of the KV cache; None: what vLLM finds free."""
    runner: str = "v2"
    """vLLM's model runner, `v1` or `v2`."""
    flux: dict[str, Any] = field(default_factory=dict)
    """Of every flux engine, beside policy, router and threshold."""
    arguments: tuple[str, ...] = ()
    """Further ones of `vllm serve`."""


SERVED_NAME: Final = "measured"


def server_arguments(
    options: EngineOptions, variants: Sequence[Variant], forces_tokens: bool
) -> list[str]:
    """Return what follows `vllm serve` for variants that share an engine.

    Args:
        options: of all engines.
        variants: which it answers for.
        forces_tokens: whether answers will be teacher-forced.
    """
    first = variants[0]
    is_baseline = first.policy in BASELINES
    arguments = [
        *(str(options.model), "--served-model-name", SERVED_NAME, "--dtype", options.dtype),
        *("--attention-backend", first.policy.upper() if is_baseline else "flux"),
        *("--max-model-len", str(options.max_model_len)),
        *("--max-num-batched-tokens", str(options.chunk)),
        *("--max-num-seqs", str(options.max_num_seqs)),
        # Else a prompt's routes would depend on which prompts came before.
        *("--no-enable-prefix-caching", "--generation-config", "vllm"),
    ]
    if options.kv_gib is not None:
        # Nothing is measured then; the share is what has to be free at start.
        arguments += ["--kv-cache-memory-bytes", str(int(options.kv_gib * 2**30))]
        arguments += ["--gpu-memory-utilization", "0.05"]
    if forces_tokens:
        name = {"v1": "ForcedTokensV1", "v2": "ForcedTokensV2"}[options.runner]
        arguments += ["--logits-processors", f"benchmarks.forced_tokens:{name}"]
    if not is_baseline:
        config = {"flux": flux_config(options, variants)}
        arguments += ["--additional-config", json.dumps(config)]
        arguments += ["--worker-extension-cls", "benchmarks.real_tasks.worker.SettlingWorker"]
    return [*arguments, *options.arguments]


def flux_config(options: EngineOptions, variants: Sequence[Variant]) -> dict[str, Any]:
    """Return the flux configuration that an engine starts with."""
    first = variants[0]
    own: dict[str, Any]
    if first.policy == "router":
        own = {"policy": "router", "router": first.router, "threshold": first.threshold}
    else:
        own = {"policy": "static", "sparse_layers": list(first.layers or ())}
    return options.flux | own
