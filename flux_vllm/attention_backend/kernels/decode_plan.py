"""FlashAttention-3's work plans of a decode step: those of all layers in one launch, and balanced.

A decode call cuts each row's keys into shares, which the processors take one after another, row by
row. FA3's own plan, which a kernel before each call makes, aims at shares a tenth larger than an
even part of the batch. Such shares often need one more round than there is work for, most often
where FULL rows lie beside SPARSE ones: up to three tenths of a call. This one tries several sizes
and takes the one that should end first. A call that is given its plan leaves its own out.

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

from flux_vllm.attention_backend.kernels.tiles import power_of_two

MOST_ROWS = 992  # beyond, FA3 plans with several thread blocks and without shares
PLANNED_HEAD_DIMS = (64, 128)
_SMALL_TILE = 64
_L2_BYTES = 32 * 2**20
_SIZES = tl.constexpr(16)
# What a share costs beside its tiles of keys, in tiles: fitted to timed batches on an H100.
_SHARE_COST = tl.constexpr(3)


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


def plan_variant(shape: CallShape, rows: int, max_query_len: int) -> tuple | None:
    """Return what a batch's plan is compiled for; None where there is no plan."""
    layout = _layout(shape, max_query_len)
    if layout is None or not 0 < rows <= MOST_ROWS:
        return None
    return *layout, _rows_at_a_time(rows)


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

    Of 16 sizes of share, 1.5 to 0.15 of an even part, the one is taken with which the batch should
    end first; the larger of two alike. `_rounds` says how that is estimated.

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
    Source: hopper/flash_prepare_scheduler.cu, tile_scheduler.hpp, flash_api.cpp:1054-1113.
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
        ROWS=_rows_at_a_time(rows),
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
    divisor = min(power_of_two(group), 16)
    return _L2_BYTES // divisor // (tile_keys * 2 * head_dim * 2)


def _rows_at_a_time(rows: int) -> int:
    return min(power_of_two(rows), 64)


