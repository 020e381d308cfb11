"""The KV cache of a layer that can be SPARSE, as vLLM is told of it."""

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec

if TYPE_CHECKING:
    from vllm.config import VllmConfig

_TILE_TOKENS, _FLOAT8_TILE_TOKENS = 128, 224
"""Most keys that an attention kernel loads at once, FlashAttention-3's over float8 keys the latter:
a tile may begin so far before the window. What it masks there has to be finite, hence this
request's own."""


@dataclass(frozen=True, kw_only=True)
class FluxSpec(AttentionSpec):
    """A KV cache that holds, where SPARSE, sinks, window and what is in flight.

    No `FullAttentionSpec`: vLLM takes for granted that a shorter prefix of a hit of those is a hit.
    """

    cluster: int
    """Number of the KV cache group: vLLM groups layers whose specs are equal."""
    sink_tokens: int
    window_tokens: int
    """The query's own included."""
    is_local: bool
    """Whether SPARSE prefill reads no key between sinks and window."""
    full_decode_tokens: int = 0
    """First tokens of an answer that read every key."""
    waits_for_routes: bool = False
    """Whether each request's routes say if the cluster is SPARSE for it; until they are known it
    holds every block. False: it is SPARSE for all."""

    @classmethod
    def of(
        cls,
        spec: FullAttentionSpec,
        *,
        cluster: int,
        sink_tokens: int,
        window_tokens: int,
        is_local: bool,
        full_decode_tokens: int = 0,
        waits_for_routes: bool = False,
    ) -> "FluxSpec":
        """Take over vLLM's spec of a layer; its pages stay as they are."""
        pages = {field.name: getattr(spec, field.name) for field in fields(AttentionSpec)}
        return cls(
            **pages,
            cluster=cluster,
            sink_tokens=sink_tokens,
            window_tokens=window_tokens,
            is_local=is_local,
            full_decode_tokens=full_decode_tokens,
            waits_for_routes=waits_for_routes,
        )

    @property
    def frees_in_prefill(self) -> bool:
        """Whether a prompt's blocks are given back before it is complete, and hits lack them."""
        return self.is_local and not self.full_decode_tokens

    def whole_until(self, prompt_tokens: int, prefill_end: int) -> int:
        """Return how many tokens are processed before a request gives back its first block.

        Args:
            prompt_tokens: of the request.
            prefill_end: the same; after a preemption one less than the tokens that it computes
                anew, of which model runner V2 takes the newest for prefill too.
        """
        if self.frees_in_prefill:
            return 0
        answered = prompt_tokens + self.full_decode_tokens
        return answered if self.is_local else max(answered, prefill_end + 1)

    @property
    def sink_blocks(self) -> int:
        """Blocks that are never freed; at least one, since vLLM drops null blocks at the head."""
        return max(1, cdiv(self.sink_tokens, self.block_size))

    @property
    def _kept_tokens(self) -> int:
        """Tokens before the window that are kept."""
        is_float8 = self.dtype.itemsize == 1
        return max(self.block_size, _FLOAT8_TILE_TOKENS if is_float8 else _TILE_TOKENS)

    def window_block(self, position: int) -> int:
        """Return the index of the first block that the window of a query at `position` needs."""
        return max(0, position - self.window_tokens + 1) // self.block_size

    def freed_end(self, processed_tokens: int) -> int:
        """Return up to which block all behind the sinks is free, once so many tokens are processed.

        What lies just before the window is kept: for kernels that read whole tiles, and so that a
        prompt that comes again, whose last block is always computed anew, still hits.
        """
        return self.window_block(processed_tokens - self._kept_tokens)

    def most_blocks(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Return the most blocks that a request holds for which the cluster is SPARSE.

        Args:
            max_in_flight_tokens: most tokens that are scheduled but not yet processed.
            max_model_len: most tokens of a request.
        """
        everything = cdiv(max_model_len, self.block_size)
        if not self.frees_in_prefill:
            return everything
        latest = self.window_tokens - 1 + self._kept_tokens + max_in_flight_tokens
        # One more: the window may begin anywhere in its first block.
        return min(everything, self.sink_blocks + cdiv(latest, self.block_size) + 1)

    def max_memory_usage_bytes(self, vllm_config: "VllmConfig") -> int:
        """Return the most memory that one request takes in one layer."""
        max_model_len = vllm_config.model_config.max_model_len
        if self.waits_for_routes:
            return cdiv(max_model_len, self.block_size) * self.page_size_bytes
        most = self.most_blocks(vllm_config.max_in_flight_tokens, max_model_len)
        return most * self.page_size_bytes

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, KVCacheSpec]) -> bool:
        """Say whether all layers may share one group: only those of one cluster."""
        return all(spec == self for spec in kv_cache_specs.values())
