"""Read and write a router file, the routers of one model's layers."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from flux_vllm.errors import RouterCheckpointError
from flux_vllm.router.inputs import RouterInputs, parse_inputs
from flux_vllm.router.model import LayerRouter, linear_shapes, paper_widths
from flux_vllm.router.place import ROUTER_FILE_NAME, locate_router

FORMAT_VERSIONS = ("1", "2")
"""Written and read. The second names pools, context layers and widths; in the first there is one
pool, and sizes are the paper's."""
SPARSE_PATTERNS = ("streaming", "triangle", "xattention")
"""What SPARSE may mean in prefill; docs/PATTERNS.md. The first is meant where nothing is said."""

# Least and most. A file is checked against them before anything of its sizes is made; models of
# today have up to 126 layers and a head_dim of 512.
_BOUNDS = {
    "num_layers": (1, 1024),
    "head_dim": (1, 4096),
    "pool_tokens": (1, 2**30),
    "sink_tokens": (0, 2**30),
    "window_tokens": (1, 2**30),
    "full_decode_tokens": (0, 2**30),
}
_ABSENT = {"full_decode_tokens": "0"}
"""What files say that are older than a field."""
_LISTS = ("pools", "context_layers", "widths", "always_sparse", "freeing_order")
"""Fields that are written where they are not empty."""
_MOST_ENTRIES = 1024
_Entry = TypeVar("_Entry", str, int)
_MOST_INPUTS = 2**20
"""Of a router's numbers, in or out of a linear layer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInfo:
    """What a router file says of itself (its metadata)."""

    base_model: str
    """Name of the model the router was trained for; information only."""
    num_layers: int
    head_dim: int
    pool_tokens: int
    """Prompt tokens pooled at an end of the prompt."""
    sink_tokens: int
    """First tokens a SPARSE layer always attends to."""
    window_tokens: int
    """Latest tokens a SPARSE layer attends to, the query's own included."""
    sparse_pattern: str = "streaming"
    pool_prefix: bool = True
    """Whether the prompt's first tokens are pooled, beside its latest."""
    probe: tuple[int, ...] = (128, 128)
    """Tokens of a prompt's head and tail that the router's probe runs over."""
    pools: tuple[str, ...] = ()
    """What is pooled, as `Pool` reads it; empty: the one pool that pool_tokens and pool_prefix
    name."""
    context_layers: tuple[int, ...] = ()
    """Layers whose pooled queries every router sees beside its own layer's."""
    widths: tuple[int, ...] = ()
    """Outputs of a router's first four linear layers; empty: the paper's."""
    full_decode_tokens: int = 0
    """First tokens of an answer for which SPARSE layers attend to everything."""
    always_sparse: tuple[int, ...] = ()
    """Layers that are SPARSE for every request, whatever their routers' tensors say."""
    freeing_order: tuple[int, ...] = ()
    """All layers, those first that are seldom FULL: how `free_kv` puts them into KV cache groups.
    Empty: not known."""
    provenance: dict[str, object] = field(default_factory=dict)
    """How it was trained: time, versions, data, arguments."""

    @property
    def inputs(self) -> RouterInputs:
        """What the routers look at.

        Raises: ValueError: the fields make no inputs.
        """
        pools = self.pools or (f"{'ends' if self.pool_prefix else 'tail'}:{self.pool_tokens}",)
        probe = self.probe
        if not self.pools:  # a file older than probes pools what it always pooled
            probe = tuple(max(end, self.pool_tokens) for end in probe)
        return parse_inputs(pools, probe, self.context_layers)

    @property
    def format_version(self) -> str:
        """The oldest format that can say it."""
        return FORMAT_VERSIONS[bool(self.pools or self.context_layers or self.widths)]

    def make_router(self) -> LayerRouter:
        """Make routers of the sizes that this describes, with random weights."""
        return LayerRouter(self.num_layers, self.head_dim, self.inputs.vectors, self.widths)

    def to_metadata(self) -> dict[str, str]:
        """Return the safetensors metadata, strings only."""
        metadata = {name: str(getattr(self, name)) for name in _BOUNDS}
        return metadata | {
            "format_version": self.format_version,
            "base_model": self.base_model,
            "sparse_pattern": self.sparse_pattern,
            "provenance": json.dumps(self.provenance, sort_keys=True),
            **({} if self.pool_prefix else {"pool_prefix": "false"}),
            "probe": json.dumps(self.probe),
            **{name: json.dumps(found) for name in _LISTS if (found := getattr(self, name))},
        }

    @classmethod
    def from_metadata(cls, metadata: dict[str, str], path: Path) -> "RouterInfo":
        """Parse and check the metadata of the file at `path`."""
        version = metadata.get("format_version")
        if version not in FORMAT_VERSIONS:
            raise RouterCheckpointError(
                f"{path}: expected format_version {' or '.join(FORMAT_VERSIONS)} in the metadata, "
                f"found {version!r}; "
                + (
                    "this is not a Flux-vLLM router file, write one with `python -m training`"
                    if version is None
                    else "use the Flux-vLLM version that wrote this file"
                )
            )
        numbers = {name: _integer(_ABSENT | metadata, name, path) for name in _BOUNDS}
        if metadata.get("sparse_pattern") not in SPARSE_PATTERNS:
            raise RouterCheckpointError(
                f"{path}: expected sparse_pattern to be one of {list(SPARSE_PATTERNS)}, found "
                f"{metadata.get('sparse_pattern')!r}; retrain the router for a supported pattern"
            )
        try:
            provenance = json.loads(metadata.get("provenance", "{}"))
        except json.JSONDecodeError as error:
            raise RouterCheckpointError(
                f"{path}: expected JSON in the metadata field 'provenance', found text that does "
                f"not parse ({error}); write the file again"
            ) from error
        if not isinstance(provenance, dict):
            raise RouterCheckpointError(
                f"{path}: expected a JSON object in the metadata field 'provenance', found "
                f"{_shortened(provenance)}; write the file again"
            )
        pool_prefix = metadata.get("pool_prefix", "true")
        if pool_prefix not in ("true", "false"):
            raise RouterCheckpointError(
                f"{path}: expected 'true' or 'false' in the metadata field 'pool_prefix', found "
                f"{_shortened(pool_prefix)}; write the file again"
            )
        info = cls(
            pool_prefix=pool_prefix == "true",
            base_model=metadata.get("base_model", ""),
            sparse_pattern=metadata["sparse_pattern"],
            provenance=provenance,
            probe=_list({"probe": "[128, 128]"} | metadata, "probe", int, path),
            pools=_list(metadata, "pools", str, path),
            context_layers=_list(metadata, "context_layers", int, path),
            widths=_list(metadata, "widths", int, path),
            always_sparse=_list(metadata, "always_sparse", int, path),
            freeing_order=_list(metadata, "freeing_order", int, path),
            **numbers,
        )
        info.check(path)
        return info

    def check(self, path: Path) -> None:
        """Check what only several fields together can say.

        Raises: RouterCheckpointError: naming the file at `path`.
        """
        try:
            inputs = self.inputs
        except ValueError as error:
            raise RouterCheckpointError(
                f"{path}: the metadata make no inputs of a router: {error}; write the file again"
            ) from error
        named = (*self.context_layers, *self.always_sparse)
        beyond = any(layer >= self.num_layers for layer in named)
        sizes = (*self.widths, inputs.vectors * self.head_dim)
        fits = min(sizes) >= 1 and max(sizes) <= _MOST_INPUTS and len(self.widths) in (0, 4)
        if beyond or not fits:
            raise RouterCheckpointError(
                f"{path}: expected context_layers and always_sparse below num_layers "
                f"({self.num_layers}), no or four widths, and sizes of at most {_MOST_INPUTS}, "
                f"found context_layers {_shortened(self.context_layers)}, always_sparse "
                f"{_shortened(self.always_sparse)}, widths {_shortened(self.widths)} and "
                f"{inputs.vectors} pooled vectors of {self.head_dim}; write the file again"
            )
        if self.freeing_order and sorted(self.freeing_order) != [*range(self.num_layers)]:
            raise RouterCheckpointError(
                f"{path}: expected each of {self.num_layers} layers once in freeing_order, found "
                f"{_shortened(self.freeing_order)}; write the file again"
            )