def _round4(rows: int) -> int:
    return -(-rows // 4) * 4


@triton.jit
def _row_tiles(keys_of_layer, query_start_loc, row, rows, group, TILE_QUERIES, TILE_KEYS):
    """Return of each row: packed queries, tiles of queries, tiles of keys."""
    mask = row < rows
    first = tl.load(query_start_loc + row, mask=mask, other=0)
    packed = (tl.load(query_start_loc + row + 1, mask=mask, other=0) - first) * group
    keys = tl.load(keys_of_layer + row, mask=mask, other=0)
    query_tiles = (packed + TILE_QUERIES - 1) // TILE_QUERIES
    return packed, query_tiles, (keys + TILE_KEYS - 1) // TILE_KEYS


@triton.jit
def _splits(tiles, size, num_splits):
    """Return of each row how many shares of at most `size` tiles it is cut into."""
    return tl.maximum(tl.minimum((tiles + size - 1) // size, num_splits), 1)


@triton.jit
def _rounds(large, largest, small, most_small, num_sms):
    """Estimate when processors that take the small shares first have done the large ones, too.

    Args:
        large: number of large shares.
        largest: what the largest takes.
        small: number of small shares.
        most_small: what the largest of those takes, no more than `largest`.
        num_sms: processors.
    """
    before, late = small // num_sms * most_small, small % num_sms
    rounds, left = large // num_sms, large % num_sms
    # `late` processors have one small share more behind them than the others.
    end = before + rounds * largest + tl.where(late > 0, most_small, 0)
    end = tl.where(left > 0, before + (rounds + 1) * largest, end)
    return tl.where(left > num_sms - late, before + most_small + (rounds + 1) * largest, end)


@triton.jit
def _candidates(
    keys_of_layer,
    query_start_loc,
    rows,
    group,
    kv_heads,
    num_sms,
    num_splits,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the sizes of share to try, and with each of them the largest share: tiles, [16]."""
    lane = tl.arange(0, ROWS)
    work = tl.zeros([], dtype=tl.int64)
    for start in range(0, rows, ROWS):
        _, query_tiles, tiles = _row_tiles(
            keys_of_layer, query_start_loc, start + lane, rows, group, TILE_QUERIES, TILE_KEYS
        )
        work += tl.sum((query_tiles * tiles).to(tl.int64), axis=0)
    candidate = tl.arange(0, _SIZES)
    twentieths = tl.maximum(30 - 2 * candidate, 18 - candidate)  # 30, 28, .., 6, 5, 4, 3
    even = 20 * num_sms
    sizes = (work * kv_heads * twentieths + even - 1) // even
    sizes = tl.maximum(sizes, 1).to(tl.int32)
    largest = tl.zeros([_SIZES], dtype=tl.int32)
    for start in range(0, rows, ROWS):
        _, query_tiles, tiles = _row_tiles(
            keys_of_layer, query_start_loc, start + lane, rows, group, TILE_QUERIES, TILE_KEYS
        )
        splits = _splits(tiles[None, :], sizes[:, None], num_splits)
        share = tl.where(query_tiles[None, :] > 0, (tiles[None, :] + splits - 1) // splits, 0)
        largest = tl.maximum(largest, tl.max(share, axis=1))
    return sizes, largest


@triton.jit
def _choose_size(
    keys_of_layer,
    query_start_loc,
    rows,
    group,
    kv_heads,
    num_sms,
    num_splits,
    TILE_QUERIES: tl.constexpr,
    TILE_KEYS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Return the size of share, in tiles, with which the layer's call should end first."""
    sizes, largest = _candidates(
        keys_of_layer, query_start_loc, rows, group, kv_heads, num_sms, num_splits,
        TILE_QUERIES, TILE_KEYS, ROWS,
    )  # fmt: skip
    large = tl.zeros([_SIZES], dtype=tl.int32)
    small = tl.zeros([_SIZES], dtype=tl.int32)
    most_small = tl.zeros([_SIZES], dtype=tl.int32)
    cost = tl.zeros([_SIZES], dtype=tl.int64)
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        _, query_tiles, tiles = _row_tiles(
            keys_of_layer, query_start_loc, row, rows, group, TILE_QUERIES, TILE_KEYS
        )
        splits = _splits(tiles[None, :], sizes[:, None], num_splits)
        share = (tiles[None, :] + splits - 1) // splits
        count = query_tiles[None, :] * splits
        is_large = 4 * share > largest[:, None]
        large += tl.sum(tl.where(is_large, count, 0), axis=1)
        small += tl.sum(tl.where(is_large, 0, count), axis=1)
        of_small = tl.where(is_large | (count == 0), 0, share + _SHARE_COST)
        most_small = tl.maximum(most_small, tl.max(of_small, axis=1))
        cost += tl.sum((count * (share + _SHARE_COST)).to(tl.int64), axis=1)
    end = _rounds(large * kv_heads, largest + _SHARE_COST, small * kv_heads, most_small, num_sms)
    # No earlier than an even part of all shares.
    end = tl.maximum(end.to(tl.int64) * num_sms, cost * kv_heads)
    return tl.max(tl.where(end == tl.min(end, axis=0), sizes, 0), axis=0)


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
    keys_of_layer = seqused_k + layer * stride_keys
    size = _choose_size(
        keys_of_layer, query_start_loc, rows, group, kv_heads, num_sms, num_splits,
        TILE_QUERIES, TILE_KEYS, ROWS,
    )  # fmt: skip
    plan = plans + layer * stride_plans
    for start in range(0, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = row < rows
        packed, _, tiles = _row_tiles(
            keys_of_layer, query_start_loc, row, rows, group, TILE_QUERIES, TILE_KEYS
        )
        splits = _splits(tiles, size, num_splits)
        tl.store(plan + row, packed, mask=mask)
        tl.store(plan + rows_rounded + row, splits, mask=mask)
        if BY_L2:
            share = tl.maximum((tiles + splits - 1) // splits, 1)
            heads = tl.where(share * 2 <= tiles_in_l2, 2, 1)
            heads = tl.where(share * 4 <= tiles_in_l2, 4, heads)
            heads = tl.where(share * 8 <= tiles_in_l2, 8, heads)
            heads = tl.where(share * 16 <= tiles_in_l2, 16, heads)
            tl.store(plan + 2 * rows_rounded + row, tl.minimum(heads, kv_heads), mask=mask)
    tl.store(plan + (3 if BY_L2 else 2) * rows_rounded, 0)
