"""The least of an engine's configuration and of a model that start-up reads."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flux_vllm.router.checkpoint import RouterInfo, write_router

CPU = torch.device("cpu")
ONE_STAGE = SimpleNamespace(world_size=1, is_first_rank=True, is_last_rank=True)
"""vLLM's group of pipeline stages, without any."""
L, H = 4, 32


def make_config(folder: Path, flux: dict[str, Any] | None = None, **changes: Any) -> Any:
    """Make the part of a VllmConfig that start-up reads; `changes` are `part__name=value`."""
    parts = {
        "model": SimpleNamespace(
            model=str(folder),
            revision=None,
            dtype=torch.float32,
            served_model_name=["served", "alias"],
            use_mla=False,
            is_encoder_decoder=False,
            runner_type="generate",
            is_attention_free=False,
            is_hybrid=False,
            uses_mrope=False,
            mrope_num_dims=3,
            is_mm_prefix_lm=False,
            rswa_window=None,
            supports_multimodal_inputs=False,
            enable_prompt_embeds=False,
            get_total_num_hidden_layers=lambda: L,
            get_head_size=lambda: H,
            model_arch_config=defaultdict(lambda: SimpleNamespace(head_size=H)),
        ),
        "parallel": SimpleNamespace(
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            pipeline_parallel_size=1,
            use_ubatching=False,
            data_parallel_size=1,
            is_moe_model=False,
        ),
        "scheduler": SimpleNamespace(max_num_seqs=8, max_num_batched_tokens=2048),
        "device": SimpleNamespace(device_type="cpu"),
        "cache": SimpleNamespace(
            cache_dtype="auto",
            kv_cache_dtype_skip_layers=[],
            prefix_match_unit=None,
            kv_sharing_fast_prefill=False,
            block_size=32,
        ),
    }
    root = {
        "kv_transfer_config": None,
        "speculative_config": None,
        "num_speculative_tokens": 0,
        "lora_config": None,
    }
    for name, value in changes.items():
        part, _, field = name.partition("__")
        if part == "root":
            root[field] = value
        else:
            setattr(parts[part], field, value)
    return SimpleNamespace(
        **{f"{name}_config": part for name, part in parts.items()},
        **root,
        additional_config={"flux": flux or {}},
        attention_config=SimpleNamespace(backend=SimpleNamespace(name="FLUX")),
        load_config=SimpleNamespace(download_dir=None),
        compilation_config=SimpleNamespace(
            static_forward_context={}, use_inductor_graph_partition=False
        ),
        observability_config=SimpleNamespace(enable_layerwise_nvtx_tracing=False),
    )


def make_speculation(method: str, backend: str | None = None, is_gemma4: bool = False) -> Any:
    """Make the part of a SpeculativeConfig that start-up reads."""
    return SimpleNamespace(
        method=method,
        attention_backend=None if backend is None else SimpleNamespace(name=backend),
        use_gemma4_mtp=lambda: is_gemma4,
    )


def write(folder: Path, num_layers: int = L, head_dim: int = H, **info: Any) -> Path:
    entries = {
        "base_model": "org/Other",
        "num_layers": num_layers,
        "head_dim": head_dim,
        "pool_tokens": 48,
        "sink_tokens": 64,
        "window_tokens": 256,
    }
    folder.mkdir(exist_ok=True)
    router_info = RouterInfo(**entries | info)
    return write_router(folder, router_info.make_router(), router_info)


def make_attention(
    index: int,
    window: int | None = None,
    backend: str = "FLUX",
    cls: str | None = None,
    head_size: int = H,
    owner: int | None = None,
) -> Any:
    """Make one of vLLM's Attention modules without what a GPU or an engine would add."""
    from vllm.model_executor.layers import attention as layers
    from vllm.model_executor.layers.attention import chunked_local_attention

    kind = layers.Attention if cls is None else getattr(chunked_local_attention, cls)
    attention = kind.__new__(kind)
    nn.Module.__init__(attention)
    attention.layer_name = f"model.layers.{index}.self_attn.attn"
    attention.attn_backend = SimpleNamespace(get_name=lambda: backend)
    attention.sliding_window = window
    attention.head_size = head_size
    attention.kv_sharing_target_layer_name = (
        None if owner is None else f"model.layers.{owner}.self_attn.attn"
    )
    attention.query_quant = nn.Identity()
    attention.impl = SimpleNamespace(binding=None, kernels_name="cpu")
    return attention


class SelfAttention(nn.Module):
    """A decoder layer's attention, as far as rotation goes."""

    def forward(self, positions: Any, query: Any, key: Any) -> Any:
        """Rotate, then attend."""
        query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, key, key)


class RotatingWhereTold(nn.Module):
    """Like Granite's and Cohere's: the layer's own attribute says whether it rotates."""

    use_rope = True

    def forward(self, positions: Any, query: Any, key: Any) -> Any:
        """Rotate by the attribute."""
        if self.use_rope:
            query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, key, key)


class SometimesRotating(nn.Module):
    """Rotates in some calls."""

    def forward(self, positions: Any, query: Any, key: Any) -> Any:
        """Rotate under a condition of the call."""
        if positions is not None:
            query, key = self.rotary_emb(positions, query, key)
        return self.attn(query, key, key)


class SometimesScaling(nn.Module):
    """Like Mistral's: queries get a temperature after RoPE where the model's config has one."""

    do_scaling = True

    def forward(self, positions: Any, query: Any, key: Any) -> Any:
        """Rotate, then scale under a condition."""
        query, key = self.rotary_emb(positions, query, key)
        query = query.view(-1, 4, 8).flatten(1)
        if self.do_scaling:
            query = query * positions.log()
        return self.attn(query, key, key)


class Model(nn.Module):
    """Decoder layers in reverse order, each with a rotary embedding beside its attention."""

    def __init__(self, attentions: list[Any], rope: Any, kind: type = SelfAttention) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for attention in reversed(attentions):
            layer = nn.Module()
            layer.self_attn = kind()
            if rope is not None:
                layer.self_attn.rotary_emb = rope
            layer.self_attn.attn = attention
            self.layers.append(layer)


def runner_of(model: nn.Module) -> SimpleNamespace:
    """Stand in for vLLM's model runner."""
    return SimpleNamespace(get_model=lambda: model)
