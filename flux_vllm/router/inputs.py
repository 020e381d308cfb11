"""What a router looks at: the queries of a prompt's two ends, pooled.

A probe runs the model over a prompt's first and latest tokens alone, before anything else of the
prompt is computed. What it sees depends on the prompt and on nothing else: not on chunks, cached
prefixes or neighbours. `docs/ROUTE_STATE.md` says when a request is probed.

Dimension legend: L layers, P pools, C context layers, T tokens of a probe, H head dim,
F = P (1 + C) H features of a layer's router.
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from flux_vllm.router.overlap import WIDTH, overlap

PoolKind = Literal["head", "tail", "ends", "length", "overlap"]
_POOL = re.compile(r"(head|tail|ends|overlap):([1-9][0-9]{0,6})|length")
_LENGTH_UNIT = 16384


_MOST_PROBED = 2**15
"""Every probe is computed at its full length; one of this many tokens is a long prompt itself."""


@dataclass(frozen=True, slots=True)
class Probe:
    """How many tokens of a prompt a probe runs over; a shorter prompt is taken whole."""

    head_tokens: int = 128
    """A: the prompt's first tokens."""
    tail_tokens: int = 128
    """B: its latest."""

    @property
    def tokens(self) -> int:
        """T = A + B: every probe is padded to this length, at its end."""
        return self.head_tokens + self.tail_tokens

    def positions(self, prompt_len: int) -> np.ndarray:
        """Return the positions of the prompt that are run, ascending: [min(T, prompt_len)] int64.

        Their queries attend to those before them among these, at their true positions.
        """
        if prompt_len <= self.tokens:
            return np.arange(prompt_len)
        tail = np.arange(prompt_len - self.tail_tokens, prompt_len)
        return np.concatenate([np.arange(self.head_tokens), tail])


