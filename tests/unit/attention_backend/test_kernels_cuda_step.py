"""The CUDA backend's step, from Batch to attention output, in Triton's interpreter.

Builder and implementation are the real ones, on the Triton kernels; only what they inherit from
vLLM's constructors is set by hand, and a probe's answers are written down. Oracle: the tests' own
masked attention (float32); steps mix prefill chunks, decode rows, requests in new rows, those whose
routes are still open, and a dummy batch.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.kernels.tiles import INTERPRETED
from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.router.route import Route
from flux_vllm.routing.prompts import Prompt
from flux_vllm.routing.runtime import FluxRuntime
from tests.helpers.reference_attention import SparsePattern, masked_attention

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(not INTERPRETED, reason="kernels run on the GPU here"),
]

LAYERS, HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 3, 4, 2, 64, 16
SINK_TOKENS, WINDOW_TOKENS = 20, 24
PATTERN = SparsePattern(SINK_TOKENS, WINDOW_TOKENS, BLOCK_SIZE)
PROMPTS = {"a": 66, "b": 21, "c": 90, "d": 20}
FULL, SPARSE, OPEN = int(Route.FULL), int(Route.SPARSE), int(Route.UNDECIDED)
ROUTES = {"a": [SPARSE, FULL, SPARSE], "c": [FULL, SPARSE, SPARSE]}
"""Of the prompts that are longer than sinks and window."""


class _WrittenProbe:
    """Stands in for PromptProbe: routes by request."""

    def decide(self, prompt: Prompt) -> None:
        self.routes = torch.tensor(ROUTES[prompt.request_id], dtype=torch.int8)
        self.full_probability = self.routes.float()


def _attend_like_vllm(impl, layer, query, key, value, kv_cache, metadata, output, *rest) -> None:
    """Stands in for vLLM's own call, which needs a GPU: all keys up to each query's own."""
    pages = kv_cache.transpose(1, 2)
    starts = metadata.query_start_loc.tolist()
    for row, length in enumerate(metadata.seq_lens.tolist()):
        part = slice(starts[row], starts[row + 1])
        blocks = metadata.block_table[row, : -(-length // BLOCK_SIZE)]
        keys, values = pages[blocks].flatten(0, 1)[:length].split(HEAD_DIM, dim=-1)
        distance = torch.arange(length)[-(part.stop - part.start) :, None] - torch.arange(length)
        attended = torch.nn.functional.scaled_dot_product_attention(
            *(tensor.transpose(0, 1) for tensor in (query[part], keys, values)),
            attn_mask=distance >= 0,
            enable_gqa=True,
        )
        output[part] = attended.transpose(0, 1).reshape(output[part].shape)


class _Server:
    """A hand-made worker: a KV cache, block tables, and a builder with its layers."""

    def __init__(
        self,
        policy: str,
        monkeypatch: pytest.MonkeyPatch,
        full_decode_tokens: int = 0,
        sparse_prefill: bool = False,
    ) -> None:
        from vllm.v1.attention.backends.flash_attn import FlashAttentionImpl

        from flux_vllm.attention_backend.cuda.backend import FluxCUDAImpl, FluxCUDAMetadataBuilder

        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda device: SimpleNamespace(multi_processor_count=4),
        )
        monkeypatch.setattr("flux_vllm.attention_backend.kernels.fa3.is_available", lambda: False)
        monkeypatch.setattr(FlashAttentionImpl, "forward", _attend_like_vllm)
        static = policy == "static"
        self.runtime = FluxRuntime(
            FluxConfig(
                policy=policy,
                sparse_layers=[0] if static else None,
                full_decode_tokens=full_decode_tokens,
                sparse_prefill=sparse_prefill,
            ),
            RouterInfo(
                base_model="",
                num_layers=LAYERS,
                head_dim=HEAD_DIM,
                pool_tokens=32,
                sink_tokens=SINK_TOKENS,
                window_tokens=WINDOW_TOKENS,
            ),
            LAYERS,
            tuple(range(LAYERS)),
            2,
            torch.device("cpu"),
        )
        self.runtime.probe = None if static else _WrittenProbe()
        blocks = sum(-(-(n + 8) // BLOCK_SIZE) for n in PROMPTS.values()) + 1
        shape = (blocks, KV_HEADS, BLOCK_SIZE, 2 * HEAD_DIM)
        self.caches = [torch.full(shape, float("nan")) for _ in range(LAYERS)]
        free = iter(torch.randperm(blocks - 1).add(1).tolist())
        self.tables = {
            name: list(itertools.islice(free, -(-(n + 8) // BLOCK_SIZE)))
            for name, n in PROMPTS.items()
        }
        self.builder = FluxCUDAMetadataBuilder.__new__(FluxCUDAMetadataBuilder)
        self.layers = []
        for index, cache in enumerate(self.caches):
            impl = FluxCUDAImpl.__new__(FluxCUDAImpl)
            impl.num_heads, impl.num_kv_heads, impl.head_size = HEADS, KV_HEADS, HEAD_DIM
            impl.scale, impl.vllm_flash_attn_version = HEAD_DIM**-0.5, 2
            impl.sinks, impl.is_float8 = None, False
            impl.binding = LayerBinding(self.runtime, index)
            self.layers.append(SimpleNamespace(impl=impl, kv_cache=cache))
        self.builder.block_size, self.builder.device = BLOCK_SIZE, torch.device("cpu")
        self.builder._bind(self.layers, 6)
        self.history = {name: [[] for _ in range(LAYERS)] for name in PROMPTS}

    def add_routes(self, metadata: SimpleNamespace) -> None:
        """Do what the builder does with vLLM's metadata."""
        group = self.builder._group
        metadata.flux = self.builder._make_routes(group, self.runtime)
        if metadata.flux is not None:
            group.begin_step(metadata.block_table)

    def step(self, rows: list[tuple[str, int, bool]], padding: int = 0) -> None:
        """Run one step of (request, tokens, is prefill) rows and check every layer."""
        computed = [len(self._queries(name)) for name, _, _ in rows]
        self.runtime.admit(
            Prompt(name, PROMPTS[name], [0])
            for (name, _, _), count in zip(rows, computed, strict=True)
            if not count
        )
        ends = {name: c + n for (name, n, _), c in zip(rows, computed, strict=True)}
        self.runtime.decide_due(ends)
        self.runtime.begin_step(
            Batch(
                tuple(name for name, _, _ in rows),
                np.array([PROMPTS[name] for name, _, _ in rows]),
                np.array(computed),
                np.array([count for _, count, _ in rows]),
                np.array([prefill for _, _, prefill in rows]),
            )
        )
        metadata = self._metadata(rows, computed, padding)
        self.add_routes(metadata)
        prefills = any(prefill for *_, prefill in rows)
        is_long = max(ends.values()) > SINK_TOKENS + WINDOW_TOKENS
        assert (metadata.flux is None) == (prefills and not is_long)
        slots = self.runtime.current.slots
        for index, layer in enumerate(self.layers):
            tokens = metadata.num_actual_tokens
            query, key, value = (
                torch.randn(tokens, n, HEAD_DIM) for n in (HEADS, KV_HEADS, KV_HEADS)
            )
            self._write(layer.kv_cache, metadata.slot_mapping, key, value)
            out = torch.full((tokens, HEADS * HEAD_DIM), float("nan"))
            layer.impl.forward(layer, query, key, value, layer.kv_cache, metadata, out)
            start = 0
            for row, (name, count, prefill) in enumerate(rows):
                part = slice(start, start + count)
                kept = self.history[name][index]
                kept.append((query[part], key[part], value[part]))
                route = int(self.runtime.table.routes[int(slots[row]), index])
                if self.runtime.fixed_routes is None:
                    assert route == ROUTES.get(name, [OPEN] * LAYERS)[index]
                is_early = ends[name] <= PROMPTS[name] + self.runtime.full_decode_tokens
                if route == OPEN or (is_early and not prefill):
                    route = FULL
                elif prefill and self.runtime.config.sparse_prefill:
                    route = SPARSE
                self._check(name, index, count, route, prefill, out[part])
                start += count
        self.runtime.end_step()

    def _queries(self, name: str) -> torch.Tensor:
        parts = [query for query, _, _ in self.history[name][0]]
        return torch.cat(parts) if parts else torch.empty(0)

    def _metadata(self, rows: list, computed: list[int], padding: int) -> object:
        from vllm.v1.attention.backends.flash_attn import FlashAttentionMetadata

        counts = [count for _, count, _ in rows] + [0] * padding
        lens = [c + n for c, n in zip(computed, counts, strict=False)] + [0] * padding
        width = max(map(len, self.tables.values()))
        table = torch.full((len(counts), width), 10**6, dtype=torch.int32)  # stale tails
        slots = []
        for row, (name, count, _) in enumerate(rows):
            used = -(-lens[row] // BLOCK_SIZE)
            table[row, :used] = torch.tensor(self.tables[name][:used])
            slots += [
                self.tables[name][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
                for p in range(computed[row], computed[row] + count)
            ]
        return FlashAttentionMetadata(
            num_actual_tokens=sum(counts),
            max_query_len=max(counts),
            query_start_loc=torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
            max_seq_len=max(lens),
            seq_lens=torch.tensor(lens, dtype=torch.int32),
            block_table=table,
            slot_mapping=torch.tensor(slots),
        )

    @staticmethod
    def _write(cache: torch.Tensor, slots: torch.Tensor, key, value) -> None:
        pages = cache.transpose(1, 2)
        pages[slots // BLOCK_SIZE, slots % BLOCK_SIZE] = torch.cat([key, value], dim=-1)

    def _check(self, name, layer, count, route, prefill, out) -> None:
        keys, values = (
            torch.cat([entry[i] for entry in self.history[name][layer]]).transpose(0, 1)
            for i in (1, 2)
        )
        query = self.history[name][layer][-1][0]
        expected = masked_attention(
            query.transpose(0, 1),
            keys,
            values,
            HEAD_DIM**-0.5,
            route,
            "prefill" if prefill else "decode",
            PATTERN,
        )
        torch.testing.assert_close(out.view(count, HEADS, HEAD_DIM), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("policy", "phases"),
    [
        ("router", ()),
        ("static", ()),
        ("router", (1,)),
        ("static", (2,)),
        ("router", (0, True)),
        ("static", (1, True)),
    ],
)
def test_steps(policy: str, phases: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    server = _Server(policy, monkeypatch, *phases)
    server.step([("a", 23, True), ("b", 21, True)])
    server.step([("b", 1, False), ("c", 50, True), ("a", 42, True)])
    server.step([("a", 1, True), ("c", 39, True)])  # a prompt's one-token tail
    server.step([("c", 1, True), ("a", 1, False), ("b", 2, False)])
    server.step([("b", 1, False), ("a", 1, False), ("c", 1, False)], padding=1)
    server.step([("b", 1, False), ("d", 20, True), ("a", 1, False)])
    server.step([("d", 1, False), ("b", 1, False)])
    decided = {decision["request_id"] for decision in server.runtime.status()["recent"]}
    assert decided == set(PROMPTS if policy == "static" else ROUTES)
    server.runtime.finish(PROMPTS)
    assert server.runtime.status()["live_requests"] == 0


def test_dummy_batch_attends_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture and warm-up know no requests; their rows attend FULL through the same views."""
    server = _Server("router", monkeypatch)
    server.step([("a", 60, True)])
    metadata = server._metadata([("a", 1, False)], [60], padding=1)
    server.caches[1][server.tables["a"][60 // BLOCK_SIZE], :, 60 % BLOCK_SIZE] = 0.5
    server.add_routes(metadata)
    query = torch.randn(1, HEADS, HEAD_DIM)
    out = torch.full((1, HEADS * HEAD_DIM), float("nan"))
    layer = server.layers[1]
    layer.impl.forward(layer, query, None, None, layer.kv_cache, metadata, out)
    token = torch.full((1, KV_HEADS, HEAD_DIM), 0.5)
    server.history["a"][1].append((query, token, token))
    server._check("a", 1, 1, int(Route.FULL), False, out)
