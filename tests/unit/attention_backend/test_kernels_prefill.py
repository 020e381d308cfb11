"""Triton prefill and the sink merge against the float32 oracle, rows switched on the device."""

import pytest
import torch

from flux_vllm.attention_backend.kernels import fa3
from flux_vllm.attention_backend.kernels.paged import PagedRows
from flux_vllm.attention_backend.kernels.sink_merge import merge_sinks
from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from flux_vllm.attention_backend.kernels.triton_prefill import PrefillTile, attend_prefill
from tests.helpers.oracle import naive
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

S, W = 20, 24

# Whole prompts around every edge, chunks at odd offsets, one-token chunks, padding, both routes.
AWKWARD = [
    Row(1, 1, SPARSE),
    Row(15, 15, SPARSE),
    Row(16, 16, FULL),
    Row(17, 17, SPARSE),
    Row(0, 0, SPARSE),
    Row(S + W - 1, S + W - 1, SPARSE),
    Row(S + W, S + W, SPARSE),
    Row(S + W + 1, S + W + 1, SPARSE),
    Row(13, 60, SPARSE),
    Row(37, 101, FULL),
    Row(5, 40, SPARSE),
    Row(1, 130, SPARSE),
    Row(1, 77, FULL),
    Row(70, 133, SPARSE),
    Row(0, 0, FULL),
]
FEW = [Row(1, 1, SPARSE), Row(50, 83, SPARSE), Row(3, 47, FULL), Row(0, 0), Row(21, 91, SPARSE)]
SHAPES = [
    (Shape(), AWKWARD),
    (Shape(dtype=torch.bfloat16), FEW),
    (Shape(dtype=torch.float32), FEW),
    (Shape(heads=3, kv_heads=3), FEW),
    (Shape(heads=9, kv_heads=3), FEW),
    (Shape(heads=8, kv_heads=1, head_dim=128), FEW),
    (Shape(head_dim=96), FEW),
    (Shape(heads=2, kv_heads=1, head_dim=256), FEW),
    (Shape(block_size=64), FEW),
    (Shape(block_size=48, sink_tokens=16, window_tokens=32), FEW),
    (Shape(sink_tokens=0, window_tokens=5), FEW),
    (Shape(sink_tokens=1, window_tokens=1), FEW),
    (Shape(sink_tokens=40, window_tokens=3), FEW),
    (Shape(learned_sinks=True), AWKWARD),
    (Shape(heads=16, kv_heads=2, dtype=torch.bfloat16, learned_sinks=True), FEW),
    (Shape(heads=3, kv_heads=3, dtype=torch.float32, learned_sinks=True), FEW),
    (Shape(heads=9, kv_heads=3, sink_tokens=0, window_tokens=5, learned_sinks=True), FEW),
    (Shape(sink_tokens=40, window_tokens=3, learned_sinks=True), FEW),
    (Shape(float8=True), AWKWARD),
    (Shape(heads=16, kv_heads=2, dtype=torch.bfloat16, learned_sinks=True, float8=True), FEW),
    (Shape(head_dim=96, sink_tokens=40, window_tokens=3, float8=True), FEW),
    (Shape(heads=3, kv_heads=3, dtype=torch.float32, block_size=48, float8=True), FEW),
]
IDS = [f"{shape}-R{len(rows)}" for shape, rows in SHAPES]


def rows_of(batch: PagedBatch, seqused_q: torch.Tensor) -> PagedRows:
    return PagedRows(batch.block_table, None, batch.query_start_loc, batch.seq_lens, seqused_q)


def attend(batch: PagedBatch, out: torch.Tensor, seqused_q: torch.Tensor, sparse: bool) -> None:
    attend_prefill(
        batch.query,
        batch.cache,
        out,
        rows_of(batch, seqused_q),
        scale=batch.scale,
        sparse=sparse,
        sink_tokens=batch.shape.sink_tokens,
        window_tokens=batch.shape.window_tokens,
        sink_logits=batch.sink_logits,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "rows"), SHAPES, ids=IDS)
