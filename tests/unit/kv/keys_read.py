"""What a query of a FULL or SPARSE layer reads, written down key by key."""

from dataclasses import dataclass


@dataclass(frozen=True)
class KeysRead:
    """The definition of FULL and SPARSE.

    Args:
        block_size: tokens a block.
        sink_tokens: of SPARSE layers.
        window_tokens: of SPARSE layers.
        is_local: whether SPARSE prefill reads sinks and window alone.
        full_decode_tokens: of an answer, for which SPARSE decode reads everything.
    """

    block_size: int
    sink_tokens: int
    window_tokens: int
    is_local: bool
    full_decode_tokens: int = 0

    def of(self, position: int, prompt_len: int, is_prefill: bool, is_sparse: bool) -> list[int]:
        """List the keys that a query reads."""
        everything = range(position + 1)
        is_early = position < prompt_len + self.full_decode_tokens
        if not is_sparse or (not self.is_local if is_prefill else is_early):
            return list(everything)
        sinks, first = self.sink_tokens, position - self.window_tokens + 1
        if not is_prefill:  # whole blocks
            sinks = -(-sinks // self.block_size) * self.block_size
            first = max(first, 0) // self.block_size * self.block_size
        return [key for key in everything if key < sinks or key >= first]
