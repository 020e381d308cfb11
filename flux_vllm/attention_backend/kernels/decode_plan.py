"""FlashAttention-3's work plans of a decode step: those of all layers in one launch.

FA3 launches a kernel before each call that decides how many shares a row's keys are cut into. A
call that is given its plan leaves it out. Keys per row differ by layer, so each layer has its own.

A plan is int32, in parts of R rows rounded up to 4: packed queries of each row, shares of each
row's keys, then, where FA3 takes heads in groups that fit the L2 cache, how many; last, a counter
of tiles, which the call leaves at 0 as it found it. The last part's place tells FA3 what the others
are, so it refuses a plan of another size. Entries between R and its multiple of 4 are never read.

Dimension legend: R rows of the batch, C capacity in rows, L layers.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

MOST_ROWS = 992  # beyond, FA3 plans with several thread blocks and without shares
PLANNED_HEAD_DIMS = (64, 128)
_SMALL_TILE = 64
_L2_BYTES = 32 * 2**20


class CallShape(NamedTuple):
    """What is the same in all of a layer's decode calls, float16 or bfloat16 over a paged cache."""

    heads: int
    kv_heads: int
    head_dim: int
    num_sms: int


class _Layout(NamedTuple):
    tile_queries: int
    tile_keys: int
    by_l2: bool
    """Whether heads are grouped by what fits the L2 cache: FA3 does so in causal calls."""

    def size(self, rows: int) -> int:
        return (3 if self.by_l2 else 2) * _round4(rows) + 1


def plan_width(capacity: int) -> int:
    """Return the entries that the largest plan of up to `capacity` rows takes, aligned."""
    return 3 * _round4(min(capacity, MOST_ROWS)) + 4


def write_decode_plans(
    seqused_k: torch.Tensor,
    query_start_loc: torch.Tensor,
    plans: torch.Tensor,
    shape: CallShape,
    *,
    max_query_len: int,
    num_splits: int,
) -> torch.Tensor | None:
    """Write the plans of a batch's causal calls without `seqused_q`, one for each layer.

    The plan of a captured call is rewritten in its place: `max_query_len`, `num_splits` and R must
    be the call's. Rows may have any number of queries up to `max_query_len`, padding rows none.

    Args:
        seqused_k: [L, C] int32: keys that row r reads in a layer.
        query_start_loc: [R + 1] int32.
        plans: [L, plan_width(C)] int32 contiguous, out.
        shape: of the calls.
        max_query_len: most queries a row has (host).
        num_splits: most shares of a row's keys, as the call gets it (host).

    Returns: [L, size] int32, a view of `plans` of which row l is layer l's `scheduler_metadata`;
        None for calls that plan for themselves: those of other head sizes, of one share or of a
        number that FA3 chooses, and of more than 992 rows.
    Source: hopper/flash_prepare_scheduler.cu, flash_api.cpp:1054-1113, tile_size.h.
    Host sync: none. CUDA graph: safe; allocates nothing.
    """
    rows = query_start_loc.shape[0] - 1
    layout = _layout(shape, max_query_len)
    if layout is None or num_splits <= 1 or not 0 < rows <= MOST_ROWS:
        return None
    group = shape.heads // shape.kv_heads
    size = layout.size(rows)
    assert plans.is_contiguous()
    assert size <= plans.shape[1], f"plans hold {plans.shape[1]} entries, the batch needs {size}"
    assert rows <= seqused_k.shape[1]
    _plans_kernel[(seqused_k.shape[0],)](
        seqused_k,
        query_start_loc,
        plans,
        rows,
        _round4(rows),
        group,
        shape.kv_heads,
        shape.num_sms,
        num_splits,
        _tiles_in_l2(group, layout.tile_keys, shape.head_dim),
        seqused_k.stride(0),
        plans.stride(0),
        TILE_QUERIES=layout.tile_queries,
        TILE_KEYS=layout.tile_keys,
        BY_L2=layout.by_l2,
        ROWS=triton.next_power_of_2(rows),
        num_warps=4,
    )
    return plans[:, :size]


def _layout(shape: CallShape, max_query_len: int) -> _Layout | None:
    if shape.head_dim not in PLANNED_HEAD_DIMS:
        return None
    packed = max_query_len * shape.heads // shape.kv_heads
    # With one query a row causal is no different, and FA3 drops it but for head_dim 128.
    causal = max_query_len > 1 or shape.head_dim == 128
    if packed <= _SMALL_TILE:
        return _Layout(_SMALL_TILE, 192 if shape.head_dim == 64 else 128, causal)
    if not causal:
        return None
    return _Layout(192 if shape.head_dim == 64 else 128, 128, causal)


def _tiles_in_l2(group: int, tile_keys: int, head_dim: int) -> int:
    divisor = min(triton.next_power_of_2(group), 16)
    return _L2_BYTES // divisor // (tile_keys * 2 * head_dim * 2)


def _round4(rows: int) -> int:
    return -(-rows // 4) * 4


# Compiled by powers of two of R, not again for each multiple of 16.
@triton.jit(do_not_specialize=["rows", "rows_rounded"])
def _plans_kernel(
    seqused_k,
    query_start_loc,
    plans,
    rows,
    rows_rounded,
    group,
    kv_heads,
    num_sms,
    num_splits,
    tiles_in_l2,
    stride_keys,
    stride_plans,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    BY_L2: tl.constexpr,
    ROWS: tl.constexpr,
):
    layer = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, ROWS)
    mask = row < rows
    first = tl.load(query_start_loc + row, mask=mask, other=0)
    packed = (tl.load(query_start_loc + row + 1, mask=mask, other=0) - first) * group
    keys = tl.load(seqused_k + layer * stride_keys + row, mask=mask, other=0)
    tiles = (keys + TILE_KEYS - 1) // TILE_KEYS
    work = tl.sum((packed + TILE_QUERIES - 1) // TILE_QUERIES * tiles, axis=0)
    # FA3's own arithmetic, in its order: a tenth more than an even share of the GPU.
    share = tl.ceil(work.to(tl.float32) * 1.1 * kv_heads / num_sms)
    share = tl.maximum(share.to(tl.int32), 1)
    splits = tl.maximum(tl.minimum((tiles + share - 1) // share, num_splits), 1)

    plan = plans + layer * stride_plans
    tl.store(plan + row, packed, mask=mask)
    tl.store(plan + rows_rounded + row, splits, mask=mask)
    if BY_L2:
        tiles = tl.maximum((tiles + splits - 1) // splits, 1)
        heads = tl.where(tiles * 2 <= tiles_in_l2, 2, 1)
        heads = tl.where(tiles * 4 <= tiles_in_l2, 4, heads)
        heads = tl.where(tiles * 8 <= tiles_in_l2, 8, heads)
        heads = tl.where(tiles * 16 <= tiles_in_l2, 16, heads)
        tl.store(plan + 2 * rows_rounded + row, tl.minimum(heads, kv_heads), mask=mask)
        tl.store(plan + 3 * rows_rounded, 0)
    else:
        tl.store(plan + 2 * rows_rounded, 0)