def test_attend_prefill_matches_the_oracle(device: str, shape: Shape, rows: list[Row]) -> None:
    batch = make_batch(rows, shape, device)
    out = batch.poisoned_output()
    sparse_rows = [row.route == SPARSE for row in rows]
    attend(batch, out, batch.seqused_q(sparse_rows), sparse=True)
    check_rows(batch, out, sparse_rows)
    attend(batch, out, batch.seqused_q([not sparse for sparse in sparse_rows]), sparse=False)
    check_rows(batch, out, [True] * len(rows))


@pytest.mark.parametrize("device", DEVICES)
def test_attend_prefill_reads_the_table_row_it_is_given(device: str) -> None:
    batch = make_batch([Row(9, 30), Row(4, 70, SPARSE)], Shape(), device)
    batch.block_table = torch.cat([torch.zeros_like(batch.block_table), batch.block_table.flip(0)])
    out = batch.poisoned_output()
    table_rows = torch.tensor([3, 2], dtype=torch.int32, device=device)
    rows = rows_of(batch, batch.seqused_q([True, True]))._replace(kv_batch_idx=table_rows)
    attend_prefill(batch.query, batch.cache, out, rows, scale=batch.scale, sparse=False)
    batch.block_table = batch.block_table[2:].flip(0)
    batch.rows[1] = Row(4, 70, FULL)
    check_rows(batch, out, [True, True])


