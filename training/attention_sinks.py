"""Learned attention sinks of a model: a logit a head that joins every softmax and adds no value.

Such a sink is one more key in front of all others, which every query sees, with a value of zeros.
So all kinds of attention here serve it as they are, one token longer.

Dimension legend: B prompts, N query heads, K kv heads, T padded tokens, H head dim, S sink tokens.
"""

import torch
from torch.nn import functional

from training.soft_attention import Attention

_WIDTH = 8
"""Dimensions that heads grow by; one would do, but GPUs' kernels want a multiple of eight."""


def attend_with_sinks(
    attention: Attention,
    states: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    scale: float,
    sinks: torch.Tensor,
) -> torch.Tensor:
    """Attend beside a model's own sinks.

    Args:
        attention: to everything; or to S + 1 first tokens and a window, where S are asked for.
        states: query [B, N, T, H], key and value [B, K, T, H].
        scale: of the scores.
        sinks: [N], logits.

    Returns: [B, N, T, H].
    """
    head_dim = states[0].shape[-1]
    # One more token in front of all, whose query is cut off again.
    query, key, value = (functional.pad(state, (0, _WIDTH, 1, 0)) for state in states)
    query[..., head_dim] = (sinks / scale)[:, None].to(query.dtype)
    key[:, :, 0, head_dim] = 1.0
    return attention(query, key, value, scale)[:, :, 1:, :head_dim]
