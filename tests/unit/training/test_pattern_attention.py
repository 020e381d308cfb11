"""Oracle: the patterns' definitions in `tests/helpers/oracle`, chunk by chunk, and naive."""

from typing import Any

import pytest
import torch

from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.patterns import make_pattern, streaming, triangle, xattention
from flux_vllm.patterns.base import SparsePattern
from flux_vllm.patterns.xattention import BLOCK
from tests.helpers.oracle import naive
from tests.helpers.oracle.masks import visible
from training.block_attention import attend_blocks, choose_blocks, make_block_mask, pad_to_blocks
from training.pattern_attention import PromptAttention, make_pattern_attention
from training.soft_attention import make_sparse_attention

SINK, WINDOW, SCALE = 16, 48, 0.3
CPU = torch.device("cpu")
NAMES = ["streaming", "triangle", "xattention"]
# Below and at sink + window, one above; around blocks; shorter than triangle's tail; in chunks
# whose edges lie on blocks, on strides and on neither; prompts with more chunks than others.
BATCHES: list[list[list[int]]] = [
    [[1], [64], [65]],
    [[127], [128], [129], [300]],
    [[700], [90]],
    [[128, 384, 600], [128, 200]],
    [[97, 194, 291, 388], [97, 180], [50]],
    [[16, 144, 555]],
]


def states(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int = 16
) -> list[torch.Tensor]:
    """Draw queries that look for few keys, so that few blocks hold most of the attention."""
    q = torch.randn(batch, heads, tokens, head_dim)
    k, v = torch.randn(2, batch, kv_heads, tokens, head_dim)
    topics = torch.randn(6, head_dim)
    for x, strength in ((q, 2.0), (k, 1.5)):
        # A topic lasts for 64 tokens.
        drawn = torch.randint(0, 6, (*x.shape[:2], tokens // 64 + 1))
        x += strength * topics[drawn].repeat_interleave(64, dim=2)[:, :, :tokens]
    return [q, k, v]


def oracle(
    pattern: SparsePattern, rows: list[torch.Tensor], ends: list[int]
) -> tuple[torch.Tensor, float]:
    """Attend one prompt with its answer: [T, N, H]; and count the pairs its prompt attends to."""
    q, k, v = (x.transpose(0, 1) for x in rows)
    answer = streaming.Pattern(sink_tokens=SINK, window_tokens=WINDOW)
    spans = [*zip([0, *ends], ends, [pattern] * len(ends), strict=False)]
    out, pairs = [], 0.0
    for begin, end, rule in [*spans, (ends[-1], len(q), answer)]:
        mask = visible(rule, q[begin:end], k[:end], ends[-1], SCALE)
        out.append(naive.attend(q[begin:end], k[:end], v[:end], mask, SCALE))
        if rule is pattern:
            pairs += float(mask.sum()) / (mask.shape[0] if mask.dim() == 3 else 1)
    return torch.cat(out), pairs


def attention(pattern: SparsePattern, kernel: str = "sdpa") -> Any:
    return make_pattern_attention(pattern, make_sparse_attention(kernel, SINK, WINDOW), kernel)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk_ends", BATCHES, ids=str)
@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (4, 1)], ids=["g1", "g4"])
def test_attends_as_the_pattern_defines(
    name: str, chunk_ends: list[list[int]], heads: int, kv_heads: int
) -> None:
    pattern = make_pattern(name, SINK, WINDOW)
    tokens = max(ends[-1] for ends in chunk_ends) + 70
    drawn = states(len(chunk_ends), tokens, heads, kv_heads)
    found, density = attention(pattern)(*drawn, SCALE, chunk_ends)
    assert not found.isnan().any()
    for row, ends in enumerate(chunk_ends):
        expected, pairs = oracle(pattern, [x[row] for x in drawn], ends)
        torch.testing.assert_close(found[row].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)
        assert density[row] * ends[-1] * (ends[-1] + 1) / 2 == pytest.approx(pairs, rel=1e-5)


def test_a_pattern_of_the_server_alone_is_refused() -> None:
    class Other(SparsePattern):
        name = "other"
        reach = 1
        is_local = True

        def prefill_keys(self, batch: Any) -> None:
            return

    with pytest.raises(UnsupportedConfigurationError, match="found 'other'"):
        attention(Other(sink_tokens=SINK, window_tokens=WINDOW))


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (triangle.Pattern, {"tail_tokens": 7}),
        (triangle.Pattern, {"tail_tokens": 4096}),
        (xattention.Pattern, {"threshold": 0.5}),
        (xattention.Pattern, {"threshold": 1.0, "stride": 8}),
    ],
    ids=str,
)
def test_options_mean_the_same(kind: type[SparsePattern], options: dict[str, Any]) -> None:
    pattern = kind(sink_tokens=SINK, window_tokens=WINDOW, **options)
    drawn = states(1, 520, 4, 2)
    found, _ = attention(pattern)(*drawn, SCALE, [[450]])
    expected, _ = oracle(pattern, [x[0] for x in drawn], [450])
    torch.testing.assert_close(found[0].transpose(0, 1), expected, rtol=1e-4, atol=1e-5)