def window_pass(batch: PagedBatch, seqused_q: list[bool]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the window alone, with its log-sum-exp: what FA3 hands to `merge_sinks`."""
    out = batch.poisoned_output()
    lse = torch.full((batch.shape.heads, len(out)), float("nan"), device=out.device)
    for index, row in enumerate(batch.rows):
        if not seqused_q[index] or not row.query_len:
            continue
        key, value = (
            naive.gather_pages(cache, batch.block_table[index], row.seq_len).float()
            for cache in batch.meant[:2]
        )
        positions = range(row.seq_len - row.query_len, row.seq_len)
        mask = naive.prefill_mask(positions, SPARSE, 0, batch.shape.window_tokens)
        tokens = batch.tokens_of(index)
        query = batch.query[tokens].float()
        out[tokens] = naive.attend(query, key, value, mask, batch.scale).to(out.dtype)
        group = batch.shape.heads // batch.shape.kv_heads
        scores = torch.einsum("qnh,snh->nqs", query, key.repeat_interleave(group, dim=1))
        scores = (scores * batch.scale).masked_fill(~mask.to(out.device), float("-inf"))
        lse[:, tokens] = scores.logsumexp(dim=-1)
    return out, lse


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("shape", "rows"), SHAPES, ids=IDS)
def test_merge_sinks_completes_the_window(device: str, shape: Shape, rows: list[Row]) -> None:
    batch = make_batch(rows, shape, device)
    sparse_rows = [row.route == SPARSE for row in rows]
    out, lse = window_pass(batch, sparse_rows)
    merge_sinks(
        batch.query,
        batch.cache,
        out,
        lse,
        rows_of(batch, batch.seqused_q(sparse_rows)),
        scale=batch.scale,
        sink_tokens=shape.sink_tokens,
        window_tokens=shape.window_tokens,
        sink_logits=batch.sink_logits,
    )
    check_rows(batch, out, sparse_rows)


@pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here")
def test_sparse_prefill_gives_fa3_float8_queries_and_the_sinks_the_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """FlashAttention-3 stood in for by `window_pass`; the merge reads the queries themselves."""
    batch = make_batch(FEW, Shape(dtype=torch.bfloat16, float8=True), "cpu")
    sparse_rows = [row.route == SPARSE for row in FEW]
    float8, out = batch.float8, batch.poisoned_output()
    assert float8 is not None

    def attend(*args: object, **given: object) -> torch.Tensor:
        assert given["float8"] is float8
        assert given["window_tokens"] == batch.shape.window_tokens
        window, lse = window_pass(batch, sparse_rows)
        out.copy_(window)
        return lse

    monkeypatch.setattr(fa3, "attend", attend)
    fa3.attend_sparse_prefill(
        batch.query,
        batch.cache,
        out,
        rows_of(batch, batch.seqused_q(sparse_rows)),
        max_query_len=50,
        max_seq_len=91,
        scale=batch.scale,
        sink_tokens=batch.shape.sink_tokens,
        window_tokens=batch.shape.window_tokens,
        float8=float8,
    )
    check_rows(batch, out, sparse_rows)


class Tails:
    """The last queries of each row as a row of their own, that begins further on in the batch.

    An index of -1 reads what is in front of a tensor: that is a whole row here.
    """

    lengths = (3, 9, 20)

    def __init__(self, device: str, route: int, learned_sinks: bool = False) -> None:
        rows = [Row(140, 150, route), Row(9, 30, route), Row(50, 83, route)]
        self.batch = batch = make_batch(rows, Shape(learned_sinks=learned_sinks), device)
        lengths = torch.tensor(self.lengths, dtype=torch.int32, device=device)
        ends = batch.query_start_loc[1:]
        self.seqused_q = self._after(lengths, [140])
        batch.query_start_loc = self._after(torch.cat([ends - lengths, ends[-1:]]), [0])
        batch.seq_lens = self._after(batch.seq_lens, [150])
        batch.block_table = self._after(batch.block_table, batch.block_table[0].tolist())

    @staticmethod
    def _after(values: torch.Tensor, row: list[int]) -> torch.Tensor:
        before = torch.tensor(row, dtype=torch.int32, device=values.device)
        return torch.cat([before.expand(1, *values.shape[1:]), values])[1:]

    def check(self, out: torch.Tensor, untouched: torch.Tensor) -> None:
        """Hold the tails to the oracle, and all else to what it was."""
        exact, low = self.batch.oracle(), self.batch.oracle(self.batch.shape.dtype)
        for index, length in enumerate(self.lengths):
            tokens = self.batch.tokens_of(index)
            head = slice(tokens.start, tokens.stop - length)
            tail = slice(head.stop, tokens.stop)
            torch.testing.assert_close(out[head], untouched[head], rtol=0, atol=0, equal_nan=True)
            assert_as_exact_as_torch(out[tail], exact[tail], low[tail], f"row {index}")


@pytest.mark.parametrize("device", DEVICES)
def test_attend_prefill_of_the_last_queries_alone(device: str) -> None:
    tails = Tails(device, FULL)
    out = tails.batch.poisoned_output()
    attend(tails.batch, out, tails.seqused_q, sparse=False)
    tails.check(out, tails.batch.poisoned_output())


@pytest.mark.parametrize("learned_sinks", [False, True], ids=["", "sinks"])
@pytest.mark.parametrize("device", DEVICES)
def test_merge_sinks_of_the_last_queries_alone(device: str, learned_sinks: bool) -> None:
    tails = Tails(device, SPARSE, learned_sinks)
    batch = tails.batch
    out, lse = window_pass(batch, [True] * len(batch.rows))
    untouched = out.clone()
    merge_sinks(
        batch.query,
        batch.cache,
        out,
        lse,
        rows_of(batch, tails.seqused_q),
        scale=batch.scale,
        sink_tokens=batch.shape.sink_tokens,
        window_tokens=batch.shape.window_tokens,
        sink_logits=batch.sink_logits,
    )
    tails.check(out, untouched)


LONG = [
    Shape(heads=32, kv_heads=8, head_dim=128, dtype=torch.bfloat16, sink_tokens=128,
          window_tokens=2048),
    Shape(heads=8, kv_heads=8, head_dim=64, dtype=torch.float16, sink_tokens=100,
          window_tokens=1000, block_size=128),
    Shape(heads=16, kv_heads=1, head_dim=128, dtype=torch.bfloat16, sink_tokens=128,
          window_tokens=1024, block_size=32),
    Shape(heads=6, kv_heads=2, head_dim=256, dtype=torch.bfloat16, sink_tokens=64,
          window_tokens=512),
    Shape(heads=4, kv_heads=4, head_dim=96, dtype=torch.float16, sink_tokens=64,
          window_tokens=512),
    # gpt-oss.
    Shape(heads=64, kv_heads=8, head_dim=64, dtype=torch.bfloat16, sink_tokens=64,
          window_tokens=1024, learned_sinks=True),
]  # fmt: skip


LONG_CASES = [(shape, length) for shape in LONG for length in (2175, 2176, 2177, 4097)]
LONG_CASES.append((LONG[0], 70_000))
LONG_IDS = [f"{shape}-{length}" for shape, length in LONG_CASES]


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(("shape", "length"), LONG_CASES, ids=LONG_IDS)
def test_attend_prefill_long(device: str, shape: Shape, length: int) -> None:
    query_len = min(length, 301)
    rows = [Row(query_len, length, SPARSE), Row(7, 2005, FULL), Row(257, length - 1, FULL)]
    batch = make_batch(rows, shape, device)
    out = batch.poisoned_output()
    attend(batch, out, batch.seqused_q([True, False, False]), sparse=True)
    attend(batch, out, batch.seqused_q([False, True, True]), sparse=False)
    exact = torch.cat([_by_torch(batch, row, torch.float32) for row in range(3)])
    low = torch.cat([_by_torch(batch, row, shape.dtype) for row in range(3)])
    assert_as_exact_as_torch(out, exact, low)


@pytest.mark.parametrize("device", DEVICES[1:])
@pytest.mark.parametrize(
    "tile", [(64, 32, 4, 2), (64, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (128, 128, 8, 2)]
)
def test_attend_prefill_with_any_tile(device: str, tile: tuple[int, int, int, int]) -> None:
    shape = LONG[0]
    batch = make_batch([Row(517, 5001, SPARSE), Row(64, 3000, SPARSE)], shape, device)
    out = batch.poisoned_output()
    attend_prefill(
        batch.query,
        batch.cache,
        out,
        rows_of(batch, batch.seqused_q([True, True])),
        scale=batch.scale,
        sparse=True,
        sink_tokens=shape.sink_tokens,
        window_tokens=shape.window_tokens,
        tile=PrefillTile(*tile),
    )
    exact = torch.cat([_by_torch(batch, row, torch.float32) for row in range(2)])
    low = torch.cat([_by_torch(batch, row, shape.dtype) for row in range(2)])
    assert_as_exact_as_torch(out, exact, low)


def _by_torch(batch: PagedBatch, index: int, dtype: torch.dtype) -> torch.Tensor:
    """Attend one row by masks built on the device: the oracle for lengths its loops cannot do."""
    row = batch.rows[index]
    device = batch.query.device
    key, value = (
        naive.gather_pages(cache, batch.block_table[index], row.seq_len)
        for cache in batch.meant[:2]
    )
    position = torch.arange(row.seq_len - row.query_len, row.seq_len, device=device)[:, None]
    keys = torch.arange(row.seq_len, device=device)[None, :]
    mask = keys <= position
    if row.route == SPARSE:
        near = keys > position - batch.shape.window_tokens
        mask &= near | (keys < batch.shape.sink_tokens)
    group = batch.shape.heads // batch.shape.kv_heads
    query = batch.query[batch.tokens_of(index)]
    heads = [
        naive.attend(
            query[:, n : n + group],
            key[:, k : k + 1],
            value[:, k : k + 1],
            mask,
            batch.scale,
            dtype,
            None if batch.sink_logits is None else batch.sink_logits[n : n + group],
        )  # fmt: skip
        for k, n in enumerate(range(0, batch.shape.heads, group))
    ]
    return torch.cat(heads, dim=1)
