"""torch's attention over keys of one request, under a mask and with its heads' learned sinks.

Dimension legend: Q queries, S keys, N query heads, K kv heads, H head dim.
"""

import torch
from torch.nn import functional


def attend_masked(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    sink_logits: torch.Tensor | None,
) -> torch.Tensor:
    """Attend to what a mask shows.

    A learned sink is one more key, whose value is zero and whose score is its head's logit: the
    product of a dimension that the queries get for it, and that is 0 in all other keys.

    Args:
        query: [N, Q, H].
        keys: [K, S, H].
        values: [K, S, H].
        mask: [Q, S] or [N, Q, S] bool.
        scale: of the scores.
        sink_logits: [N] of the heads' learned sinks; None for heads without.

    Returns: [Q, N, H].
    """
    head_dim = query.shape[-1]
    if sink_logits is not None:
        products = sink_logits.float()[:, None] / scale
        # Two numbers of the queries' dtype hold what one would round.
        coarse = products.to(query.dtype)
        parts = torch.cat([coarse, (products - coarse.float()).to(query.dtype)], dim=1)
        query = torch.cat([query, parts[:, None].expand(-1, query.shape[1], -1)], dim=2)
        keys, values = (functional.pad(tensor, (0, 2, 0, 1)) for tensor in (keys, values))
        keys[:, -1, head_dim:] = 1
        mask = functional.pad(mask, (0, 1), value=True)
    attended = functional.scaled_dot_product_attention(
        query[None], keys[None], values[None], attn_mask=mask, scale=scale, enable_gqa=True
    )
    return attended[0].transpose(0, 1)[..., :head_dim]