def _integer(metadata: dict[str, str], name: str, path: Path) -> int:
    found = metadata.get(name)
    least, most = _BOUNDS[name]
    # Ten digits are enough for every bound; Python refuses to read thousands.
    if found is None or not found.isdecimal() or len(found) > 10 or not least <= int(found) <= most:
        raise RouterCheckpointError(
            f"{path}: expected a whole number from {least} to {most} in the metadata field "
            f"{name!r}, found {_shortened(found)}; write the file again"
        )
    return int(found)


def _list(
    metadata: dict[str, str], name: str, kind: type[_Entry], path: Path
) -> tuple[_Entry, ...]:
    """Read a JSON list of texts or of whole numbers that are not negative; absent: empty."""
    try:
        found = json.loads(metadata.get(name, "[]"))
    except (ValueError, RecursionError):
        found = None
    good = isinstance(found, list) and len(found) <= _MOST_ENTRIES
    if not good or not all(
        type(x) is kind and (isinstance(x, str) or 0 <= x < 2**30) for x in found
    ):
        raise RouterCheckpointError(
            f"{path}: expected a JSON list of {'texts' if kind is str else 'whole numbers'} in the "
            f"metadata field {name!r}, found {_shortened(metadata.get(name))}; write the file again"
        )
    return tuple(found)


