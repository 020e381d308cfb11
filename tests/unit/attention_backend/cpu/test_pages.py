"""Reading blocks back from vLLM's CPU KV cache, whatever order its writer keeps them in.

Oracle: the keys and values that went through vLLM's own `cpu_attn_reshape_and_cache`, bit for bit;
of a float8 cache, numbers that float8 can say, times a scale.
Packings of instruction sets that this machine lacks (AMX, NEON) are stood in for by fake writers
that permute; a writer that loses numbers must be refused, not read wrongly.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flux_vllm.attention_backend.cpu import pages
from flux_vllm.errors import UnsupportedConfigurationError
from tests.helpers.float8 import KINDS

pytestmark = pytest.mark.vllm

BLOCKS, KV_HEADS = 7, 3
# (isa, block_size, head_dim), as vLLM pairs them: vec16 where 32 divides not both.
REAL = [
    ("vec", 32, 32),
    ("vec", 32, 64),
    ("vec", 128, 64),
    ("vec", 64, 128),
    ("vec", 128, 256),
    ("vec16", 16, 64),
    ("vec16", 32, 80),
    ("vec16", 48, 112),
]


def write(
    cache: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slots: torch.Tensor, isa: str
) -> None:
    """Write tokens as vLLM's CPUAttentionBackendImpl.do_kv_cache_update does."""
    blocks, heads, block_size, _ = cache.shape
    keys, values = cache.view(blocks, heads, block_size * 2, -1).chunk(2, dim=2)
    pages.ops.cpu_attn_reshape_and_cache(
        key, value, keys, values, slots, isa, k_scale=1.0, v_scale=1.0, kv_cache_dtype="auto"
    )


