"""Triton decode against the float32 oracle's mask, its edges widened to whole blocks."""

import pytest
import torch

from flux_vllm.attention_backend.kernels.triton_decode import (
    DecodeWorkspace,
    attend_decode,
    choose_num_splits,
    decode_workspace,
    most_shares,
)
from tests.helpers.oracle import naive
from tests.unit.attention_backend.decode_rows import (
    IDS,
    SHAPES,
    SPECULATIVE,
    Views,
    decode,
    views_of,
)
from tests.unit.attention_backend.test_kernels_cases import (
    DEVICES,
    FULL,
    SPARSE,
    PagedBatch,
    Row,
    Shape,
    assert_as_exact_as_torch,
    check_rows,
    make_batch,
)


def run_decode(
    batch: PagedBatch,
    views: Views,
    splits: int,
    workspace: DecodeWorkspace | None = None,
    **extra: object,
) -> torch.Tensor:
    out = batch.poisoned_output()
    tokens, heads, head_dim = batch.query.shape
    if workspace is None:
        workspace = decode_workspace(tokens + 3, heads, head_dim, splits, batch.query.device)
    workspace.out.fill_(float("nan"))
    workspace.lse.fill_(float("nan"))
    attend_decode(
        batch.query,
        batch.cache,
        out,
        views.rows_of(batch),
        workspace,
        max_query_len=max(row.query_len for row in batch.rows),
        scale=batch.scale,
        sink_logits=batch.sink_logits,
        **extra,
    )
    return out


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "rows", "splits"), SHAPES, ids=IDS)
def test_attend_decode_matches_the_oracle(
    device: str, shape: Shape, rows: list[Row], splits: int
) -> None:
    batch = make_batch(rows, shape, device)
    out = run_decode(batch, views_of(batch), splits)
    check_rows(batch, out, [True] * len(rows))


def test_choose_num_splits_fills_the_gpu_and_no_more() -> None:
    assert choose_num_splits(1, 8, 132) == 64
    assert choose_num_splits(16, 8, 132) == 8
    assert choose_num_splits(1024, 8, 132) == 1


def test_most_shares_levels_off() -> None:
    """One workspace is enough for all batches: many rows are split in fewer shares each."""
    for rows in (1, 2, 16, 66):
        splits = [choose_num_splits(n, 8, 132) for n in range(1, rows + 1)]
        assert most_shares(rows, 8, 132) == max(n * p for n, p in enumerate(splits, 1) if p > 1)
    assert most_shares(256, 8, 132) == most_shares(4096, 8, 132) == 130
    assert most_shares(64, 8, 2) == 0  # one share fills the GPU


@pytest.mark.parametrize("tokens", [1, 5, 6, 11, 100])
def test_fit_halves_the_splits_of_a_batch_too_large(tokens: int) -> None:
    workspace = decode_workspace(20, 3, 16, 2, torch.device("cpu"))
    splits = workspace.fit(8, tokens, 3, 16).num_splits
    assert splits == {1: 8, 5: 8, 6: 4, 11: 2, 100: 1}[tokens]
    assert splits == 1 or tokens * splits <= 40


@pytest.mark.parametrize("device", DEVICES)
def test_attend_decode_in_one_share_needs_no_workspace(device: str) -> None:
    batch = make_batch(SPECULATIVE, Shape(), device)
    out = run_decode(batch, views_of(batch), 1, decode_workspace(0, 1, 1, 1, batch.query.device))
    check_rows(batch, out, [True] * len(batch.rows))


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(
    ("shape", "longest"),
    [
        (Shape(32, 8, 128, 16, torch.bfloat16, 128, 2048), 70_000),
        (Shape(16, 1, 64, 128, torch.float16, 100, 1000), 9_000),
        (Shape(4, 4, 256, 32, torch.bfloat16, 64, 512), 9_000),
    ],
    ids=["N32-K8-H128-70000", "N16-K1-H64-9000", "N4-K4-H256-9000"],
)
def test_attend_decode_long(device: str, shape: Shape, longest: int) -> None:
    rows = [
        decode(longest, SPARSE),
        decode(longest, FULL, 3),
        decode(2177, SPARSE, 4),
        Row(0, 0),
        decode(1, FULL),
        decode(longest // 2 - 1, SPARSE, 2),
    ]
    batch = make_batch(rows, shape, device)
    views = views_of(batch)
    exact, low = ([], [])
    for index, row in enumerate(rows):
        if not row.query_len:
            continue
        keys = int(views.seqused_k[0, index])
        table = views.table2[int(views.kv_batch_idx[0, index])]
        key, value = (
            naive.gather_pages(cache, table, keys) for cache in (batch.key_cache, batch.value_cache)
        )
        mask = torch.ones(row.query_len, keys, dtype=torch.bool, device=device)
        mask = mask.tril(keys - row.query_len)
        query = batch.query[batch.tokens_of(index)]
        exact.append(naive.attend(query, key, value, mask, batch.scale))
        low.append(naive.attend(query, key, value, mask, batch.scale, shape.dtype))
    for splits in (1, 8, 64):
        out = run_decode(batch, views, splits)
        assert_as_exact_as_torch(out, torch.cat(exact), torch.cat(low), f"{splits} splits")
