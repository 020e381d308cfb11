"""The CUDA backend's builder and layers, made by their own constructors around a hand-made batch.

A batch's rows get routes without a router's work: they pass as requests whose prompts were routed
before (as after a preemption). Odd layers have the rows' opposite routes.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from flux_vllm.attention_backend.cuda.backend import FluxCUDABackend
from flux_vllm.attention_backend.layer import LayerBinding
from flux_vllm.batch import Batch
from flux_vllm.config import FluxConfig
from flux_vllm.router.checkpoint import RouterInfo
from flux_vllm.routing.runtime import FluxRuntime
from tests.unit.attention_backend.test_kernels_cases import (
    KEY_SCALE,
    QUERY_SCALE,
    VALUE_SCALE,
    PagedBatch,
    Row,
    Shape,
    assert_as_exact_as_torch,
)

LAYERS, MAX_ROWS, MAX_LEN = 2, 64, 8192


def stand_for_gpu(monkeypatch: pytest.MonkeyPatch, multiprocessors: int = 4) -> None:
    """Let the backend take this machine for a GPU without FlashAttention-3, until a test's end."""
    from vllm import _custom_ops
    from vllm.v1.attention.backends import flash_attn

    for name in (
        *("get_flash_attn_version", "flash_attn_supports_quant_query_input"),
        *("flash_attn_supports_sinks", "flash_attn_supports_kv_cache_dtype"),
    ):
        monkeypatch.setattr(flash_attn, name, lambda *args, **kwargs: 2, raising=False)
    monkeypatch.setattr(_custom_ops, "scaled_fp8_quant", _quantize)
    properties = SimpleNamespace(multi_processor_count=multiprocessors)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)


@cache
def engine_config(folder: Path, shape: Shape) -> Any:
    """Make vLLM's configuration of a Llama of this shape; no weights are needed."""
    from transformers import LlamaConfig
    from vllm.engine.arg_utils import EngineArgs

    LlamaConfig(
        architectures=["LlamaForCausalLM"],
        num_hidden_layers=LAYERS,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        hidden_size=shape.heads * shape.head_dim,
        intermediate_size=64,
        vocab_size=64,
        max_position_embeddings=MAX_LEN,
    ).save_pretrained(folder / str(shape))
    return EngineArgs(
        model=str(folder / str(shape)),
        dtype=shape.dtype,
        skip_tokenizer_init=True,
        max_model_len=MAX_LEN,
        max_num_seqs=MAX_ROWS,
        block_size=shape.block_size,
    ).create_engine_config()


def _runtime(shape: Shape, kernels: str, device: torch.device, **pattern: Any) -> FluxRuntime:
    info = RouterInfo(
        base_model="",
        num_layers=LAYERS,
        head_dim=shape.head_dim,
        pool_tokens=32,
        sink_tokens=shape.sink_tokens,
        window_tokens=shape.window_tokens,
    )
    return FluxRuntime(
        FluxConfig(policy="router", kernels=kernels, **pattern),
        info,
        LAYERS,
        tuple(range(LAYERS)),
        MAX_ROWS,
        device,
    )