def read_info(path: Path) -> RouterInfo:
    """Read a router file's metadata alone (milliseconds).

    Raises: RouterCheckpointError: missing, unreadable or truncated file, or bad metadata.
    """
    path = locate_router(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    return RouterInfo.from_metadata(metadata or {}, path)


def read_router(path: Path) -> tuple[LayerRouter, RouterInfo]:
    """Read a router file and check every tensor in it.

    Args:
        path: the file, or the folder that holds it.

    Returns: the LayerRouter (float32, on the CPU, without gradients) and the file's RouterInfo.
    Raises: RouterCheckpointError: missing, unreadable or truncated file, missing or additional
        tensors, wrong shapes, values that are not finite.
    """
    path = locate_router(path)
    info = read_info(path)
    try:
        with safe_open(path, framework="pt") as file:
            # From the file's header: nothing is read or made of sizes that do not fit.
            _check_shapes(
                {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()},  # noqa: SIM118
                info,
                path,
            )
            found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error
    router = info.make_router().requires_grad_(False)
    for name, tensor in found.items():
        if not torch.isfinite(tensor.float()).all():
            raise RouterCheckpointError(
                f"{path}: expected finite numbers in {name}, found NaN or infinity; the training "
                "diverged, use an earlier checkpoint"
            )
        layer, linear, kind = _split(name)
        weight, bias = router.linear(linear)
        (weight if kind == "weight" else bias)[layer] = tensor.float()
    router.make_sparse(info.always_sparse)
    return router, info


def _check_shapes(found: Mapping[str, tuple[int, ...]], info: RouterInfo, path: Path) -> None:
    """Check that a file holds exactly the tensors that its metadata announces."""
    expected = _tensor_shapes(info)
    for what, names in (
        ("lacks", expected.keys() - found.keys()),
        ("also holds", found.keys() - expected.keys()),
    ):
        if names:
            raise RouterCheckpointError(
                f"{path}: expected the {len(expected)} tensors of a router of {info.num_layers} "
                f"layers, found a file that {what} {_some(names)}; write the file again"
            )
    for name, shape in expected.items():
        if found[name] != shape:
            raise RouterCheckpointError(
                f"{path}: expected {name} of shape {list(shape)} (head_dim {info.head_dim}), found "
                f"{list(found[name])}; write the file again"
            )


def write_router(
    path: Path,
    router: LayerRouter,
    info: RouterInfo,
    weight_dtypes: torch.dtype | Mapping[str, torch.dtype] = torch.float32,
) -> Path:
    """Write a router file in one atomic step.

    Args:
        path: the file, or an existing folder to write `flux_router.safetensors` into.
        router: the routers of all layers.
        info: its metadata.
        weight_dtypes: of the stored weights, one for all or by linear layer as `linear_shapes`
            names them; float16 halves the file. Biases stay float32.

    Returns: the path of the file.
    Raises: RouterCheckpointError: router and info disagree.
    """
    if (router.num_layers, router.shapes) != (info.num_layers, _linear_shapes(info)):
        raise RouterCheckpointError(
            f"expected a router of {info.num_layers} layers with head_dim {info.head_dim} as its "
            f"info says, found {router.num_layers} and {router.head_dim}, or other inputs or widths"
        )
    info.check(path)
    path = path / ROUTER_FILE_NAME if path.is_dir() else path
    if isinstance(weight_dtypes, torch.dtype):
        weight_dtypes = dict.fromkeys(router.shapes, weight_dtypes)
    tensors = {}
    for name in _tensor_shapes(info):
        layer, linear, kind = _split(name)
        weight, bias = router.linear(linear)
        stacked = weight if kind == "weight" else bias
        dtype = weight_dtypes[linear] if kind == "weight" else torch.float32
        tensors[name] = stacked[layer].detach().to(dtype).cpu().contiguous()
    return write_tensors(path, tensors, info)


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], info: RouterInfo) -> Path:
    """Write tensors of a router file as they are, in one atomic step.

    Args:
        path: the file; one that is there is replaced.
        tensors: by their names in the file.
        info: its metadata.

    Returns: the path of the file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, temporary, metadata=info.to_metadata())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _tensor_shapes(info: RouterInfo) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(info.num_layers):
        for name, (out, inp) in _linear_shapes(info).items():
            shapes[f"layers.{layer}.{name}.weight"] = (out, inp)
            shapes[f"layers.{layer}.{name}.bias"] = (out,)
    return shapes


def _linear_shapes(info: RouterInfo) -> dict[str, tuple[int, int]]:
    widths = info.widths or paper_widths(info.head_dim)
    return linear_shapes(info.inputs.vectors * info.head_dim, widths)


def _split(name: str) -> tuple[int, str, str]:
    _, layer, linear = name.split(".", 2)
    linear, kind = linear.rsplit(".", 1)
    return int(layer), linear, kind


def _some(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"


def _shortened(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _unreadable(path: Path, error: Exception) -> RouterCheckpointError:
    return RouterCheckpointError(
        f"{path}: expected a safetensors file, found one that cannot be read ({error}); it may be "
        "truncated, copy or write it again"
    )