def check_gather(
    layout: pages.PageLayout, isa: str, block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    cache = torch.full((BLOCKS, KV_HEADS, block_size, 2 * head_dim), 99.0, dtype=dtype)
    order = torch.tensor([5, 2, 6, 1])  # blocks of one request, in token order
    tokens = 3 * block_size + 5
    key, value = torch.randn(2, tokens, KV_HEADS, head_dim).to(dtype)
    positions = torch.arange(tokens)
    slots = order[positions // block_size] * block_size + positions % block_size
    # In two steps, as chunks come, the first ending inside a block.
    for part in (slice(0, block_size + 3), slice(block_size + 3, tokens)):
        write(cache, key[part], value[part], slots[part], isa)
    keys, values = layout.gather(cache, order)
    assert keys.shape == values.shape == (KV_HEADS, 4 * block_size, head_dim)
    assert torch.equal(keys[:, :tokens], key.transpose(0, 1))
    assert torch.equal(values[:, :tokens], value.transpose(0, 1))
    middle, _ = layout.gather(cache, order[1:2])
    assert torch.equal(middle, keys[:, block_size : 2 * block_size])


@pytest.fixture
def fake_writer(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Install a writer that stores each half page through a function of its flat elements."""

    def install(pack: Callable[[torch.Tensor], torch.Tensor]) -> None:
        def reshape_and_cache(
            key: torch.Tensor,
            value: torch.Tensor,
            key_cache: torch.Tensor,
            value_cache: torch.Tensor,
            slots: torch.Tensor,
            isa: str,
            **_options: Any,
        ) -> None:
            _, heads, block_size, head_dim = key_cache.shape
            # Where each element of a page would lie.
            place = pack(torch.arange(block_size * head_dim)).view(block_size, head_dim)
            for token, slot in enumerate(slots.tolist()):
                block, offset = divmod(slot, block_size)
                for head in range(heads):
                    for source, target in ((key, key_cache), (value, value_cache)):
                        page = target[block, head].flatten()
                        page[place[offset]] = source[token, head]
                        target[block, head] = page.view(block_size, head_dim)

        monkeypatch.setattr(pages.ops, "cpu_attn_reshape_and_cache", reshape_and_cache)

    return install


def learn(*arguments: Any) -> pages.PageLayout:
    return pages.learn_page_layout.__wrapped__(*arguments)


class TestVllmsWriter:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize(
        ("isa", "block_size", "head_dim"), REAL, ids=[f"{i}-B{b}-H{h}" for i, b, h in REAL]
    )
    def test_gather_gives_what_was_written(self, isa, block_size, head_dim, dtype) -> None:
        layout = learn(isa, block_size, head_dim, dtype)
        check_gather(layout, isa, block_size, head_dim, dtype)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("kind", ["fp8", "fp8_e4m3", "fp8_e5m2"])
    @pytest.mark.parametrize(("block_size", "head_dim"), [(32, 32), (128, 64), (64, 256)])
    def test_float8_is_given_as_what_it_stands_for(
        self, kind: str, block_size: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        try:
            isa = _get_attn_isa(dtype, block_size, head_dim, kind)
        except NotImplementedError as error:
            pytest.skip(str(error))
        scales = 0.25, 8.0
        layout = learn(isa, block_size, head_dim, dtype, kind).of_layer(kind, dtype, *scales)
        tokens = 2 * block_size + 5
        said = torch.arange(256, dtype=torch.uint8).view(KINDS[kind]).float()
        said = said[said.isfinite() & (said.abs() >= 2**-6)]  # vLLM may drop the smallest
        index = torch.randint(len(said), (2, tokens, KV_HEADS, head_dim))
        key, value = (said[part] * scale for part, scale in zip(index, scales, strict=True))
        shape = (BLOCKS, KV_HEADS, 2 * block_size, head_dim)
        cache = torch.full(shape, 0x7F, dtype=torch.uint8)
        order = torch.tensor([5, 2, 6])
        positions = torch.arange(tokens)
        slots = order[positions // block_size] * block_size + positions % block_size
        halves, names = cache.chunk(2, dim=2), {"k_scale": scales[0], "v_scale": scales[1]}
        pages.ops.cpu_attn_reshape_and_cache(
            key.to(dtype), value.to(dtype), *halves, slots, isa, kv_cache_dtype=kind, **names
        )
        pages_of = cache.view(BLOCKS, KV_HEADS, block_size, -1)
        keys, values = layout.gather(pages_of, order)
        assert keys.dtype == values.dtype == dtype
        assert torch.equal(keys[:, :tokens].float(), key.transpose(0, 1))
        assert torch.equal(values[:, :tokens].float(), value.transpose(0, 1))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_this_machines_instruction_set(self, dtype: torch.dtype) -> None:
        from vllm.v1.attention.backends.cpu_attn import _get_attn_isa

        isa = _get_attn_isa(dtype, 128, 64)
        check_gather(learn(isa, 128, 64, dtype), isa, 128, 64, dtype)

    def test_plain_vectors_need_no_table(self) -> None:
        """Keys are kept transposed and values as they are: read by strides, without an index."""
        layout = learn("vec", 32, 64, torch.float32)
        assert (layout.keys.kind, layout.values.kind) == ("columns", "rows")

    def test_learned_once(self) -> None:
        arguments = ("vec", 32, 64, torch.float32)
        assert pages.learn_page_layout(*arguments) is pages.learn_page_layout(*arguments)


class TestOtherWriters:
    B, H = 16, 32

    def pack_table(self, kind: str) -> Callable[[torch.Tensor], torch.Tensor]:
        size = self.B * self.H
        shuffled = torch.randperm(size, generator=torch.Generator().manual_seed(1))
        return {
            "rows": lambda n: n,
            "columns": lambda n: n % self.H * self.B + n // self.H,
            # AMX keeps pairs of tokens beside each other: [B/2, H, 2].
            "pairs": lambda n: n // self.H // 2 * 2 * self.H + n % self.H * 2 + n // self.H % 2,
            "shuffled": lambda n: shuffled[n],
        }[kind]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize(
        ("packing", "kind"),
        [("rows", "rows"), ("columns", "columns"), ("pairs", "table"), ("shuffled", "table")],
    )
    def test_any_order_is_learned(self, fake_writer, packing, kind, dtype) -> None:
        fake_writer(self.pack_table(packing))
        layout = learn("fake", self.B, self.H, dtype)
        assert (layout.keys.kind, layout.values.kind) == (kind, kind)
        check_gather(layout, "fake", self.B, self.H, dtype)

    @pytest.mark.parametrize(
        "pack",
        [
            lambda n: n // 2,
            lambda n: n * 0,
            lambda n: n.clamp(max=510),
        ],
        ids=["pairs-overwritten", "all-in-one-place", "last-lost"],
    )
    def test_lossy_writer_is_refused(self, fake_writer, pack) -> None:
        fake_writer(pack)
        with pytest.raises(UnsupportedConfigurationError) as error:
            learn("odd", self.B, self.H, torch.float32)
        assert str(error.value) == (
            "layer routes on the CPU: expected vLLM's 'odd' kernels to keep a block's keys and "
            "values in some order (block_size 16, head_dim 32), found numbers missing; serve with "
            "--attention-backend CPU_ATTN and report this"
        )

    def test_scaling_writer_is_refused(self, monkeypatch) -> None:
        """As a quantizing writer would."""
        original = pages.ops.cpu_attn_reshape_and_cache

        def scaled(key, value, *arguments, **options) -> None:
            original(key / 2, value / 2, *arguments, **options)

        monkeypatch.setattr(pages.ops, "cpu_attn_reshape_and_cache", scaled)
        with pytest.raises(UnsupportedConfigurationError, match="found numbers missing"):
            learn("vec", 32, 32, torch.float32)

    def test_writer_that_writes_nothing_is_refused(self, monkeypatch) -> None:
        monkeypatch.setattr(pages.ops, "cpu_attn_reshape_and_cache", lambda *a, **k: None)
        with pytest.raises(UnsupportedConfigurationError, match="found numbers missing"):
            learn("vec", 32, 32, torch.float32)