@dataclass(frozen=True, slots=True)
class Pool:
    """Tokens whose queries are averaged to one vector, or what a vector tells of the prompt."""

    kind: PoolKind
    """`head`: the first; `tail`: the latest; `ends`: both together, where those of a prompt
    shorter than the two count twice (`ctx_q` of arXiv 2604.07394). Told: `length`, how long the
    prompt is; `overlap`, where its end occurs earlier (`flux_vllm/router/overlap.py`)."""
    tokens: int
    """At an end; latest tokens that are near, of `overlap`; 0 for `length`."""

    @property
    def is_told(self) -> bool:
        """Whether no query is looked at."""
        return self.kind in ("length", "overlap")

    @classmethod
    def parse(cls, text: str) -> "Pool":
        """Read `KIND:TOKENS` or `length`.

        Raises: ValueError: the text says no pool.
        """
        found = _POOL.fullmatch(text)
        if found is None:
            raise ValueError(
                "expected a pool as head:TOKENS, tail:TOKENS, ends:TOKENS or overlap:TOKENS with 1 "
                f"to 9,999,999 tokens, or length, found {text[:40]!r}"
            )
        if text == "length":
            return cls("length", 0)
        return cls(found[1], int(found[2]))  # type: ignore[arg-type]

    def __str__(self) -> str:
        return self.kind if self.kind == "length" else f"{self.kind}:{self.tokens}"

    def counts(self, tokens: int) -> np.ndarray:
        """Say how often each of a probe's tokens counts: [tokens] float32."""
        counts = np.zeros(tokens, dtype=np.float32)
        if self.kind in ("head", "ends"):
            counts[: self.tokens] += 1
        if self.kind in ("tail", "ends"):
            counts[max(0, tokens - self.tokens) :] += 1
        return counts


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterInputs:
    """The inputs of a model's routers.

    Raises: ValueError: no pool, or one that is longer than the probe's end.
    """

    pools: tuple[Pool, ...]
    """P, of every layer's mean query before RoPE."""
    probe: Probe = Probe()
    context_layers: tuple[int, ...] = ()
    """C layers whose pooled queries every layer's router sees beside its own: an early layer's
    query knows the words of a question, a late one's its meaning."""

    def __post_init__(self) -> None:
        if not self.pools:
            raise ValueError("expected at least one pool, found none")
        room = {
            "head": self.probe.head_tokens,
            "tail": self.probe.tail_tokens,
            "ends": min(self.probe.head_tokens, self.probe.tail_tokens),
        }
        for pool in self.pools:
            if not pool.is_told and pool.tokens > room[pool.kind]:
                raise ValueError(
                    f"expected pools of at most {room[pool.kind]} tokens ({pool.kind}), as many as "
                    f"the probe runs there, found {pool}; enlarge the probe"
                )

    @property
    def vectors(self) -> int:
        """P (1 + C): pooled vectors a layer's router sees."""
        return len(self.pools) * (1 + len(self.context_layers))

    def weights(self, prompt_len: int) -> np.ndarray:
        """Return what each of a probe's tokens counts in each pool.

        Args:
            prompt_len: tokens of the prompt, at least one.

        Returns: [P, T] float32; rows sum to 1, of what is told to 0; padding counts nothing.
        """
        weights = np.zeros((len(self.pools), self.probe.tokens), dtype=np.float32)
        tokens = min(self.probe.tokens, prompt_len)
        for row, pool in zip(weights, self.pools, strict=True):
            counts = pool.counts(tokens)
            row[:tokens] = counts / max(counts.sum(), 1)
        return weights

    def told(self, token_ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Return what is told of a prompt: [P, WIDTH] float32, 0 for pools of queries.

        A SPARSE layer loses more of a longer prompt, and its ends hardly say how long it is.

        Args:
            token_ids: [tokens] of the whole prompt.
        """
        told = np.zeros((len(self.pools), WIDTH), dtype=np.float32)
        for row, pool in zip(told, self.pools, strict=True):
            if pool.kind == "length":
                row[:] = math.log2(len(token_ids) / _LENGTH_UNIT)
            elif pool.kind == "overlap":
                row[:] = overlap(token_ids, pool.tokens)
        return told

    def complete(self, pooled: torch.Tensor, told: torch.Tensor) -> torch.Tensor:
        """Put what is told in the place of the queries that were not looked at.

        Args:
            pooled: [..., P, H] float32, `weights` @ mean queries before RoPE.
            told: [..., P, WIDTH] float32; its numbers fill a vector over and over.

        Returns: [..., P, H] float32.
        Host sync: none. CUDA graph: safe.
        """
        head_dim = pooled.shape[-1]
        times = -(-head_dim // WIDTH)
        return pooled + told.repeat(*[1] * (told.dim() - 1), times)[..., :head_dim]

    def assemble(self, pooled: torch.Tensor) -> torch.Tensor:
        """Put each layer's own pools and the context layers' into its router's input.

        Args:
            pooled: [L, ..., P, H] float32, as `complete` makes it.

        Returns: [L, ..., F] float32: own pools, then those of each context layer in turn.
        Host sync: none. CUDA graph: safe.
        """
        flat = pooled.flatten(-2)
        context = [flat[layer].expand_as(flat) for layer in self.context_layers]
        return torch.cat([flat, *context], dim=-1)

    def layers_read(self, first: torch.Tensor, routers: Iterable[int]) -> set[int]:
        """Name the layers whose queries some routers read: whose columns are not all zero.

        Routers fitted to costs, for one, read nothing of their own layer. What is told is no query.

        Args:
            first: [L, outputs, F] weights of the routers' first linear layers.
            routers: indices of those that decide.
        """
        sources = len(first), 1 + len(self.context_layers), len(self.pools), -1  # as in `assemble`
        is_query = torch.tensor([not pool.is_told for pool in self.pools])
        of_pools = (first != 0).any(dim=1).view(sources).any(dim=-1).cpu()
        reads = (of_pools & is_query).any(dim=-1).tolist()  # [L, 1 + C]
        return {
            layer
            for router in routers
            for layer, is_read in zip((router, *self.context_layers), reads[router], strict=True)
            if is_read
        }


def parse_inputs(
    pools: Sequence[str], probe: Sequence[int], context_layers: Sequence[int]
) -> RouterInputs:
    """Make RouterInputs of the plain values that files and settings hold.

    Raises: ValueError: values that make no inputs.
    """
    if len(probe) != 2 or min(probe) < 0 or not 1 <= sum(probe) <= _MOST_PROBED:
        raise ValueError(
            "expected a probe of two token counts, head and tail, found "
            f"{probe!r}; together they are 1 to {_MOST_PROBED}"
        )
    return RouterInputs(
        pools=tuple(map(Pool.parse, pools)),
        probe=Probe(*probe),
        context_layers=tuple(context_layers),
    )
