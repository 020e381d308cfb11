"""Which tensor of a checkpoint is what: the standard model's, the router's, or training's."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from flux_vllm.errors import CheckpointImportError
from flux_vllm.importer.config import ModelShape
from flux_vllm.importer.source import BYTES_OF_DTYPE, StoredTensor, some
from flux_vllm.router.model import linear_shapes

_ROUTER = "model.layers.{layer}.self_attn.mask_allocator."
# Our name of a linear layer's network to the authors'.
_NETWORKS = {"features": "cls_feat_extractor", "head": "cls_router_head_agnostic"}

# What the authors' inference does not use, and why it may go.
_DROPPED = (
    (r"model\.layers\.\d+\.self_attn\.attn_mask_log_alphas", "masks of heads, unused at inference"),
    (r"(model\.)?sparsity_lambda\w*", "multipliers of the training's sparsity loss"),
    (
        r"model\.layers\.\d+\.self_attn\.mask_allocator\.log_temp",
        "the training's temperature, unused at inference",
    ),
    (r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq", "computed from config.json"),
)
TIED_HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True, slots=True)
class SortedTensors:
    """Every tensor of a checkpoint, by what becomes of it."""

    model: dict[str, StoredTensor]
    """The standard model's, under the same names."""
    router: dict[str, StoredTensor]
    """By the names of a router file: `layers.0.features.0.weight`."""
    dropped: dict[str, list[str]]
    """Why, to names."""
    tied_head: StoredTensor | None
    """An output layer beside tied embeddings: dropped if it equals them."""


def sort_tensors(
    tensors: Mapping[str, StoredTensor], shape: ModelShape, use_softmax: bool
) -> SortedTensors:
    """Sort a checkpoint's tensors and check that they are all there, and no others.

    Args:
        tensors: by name in the checkpoint.
        shape: of the model.
        use_softmax: whether the router has two logits, else one.

    Raises: CheckpointImportError: missing or unknown tensors, other shapes, dtypes that are no
        weight's.
    """
    model = _model_shapes(shape)
    router = {
        theirs: (ours, expected)
        for ours, theirs, expected in _router_shapes(shape, 2 if use_softmax else 1)
    }
    expected = model | {theirs: expected for theirs, (_, expected) in router.items()}
    dropped: dict[str, list[str]] = {}
    unknown = []
    for name in tensors.keys() - expected.keys():
        reasons = [why for pattern, why in _DROPPED if re.fullmatch(pattern, name)]
        if reasons:
            dropped.setdefault(reasons[0], []).append(name)
        elif name != TIED_HEAD:  # looked at below: not expected beside tied embeddings
            unknown.append(name)
    for what, names in (
        ("lacks", expected.keys() - tensors.keys()),
        ("also holds", unknown),
    ):
        if names:
            raise CheckpointImportError(
                f"expected the {len(expected)} tensors of a {shape.model_type} model of "
                f"{shape.num_layers} layers and its router, found a checkpoint that {what} "
                f"{some(names)}; it is not whole, or of a version that is not known here"
            )
    tied_head = tensors.get(TIED_HEAD) if shape.tied else None
    for name, size in (expected | ({TIED_HEAD: model[EMBEDDING]} if tied_head else {})).items():
        _check(name, tensors[name], size)
    return SortedTensors(
        model={name: tensors[name] for name in tensors if name in model},
        router={ours: tensors[theirs] for theirs, (ours, _) in router.items()},
        dropped=dropped,
        tied_head=tied_head,
    )


def source_name(router_tensor: str) -> str:
    """Give the authors' name of a router tensor `layers.{i}.{network}.{n}.{kind}`."""
    _, layer, network, rest = router_tensor.split(".", 3)
    return f"{_ROUTER.format(layer=layer)}{_NETWORKS[network]}.{rest}"


def _model_shapes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    linears = {
        "self_attn.q_proj": (queries, hidden),
        "self_attn.k_proj": (keys, hidden),
        "self_attn.v_proj": (keys, hidden),
        "self_attn.o_proj": (hidden, queries),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    for name, size in linears.items():
        layer[f"{name}.weight"] = size
        if shape.mlp_bias if name.startswith("mlp") else shape.attention_bias:
            layer[f"{name}.bias"] = size[:1]
    if shape.model_type == "qwen3":
        layer |= dict.fromkeys(
            ("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (shape.head_dim,)
        )
    shapes: dict[str, tuple[int, ...]] = {
        f"model.layers.{index}.{name}": size
        for index in range(shape.num_layers)
        for name, size in layer.items()
    }
    shapes |= {EMBEDDING: (shape.vocab_size, hidden), "model.norm.weight": (hidden,)}
    return shapes if shape.tied else shapes | {TIED_HEAD: (shape.vocab_size, hidden)}


def _router_shapes(shape: ModelShape, logits: int) -> list[tuple[str, str, tuple[int, ...]]]:
    """List (our name, the authors' name, shape) of every router tensor."""
    found: list[tuple[str, str, tuple[int, ...]]] = []
    linears = linear_shapes(shape.head_dim) | {"head.4": (logits, shape.head_dim)}
    for layer in range(shape.num_layers):
        for linear, size in linears.items():
            for kind, expected in (("weight", size), ("bias", size[:1])):
                name = f"layers.{layer}.{linear}.{kind}"
                found.append((name, source_name(name), expected))
    return found


def _check(name: str, stored: StoredTensor, size: tuple[int, ...]) -> None:
    if stored.shape != size:
        raise CheckpointImportError(
            f"expected {name} of shape {list(size)} as config.json says, found "
            f"{list(stored.shape)} in {stored.file.name}; config and weights do not belong together"
        )
    if stored.dtype not in BYTES_OF_DTYPE:
        raise CheckpointImportError(
            f"expected {name} stored as one of {list(BYTES_OF_DTYPE)}, found {stored.dtype} in "
            f"{stored.file.name}; import a checkpoint that is not quantized"
        )
