"""What a router looks at: the prompt's latest queries before RoPE, pooled to one vector.

Most routers look at its first ones too; the metadata field `pool_prefix` says so.

Used by `training/pooling.py` alone; the server's routers look at probes (`inputs.py`).
"""

from dataclasses import dataclass

GRANULE_TOKENS = 16
"""Positions of a KV block that share one query sum."""


@dataclass(frozen=True, slots=True)
class PromptSpan:
    """Where one request stands in its prompt in this step."""

    computed: int
    """Tokens computed before this step: the position of the first token of the chunk."""
    scheduled: int
    """Tokens of this step."""
    prompt_len: int

    @property
    def known_end(self) -> int:
        """Prompt tokens computed once this step is done."""
        return min(self.computed + self.scheduled, self.prompt_len)


def pooled_ranges(
    span: PromptSpan, pool_tokens: int, pool_prefix: bool = True
) -> tuple[range, ...]:
    """Give the positions pooled at this point: the prompt's first tokens, if any, and its latest.

    The two overlap in a prompt shorter than twice `pool_tokens`, whose tokens then count twice.
    Source: arXiv 2604.07394, `ctx_q` pooling.
    """
    end = span.known_end
    latest = range(max(0, end - pool_tokens), end)
    return (range(min(pool_tokens, end)), latest) if pool_prefix else (latest,)
