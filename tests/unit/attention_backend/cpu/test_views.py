"""Compacted block tables against the set of keys that SPARSE decode is defined to see.

Oracle: docs/VOCABULARY.md as a loop over positions: keys before S and from p - W + 1 on, each
edge widened to its whole block. Table tails hold block ids that no cache has, so that reading one
within a row's length is an error, as it would be in vLLM's kernel.
"""

import pytest
import torch

from flux_vllm.attention_backend.cpu.views import CompactView, compact_view

STALE = 2**30
SIZES = [(0, 1), (0, 16), (1, 1), (4, 7), (16, 16), (20, 24), (32, 128), (33, 31), (128, 100)]
LENGTHS = [1, 2, 15, 16, 17, 31, 32, 33, 43, 44, 45, 64, 65, 159, 160, 161, 200, 255, 256, 257, 300]


def tables(lens: list[int], block_size: int, spare: int = 1) -> torch.Tensor:
    """Give each row blocks of its own in a shuffled order, with a stale tail."""
    width = max(-(-max(lens, default=0) // block_size) + spare, 1)
    table = torch.full((len(lens), width), STALE, dtype=torch.int32)
    used = [-(-n // block_size) for n in lens]
    ids = torch.randperm(sum(used), dtype=torch.int32) + 1
    for row, part in enumerate(ids.split(used)):
        table[row, : len(part)] = part
    return table


def seen_positions(view: CompactView, row: int, table: torch.Tensor, block_size: int) -> list[int]:
    """List the positions that a compacted row's kernel reads, in order."""
    position_of = {
        int(block): index * block_size
        for index, block in enumerate(table[row].tolist())
        if block != STALE
    }
    seen = []
    for key in range(int(view.seq_lens[row])):
        block = int(view.block_table[row, key // block_size])
        assert block in position_of, f"row {row} reads key {key} in block {block}, not its own"
        seen.append(position_of[block] + key % block_size)
    return seen


def defined_positions(
    seq_len: int, query_len: int, block_size: int, sink_tokens: int, window_tokens: int
) -> list[int]:
    """List the keys that the last query sees, where the first query's window is kept."""
    first_query = seq_len - query_len
    blocks = set()
    for key in range(seq_len):
        if key < sink_tokens or key > first_query - window_tokens:
            blocks.add(key // block_size)
    return [key for key in range(seq_len) if key // block_size in blocks]


def check(
    lens: list[int], query_lens: list[int], block_size: int, sink_tokens: int, window_tokens: int
) -> None:
    table = tables(lens, block_size)
    before = table.clone()
    view = compact_view(
        table,
        torch.tensor(lens, dtype=torch.int32),
        torch.tensor(query_lens, dtype=torch.int32),
        block_size,
        sink_tokens,
        window_tokens,
    )
    assert torch.equal(table, before)
    assert view.block_table.shape == table.shape
    assert view.block_table.dtype == view.seq_lens.dtype == torch.int32
    for row, (seq_len, query_len) in enumerate(zip(lens, query_lens, strict=True)):
        expected = defined_positions(seq_len, query_len, block_size, sink_tokens, window_tokens)
        assert seen_positions(view, row, table, block_size) == expected, (seq_len, query_len)


@pytest.mark.parametrize("block_size", [16, 32, 128], ids=lambda b: f"B{b}")
@pytest.mark.parametrize(("sink", "window"), SIZES, ids=[f"S{s}-W{w}" for s, w in SIZES])
class TestCompactView:
    def test_decode_rows(self, sink: int, window: int, block_size: int) -> None:
        check(LENGTHS, [1] * len(LENGTHS), block_size, sink, window)

    @pytest.mark.parametrize("query_len", [2, 3, 5, 17])
    def test_several_queries(self, sink, window, block_size: int, query_len: int) -> None:
        """Speculative decoding: the first query's window is there, so no query lacks a key."""
        lens = [n for n in LENGTHS if n >= query_len]
        check(lens, [query_len] * len(lens), block_size, sink, window)

    def test_mixed_batch_with_padding(self, sink, window, block_size: int) -> None:
        lens = [0, 300, 1, 0, 161, 44, 0]
        query_lens = [0, 1, 1, 0, 4, 2, 0]
        check(lens, query_lens, block_size, sink, window)


def test_short_rows_are_unchanged() -> None:
    """Where sinks and window touch, the compacted row is the row itself."""
    lens = [1, 20, 44, 47, 48]
    table = tables(lens, 16)
    seq_lens = torch.tensor(lens, dtype=torch.int32)
    view = compact_view(table, seq_lens, torch.ones(5, dtype=torch.int32), 16, 20, 24)
    assert torch.equal(view.seq_lens, seq_lens)
    for row, seq_len in enumerate(lens):
        blocks = -(-seq_len // 16)
        assert torch.equal(view.block_table[row, :blocks], table[row, :blocks])


def test_view_length_is_bounded() -> None:
    """A SPARSE row never reads more than sinks and window, each rounded to whole blocks."""
    lens = list(range(1, 2000, 7))
    view = compact_view(
        tables(lens, 16),
        torch.tensor(lens, dtype=torch.int32),
        torch.ones(len(lens), dtype=torch.int32),
        16,
        20,
        24,
    )
    assert int(view.seq_lens.max()) <= 32 + 24 + 15


def test_padding_rows_have_no_length() -> None:
    view = compact_view(
        torch.full((3, 4), STALE, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        torch.zeros(3, dtype=torch.int32),
        16,
        20,
        24,
    )
    assert view.seq_lens.tolist() == [0, 0, 0]


def test_no_rows() -> None:
    empty = torch.empty(0, dtype=torch.int32)
    view = compact_view(torch.empty(0, 4, dtype=torch.int32), empty, empty, 16, 20, 24)
    assert view.block_table.shape == (0, 4)
    assert view.seq_lens.shape == (0,)