def test_patterns_differ_where_they_should() -> None:
    drawn = states(1, 900, 4, 2)
    outs, densities = {}, {}
    for name in NAMES:
        out, density = attention(make_pattern(name, SINK, WINDOW))(*drawn, SCALE, [[800]])
        outs[name], densities[name] = out, float(density)
    assert densities["streaming"] < densities["triangle"] < 1
    assert densities["xattention"] < 0.9  # blocks are left out, so the oracle's choice is tested
    for name in ("triangle", "xattention"):
        assert torch.equal(outs[name][:, :, 800:], outs["streaming"][:, :, 800:])
        assert (outs[name] - outs["streaming"])[:, :, 672:800].abs().max() > 0.1
    assert torch.equal(outs["triangle"][:, :, :672], outs["streaming"][:, :, :672])


def test_chosen_rows_attend_and_count_as_in_the_batch() -> None:
    pattern = make_pattern("xattention", SINK, WINDOW)
    chunk_ends = [[400], [128, 350], [300]]
    drawn = states(3, 420, 4, 2)
    together = PromptAttention(attention(pattern), chunk_ends, CPU)
    expected = together(*drawn, SCALE)
    apart = PromptAttention(attention(pattern), chunk_ends, CPU)
    for _ in range(2):
        found = apart.select([2, 1])(*(x[[2, 1]] for x in drawn), SCALE)
        torch.testing.assert_close(found, expected[[2, 1]])
    torch.testing.assert_close(apart.density()[1:], together.density()[1:])
    assert apart.density()[0].isnan()


@pytest.mark.parametrize("threshold", [0.6, 0.9])
@pytest.mark.parametrize(("begin", "end"), [(0, 650), (300, 521), (387, 650)])
def test_choice_is_the_definitions_for_noise(begin: int, end: int, threshold: float) -> None:
    """Noise makes close choices: the order along anti-diagonals shows, and one key too many."""
    pattern = xattention.Pattern(sink_tokens=SINK, window_tokens=WINDOW, threshold=threshold)
    q, k = 2 * torch.randn(2, 2, 16, 650, 16)
    k = k[:, ::2]
    chosen = choose_blocks(*map(pad_to_blocks, (q, k)), [begin] * 2, [end] * 2, pattern, SCALE)
    for row in range(2):
        queries, keys = q[row, :, begin:end].transpose(0, 1), k[row, :, :end].transpose(0, 1)
        mask = visible(pattern, queries, keys, 650, SCALE)
        # Every block holds a key that the chunk's last query in the query block sees.
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            last = min(end, (block + 1) * BLOCK) - 1
            seen = mask[:, last - begin, ::BLOCK]
            assert torch.equal(chosen.kept[row, :, block, : seen.shape[1]], seen)
    assert torch.equal(chosen.queries[0].nonzero()[:, 0], torch.arange(begin, end))


def test_block_mask_holds_the_kept_blocks() -> None:
    """flex_attention visits its lists; what they hold is what was kept, and no more."""
    q, k, _ = map(pad_to_blocks, states(2, 1000, 4, 2))
    pattern = xattention.Pattern(sink_tokens=SINK, window_tokens=WINDOW)
    kept = choose_blocks(q, k, [300, 0], [700, 1000], pattern, SCALE).kept
    assert kept[0, :, 2:6].any()
    assert not kept[0, :, 2:6].tril().all()
    mask = make_block_mask(kept)
    assert torch.equal(mask.to_dense().bool(), kept)
    assert (mask.kv_num_blocks <= 1).all()
    for block in range(8):  # only the diagonal is masked within
        assert (mask.kv_indices[:, :, block, 0][mask.kv_num_blocks[:, :, block] > 0] == block).all()
    position = torch.arange(1024)
    assert torch.equal(
        mask.mask_mod(0, 0, position[:, None], position), position[:, None] >= position
    )


def test_flex_blocks_match_sdpa_on_the_cpu() -> None:
    q, k, v = map(pad_to_blocks, states(2, 700, 4, 2))
    pattern = xattention.Pattern(sink_tokens=SINK, window_tokens=WINDOW)
    kept = choose_blocks(q, k, [0, 0], [700, 500], pattern, SCALE).kept
    expected = attend_blocks(q, k, v, kept, SCALE, "sdpa")
    found = attend_blocks(q, k, v, kept, SCALE, "flex")
    torch.testing.assert_close(found[0], expected[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1, :, :500], expected[1, :, :500], rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("tokens", [128, 640, 1152])
def test_patterns_match_sdpa_on_a_gpu(name: str, rows: int, tokens: int) -> None:
    pattern = make_pattern(name, SINK, 256)
    sparse = {kernel: make_sparse_attention(kernel, SINK, 256) for kernel in ("flex", "sdpa")}
    drawn = [x.cuda().bfloat16() for x in states(rows, tokens, 6, 2, head_dim=64)]
    chunk_ends = [[tokens - 60], [100, tokens - 20]][:rows]
    with torch.inference_mode():
        found, density = make_pattern_attention(pattern, sparse["flex"], "flex")(
            *drawn, SCALE, chunk_ends
        )
        plain, expected_density = make_pattern_attention(pattern, sparse["sdpa"], "sdpa")(
            *(x.cpu() for x in drawn), SCALE, chunk_ends
        )
        expected, _ = make_pattern_attention(pattern, sparse["sdpa"], "sdpa")(
            *(x.cpu().float() for x in drawn), SCALE, chunk_ends
        )
    bound = 2 * (plain.float() - expected).abs().max() + 1e-3
    assert (found.cpu().float() - expected).abs().max() <= bound
    torch.testing.assert_close(density.cpu(), expected_density, rtol=1e-2, atol=1e-3)
