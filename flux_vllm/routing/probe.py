"""The probe: the model run once over a prompt's two ends, and every layer's route from what it saw.

Nothing is read from the KV cache and nothing written to it. Each probe is a forward of one prompt
and of one shape, padded at its end, so its numbers depend on the prompt alone: not on chunks,
cached prefixes or the requests beside it.

Dimension legend: L layers of the model, T tokens of a probe, P pools, N query heads, H head dim, D
pairs of rotated dimensions, F features of a layer's router.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from flux_vllm.router.inputs import RouterInputs
from flux_vllm.router.model import LayerRouter
from flux_vllm.router.overlap import WIDTH
from flux_vllm.router.route import Route, choose_route, full_probability
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.rotary import RotaryInverse
from flux_vllm.transfer import upload


class ProbeDone(BaseException):
    """Ends a probe's forward: no router looks at what the model would compute from here on.

    No error, so that nothing on its way takes it for one (`except Exception`).
    """


@dataclass(slots=True)
class ProbeMetadata:
    """What an attention layer gets in a probe, in the place of vLLM's metadata."""

    cu_seqlens: torch.Tensor
    """[2] int32: 0, T. One causal sequence without a KV cache."""
    mean_query: torch.Tensor | None
    """[T, H] float32: where the layer leaves its queries' mean over heads, after RoPE; None for a
    layer whose queries no router looks at."""
    owner: "ProbeMetadata | None" = None
    """Of the layer whose keys and values this one attends to; None where it has its own."""
    is_shared: bool = False
    """Whether other layers attend to this one's keys and values."""
    is_last: bool = False
    """Whether the forward ends once this layer's queries are kept."""
    _kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def keep(self, query: torch.Tensor) -> None:
        """Keep the mean over heads of a layer's queries [T, N, H].

        Raises: ProbeDone: this layer is the last that a router looks at.
        """
        if self.mean_query is not None:
            torch.mean(query, 1, dtype=torch.float32, out=self.mean_query)
        if self.is_last:
            raise ProbeDone

    def to_attend(
        self, key: torch.Tensor | None, value: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the keys and values that a layer attends to, [T, K, H] each.

        Args:
            key: the layer's own; None where it attends to another's.
            value: likewise.
        """
        if self.owner is not None:
            assert self.owner._kept is not None, "the owner of the keys ran before"
            return self.owner._kept
        assert key is not None
        assert value is not None
        if self.is_shared:
            self._kept = key, value
        return key, value


@dataclass(frozen=True, slots=True)
class ProbedLayer:
    """One attention layer of the model."""

    name: str
    """vLLM's."""
    index: int
    is_pooled: bool
    """Whether a router looks at the layer's queries."""
    rotary: RotaryInverse | None
    """None where they reach attention unrotated, or no router looks at them."""
    owner: int | None = None
    """The layer whose keys and values it takes; None where they are its own."""


class ModelCall(Protocol):
    """vLLM's model, called beside its batches."""

    @property
    def can_be_captured(self) -> bool:
        """Whether one CUDA graph serves all requests."""

    @property
    def can_stop(self) -> bool:
        """Whether a call may end by `ProbeDone`, or be left out where no layer is looked at."""

    def __call__(
        self, metadata: dict[str, Any], token_ids: torch.Tensor, positions: torch.Tensor
    ) -> None:
        """Run the model over tokens at positions, until `ProbeDone` where one ends it.

        Only its attention layers see the result.

        Args:
            metadata: what each attention layer gets, by name.
            token_ids: [T] int32.
            positions: [T] int64.
        """

    def use_adapter(self, adapter: object | None, tokens: int) -> None:
        """Switch to a LoRA adapter for the next call, which has so many tokens."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture work that calls the model as a CUDA graph, and return its replay."""


class PromptProbe:
    """Decides all routes of a prompt.

    Args:
        inputs: what the routers look at.
        router: all layers' routers, on the device.
        threshold: FULL where P(FULL) is at least this.
        layers: of the model, those of this pipeline stage.
        routed: of each layer with a route, on any stage: the layer whose route it takes, mostly
            itself. The others attend as the model has them.
        model: runs it.
        reduce_ranks: of pooled queries [L, P, H], 0 for layers that are not here: their mean over
            tensor-parallel ranks, added up over pipeline stages.
        device: of the model.
    """

    def __init__(
        self,
        inputs: RouterInputs,
        router: LayerRouter,
        threshold: float,
        layers: Sequence[ProbedLayer],
        routed: Mapping[int, int],
        model: ModelCall,
        reduce_ranks: Callable[[torch.Tensor], torch.Tensor],
        device: torch.device,
    ) -> None:
        self._inputs = inputs
        self._router = router
        self._model = model
        self._reduce_ranks = reduce_ranks
        tokens, num_layers = inputs.probe.tokens, router.num_layers

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        # A captured graph reads and writes these, so they stay where they are.
        self._threshold = torch.full((), threshold, device=device)
        self._token_ids = zeros(tokens, dtype=torch.int32)  # the dtypes of vLLM's own buffers:
        self._positions = zeros(tokens, dtype=torch.int64)  # compiled code does not check them
        self._weights = zeros(len(inputs.pools), tokens)
        self._told = zeros(len(inputs.pools), WIDTH)
        self._pooled = zeros(num_layers, len(inputs.pools), router.head_dim)
        self.set_threshold(threshold)
        self._mean_query = zeros(num_layers, tokens, router.head_dim)
        self._rotations = _rotations(layers, zeros, tokens)
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        self._metadata = _metadata(layers, cu_seqlens, self._mean_query)
        pooled = [(layer.index, layer.name) for layer in layers if layer.is_pooled]
        self._needs_model = bool(pooled) or not model.can_stop
        if pooled and model.can_stop:  # layers run in the order of their indices
            self._metadata[max(pooled)[1]].is_last = True
        self._owners = torch.arange(num_layers, device=device)
        self._is_routed = zeros(num_layers, dtype=torch.bool)
        for layer, owner in routed.items():
            self._owners[layer], self._is_routed[layer] = owner, True
        self.routes = zeros(num_layers, dtype=torch.int8)
        """[L] int8: the routes of the latest prompt; UNDECIDED for layers that are not routed."""
        self.full_probability = zeros(num_layers)
        """[L] float32: P(FULL), NaN for layers that are not routed."""
        self._replays: tuple[Callable[[], None], Callable[[], None]] | None = None

    @torch.inference_mode()
    def decide(self, prompt: Prompt) -> None:
        """Probe a prompt of token ids; its routes are in `routes` and `full_probability` then.

        Host sync: none.
        """
        assert prompt.tokens is not None
        self._load(prompt)
        look, choose = self._replays or (self._look, self._choose)
        if self._replays is None:
            self._model.use_adapter(prompt.adapter, len(self._token_ids))
        look()
        # Found out by the host while the device runs the model.
        upload(self._inputs.told(prompt.tokens), self._told)
        choose()

    @torch.inference_mode()
    def set_threshold(self, threshold: float) -> None:
        """Decide later prompts by another threshold, also where the probe was captured."""
        self._threshold.fill_(threshold)

    @torch.inference_mode()
    def capture(self) -> None:
        """Capture a probe's two parts as CUDA graphs, where the model's call allows that."""
        if self._model.can_be_captured:
            self._load(Prompt("", 1, [0]))
            self._replays = self._model.capture(self._look), self._model.capture(self._choose)

    def _load(self, prompt: Prompt) -> None:
        """Write a prompt's ends into the buffers; padding is token 0 at position 0."""
        assert prompt.tokens is not None
        chosen = self._inputs.probe.positions(prompt.length)
        positions = np.zeros(len(self._token_ids), dtype=np.int64)
        positions[: len(chosen)] = chosen
        token_ids = np.zeros(len(positions), dtype=np.int32)
        token_ids[: len(chosen)] = [prompt.tokens[position] for position in chosen.tolist()]
        upload(token_ids, self._token_ids)
        upload(positions, self._positions)
        upload(self._inputs.weights(prompt.length), self._weights)
        for rotation in self._rotations:
            for rows, buffer in zip(
                rotation.rotary.rows(positions), (rotation.cos, rotation.sin), strict=True
            ):
                upload(rows, buffer)

    # The same kernels on the same addresses each time.

    def _look(self) -> None:
        """Run the model, and pool what the routers look at."""
        if self._needs_model:
            self._model(self._metadata, self._token_ids, self._positions)
        for rotation in self._rotations:
            layers = rotation.layers
            self._mean_query[layers] = rotation.rotary.undo(
                self._mean_query[layers], rotation.cos, rotation.sin
            )
        self._pooled.copy_(self._reduce_ranks(self._weights @ self._mean_query))

    def _choose(self) -> None:
        """Decide by what was pooled and told."""
        features = self._inputs.assemble(self._inputs.complete(self._pooled, self._told))
        # One request: [L, 1, F].
        probability = full_probability(self._router.forward_all(features[:, None]))[:, 0]
        probability = probability[self._owners]
        routes = choose_route(probability, self._threshold)
        self.routes.copy_(torch.where(self._is_routed, routes, int(Route.UNDECIDED)))
        self.full_probability.copy_(torch.where(self._is_routed, probability, float("nan")))


def _metadata(
    layers: Sequence[ProbedLayer], cu_seqlens: torch.Tensor, mean_query: torch.Tensor
) -> dict[str, ProbeMetadata]:
    """Make each layer's metadata, by its name; owners are other layers' too."""
    shared = {layer.owner for layer in layers}
    by_index = {
        layer.index: ProbeMetadata(
            cu_seqlens,
            mean_query[layer.index] if layer.is_pooled else None,
            is_shared=layer.index in shared,
        )
        for layer in layers
    }
    for layer in layers:
        if layer.owner is not None:
            by_index[layer.index].owner = by_index[layer.owner]
    return {layer.name: by_index[layer.index] for layer in layers}


@dataclass(frozen=True, slots=True)
class _Rotation:
    """A rotary embedding, the layers that use it, and its rows for the probe at hand."""

    rotary: RotaryInverse
    layers: torch.Tensor
    """int64: indices of layers."""
    cos: torch.Tensor
    """[T, D] float32."""
    sin: torch.Tensor


def _rotations(
    layers: Sequence[ProbedLayer], zeros: Callable[..., torch.Tensor], tokens: int
) -> list[_Rotation]:
    by_rotary: dict[int, list[ProbedLayer]] = {}
    for layer in layers:
        if layer.rotary is not None:
            by_rotary.setdefault(id(layer.rotary), []).append(layer)
    rotations = []
    for group in by_rotary.values():
        rotary = group[0].rotary
        assert rotary is not None
        pairs = (tokens, rotary.rotary_dim // 2)
        indices = zeros(len(group), dtype=torch.int64)
        indices[:] = torch.tensor([layer.index for layer in group])
        rotations.append(_Rotation(rotary, indices, zeros(*pairs), zeros(*pairs)))
    return rotations