def _quantize(numbers: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Do what vLLM's operator does on a GPU."""
    assert numbers.ndim == 2
    largest = torch.finfo(torch.float8_e4m3fn).max
    scaled = (numbers.float() / scale).clamp(-largest, largest)
    return scaled.to(torch.float8_e4m3fn), scale


def _scales(shape: Shape, device: torch.device) -> dict[str, Any]:
    """Give what a layer of vLLM's says of its scales."""
    values = (QUERY_SCALE, KEY_SCALE, VALUE_SCALE) if shape.float8 else (1.0, 1.0, 1.0)
    scales: dict[str, Any] = {}
    for part, value in zip("qkv", values, strict=True):
        scales[f"_{part}_scale"] = torch.full((), value, device=device)
        scales[f"_{part}_scale_float"] = value
    return scales


class BackendWorker:
    """A builder and its layers over one KV cache.

    Args:
        folder: for the model's configuration.
        batch: whose cache the layers share.
        kernels: "fa3" or "triton".
        pattern: `sparse_pattern` and `pattern_options` of the configuration.
    """

    def __init__(self, folder: Path, batch: PagedBatch, kernels: str, **pattern: Any) -> None:
        from vllm.config import set_current_vllm_config
        from vllm.v1.kv_cache_interface import FullAttentionSpec

        shape, device = batch.shape, batch.query.device
        self.runtime = _runtime(shape, kernels, device, **pattern)
        config = engine_config(folder, shape)
        self.layers = []
        with set_current_vllm_config(config):
            for index in range(LAYERS):
                impl = FluxCUDABackend.get_impl_cls()(
                    *(shape.heads, shape.head_dim, batch.scale, shape.kv_heads),
                    *(None, None, "fp8" if shape.float8 else "auto"),
                    sinks=batch.sink_logits,
                )
                impl.binding = LayerBinding(self.runtime, index)
                scales = _scales(shape, device)
                self.layers.append(
                    SimpleNamespace(
                        impl=impl,
                        # As vLLM makes it: bytes, where it is float8.
                        kv_cache=(
                            batch.kv_cache.view(torch.uint8) if shape.float8 else batch.kv_cache
                        ),
                        sliding_window=None,
                        num_kv_heads=shape.kv_heads,
                        head_size=shape.head_dim,
                        **scales,
                    )
                )
            names = [f"layers.{index}" for index in range(LAYERS)]
            config.compilation_config.static_forward_context = dict(
                zip(names, self.layers, strict=True)
            )
            spec = FullAttentionSpec(
                block_size=shape.block_size,
                num_kv_heads=shape.kv_heads,
                head_size=shape.head_dim,
                dtype=shape.dtype,
            )
            self.builder = FluxCUDABackend.get_builder_cls()(spec, names, config, device)

    def begin_step(self, rows: list[Row]) -> None:
        """Announce the rows that have tokens, with routes that stand."""
        rows = [row for row in rows if row.query_len]
        names = tuple(f"request-{index}" for index in range(len(rows)))
        seq_lens = np.array([row.seq_len for row in rows])
        scheduled = np.array([row.query_len for row in rows])
        is_prefill = np.array([row.prefill for row in rows])
        # A prefill row ends inside its prompt or with it; a decode row lies past it.
        prompt_lens = np.array([row.prompt_len or row.seq_len for row in rows])
        prompt_lens = np.where(is_prefill, prompt_lens, seq_lens - scheduled)
        table = self.runtime.table
        lengths = prompt_lens.tolist()
        for name, row, length in zip(names, rows, lengths, strict=True):
            slot, _ = table.acquire(name)
            table.settled_prompt_len[slot] = length
            for layer in range(LAYERS):
                table.routes[slot, layer] = row.route ^ (layer % 2)
        table.version += 1
        self.runtime.begin_step(
            Batch(names, prompt_lens, seq_lens - scheduled, scheduled, is_prefill)
        )
        assert self.runtime.current.touched is None

    def metadata(self, batch: PagedBatch) -> Any:
        """Build the metadata of a batch from its own tensors."""
        from vllm.v1.attention.backend import CommonAttentionMetadata

        common = CommonAttentionMetadata(
            query_start_loc=batch.query_start_loc,
            query_start_loc_cpu=batch.query_start_loc.cpu(),
            seq_lens=batch.seq_lens,
            num_reqs=len(batch.rows),
            num_actual_tokens=sum(row.query_len for row in batch.rows),
            max_query_len=max(row.query_len for row in batch.rows),
            max_seq_len=max(row.seq_len for row in batch.rows),
            block_table_tensor=batch.block_table,
            slot_mapping=batch.slot_mapping,
        )
        return self.builder.build(0, common)

    def forward(self, batch: PagedBatch, metadata: Any, outputs: list[torch.Tensor]) -> None:
        """Run all layers over the same queries."""
        for layer, out in zip(self.layers, outputs, strict=True):
            layer.impl.forward(layer, batch.query, None, None, layer.kv_cache, metadata, out)

    def step(self, batch: PagedBatch) -> list[torch.Tensor]:
        """Run one step. Returns: of each layer [T, N, H]."""
        self.begin_step(batch.rows)
        outputs = [batch.poisoned_output() for _ in self.layers]
        self.forward(batch, self.metadata(batch), outputs)
        self.runtime.end_step()
        return outputs

    def check(self, batch: PagedBatch, outputs: list[torch.Tensor]) -> None:
        """Hold each layer's rows to twice plain torch's error in their dtype."""
        for layer, out in enumerate(outputs):
            rows = [replace(row, route=row.route ^ (layer % 2)) for row in batch.rows]
            routed = replace(batch, rows=rows)
            exact, low = routed.oracle(), routed.oracle(batch.shape.dtype)
            for index, row in enumerate(rows):
                if row.query_len:
                    part = routed.tokens_of(index)
                    what = f"layer {layer} row {index} {row}"
                    assert_as_exact_as_torch(
                        out[part], exact[part], low[part], what, batch.rounding
                    )
