"""The drafter of speculative decoding: it attends by a backend of vLLM's own, apart from routes.

Its layers are another model's, with keys of their own in the KV cache. The model's runner forwards
it after the batch, which no route concerns.
"""

from typing import Any

from flux_vllm.selection import is_flux

_METHODS = ("ngram", "draft_model", "eagle", "eagle3", "mtp")
"""Of speculation; every kind of multi-token prediction is `mtp` once vLLM has read it."""


def choose_drafter_backend(vllm_config: Any) -> None:
    """Name the backend of a drafter's attention, unless the operator did.

    Unnamed, model runner V2 takes the engine's for EAGLE and MTP. The backend that flux extends is
    one that the drafter can share a KV cache's layout with.

    Args:
        vllm_config: of an engine that uses flux.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    speculative = vllm_config.speculative_config
    if speculative is None or speculative.attention_backend is not None:
        return
    is_cpu = vllm_config.device_config.device_type == "cpu"
    speculative.attention_backend = AttentionBackendEnum["CPU_ATTN" if is_cpu else "FLASH_ATTN"]


def refused_speculation(vllm_config: Any) -> dict[str, bool]:
    """Say what of a speculation layer routes cannot be combined with.

    Args:
        vllm_config: of an engine that uses flux.

    Returns: whether it is there, by what it is; nothing without speculation.
    """
    speculative = vllm_config.speculative_config
    if speculative is None:
        return {}
    method = speculative.method
    has_stages = vllm_config.parallel_config.pipeline_parallel_size > 1
    return {
        f"speculative decoding by {method}": method not in _METHODS,
        "a drafter that reads the model's own KV cache (Gemma 4 MTP)": (
            method == "mtp" and speculative.use_gemma4_mtp()
        ),
        "a drafter with --attention-backend flux": is_flux(speculative.attention_backend),
        "a drafter behind pipeline stages": has_stages and method != "ngram",
    }
