"""What vLLM's scheduler and model runners know of a step's requests, read into our own terms."""

from typing import Any

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.routing.prompts import Prompt


def prompt_of(new_request: Any) -> Prompt:
    """Read a request that the scheduler announces (vLLM's NewRequestData)."""
    token_ids, embeddings = new_request.prompt_token_ids, new_request.prompt_embeds
    # A multimodal prompt holds ids that stand for images, often none of the vocabulary.
    readable = embeddings is None and not new_request.mm_features
    return Prompt(
        request_id=new_request.req_id,
        length=len(embeddings if token_ids is None else token_ids),
        tokens=token_ids if readable else None,
        adapter=new_request.lora_request,
    )


def context_ends(scheduler_output: Any) -> dict[str, int]:
    """Return how many tokens each request of a step has once the step is done, drafts included."""
    cached = scheduler_output.scheduled_cached_reqs
    computed = dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))
    computed |= {new.req_id: new.num_computed_tokens for new in scheduler_output.scheduled_new_reqs}
    scheduled = scheduler_output.num_scheduled_tokens
    return {name: computed[name] + tokens for name, tokens in scheduled.items()}


def is_prefill_v1(input_batch: Any) -> np.ndarray:
    """Say which rows of runner V1 compute older tokens than the newest: [R] bool.

    V1 does not say how many tokens a resumed request recomputes, so a row past its prompt is
    prefill while older tokens than the newest remain to be computed.
    """
    rows = input_batch.num_reqs
    oldest_decode = np.maximum(
        input_batch.num_prompt_tokens[:rows], input_batch.num_tokens_no_spec[:rows] - 1
    )
    return input_batch.num_computed_tokens_cpu[:rows] < oldest_decode


def batch_from_v1(input_batch: Any, num_scheduled_tokens: dict[str, int]) -> Batch:
    """Read the step's rows from model runner V1.

    Args:
        input_batch: vLLM's `gpu_input_batch.InputBatch`.
        num_scheduled_tokens: of the scheduler's output, by request id.

    Returns: Batch.
    """
    rows = input_batch.num_reqs
    request_ids = tuple(input_batch.req_ids[:rows])
    return Batch(
        request_ids=request_ids,
        prompt_lens=input_batch.num_prompt_tokens[:rows].astype(np.int64),
        computed=input_batch.num_computed_tokens_cpu[:rows].astype(np.int64),
        scheduled=np.array([num_scheduled_tokens[name] for name in request_ids], dtype=np.int64),
        is_prefill=is_prefill_v1(input_batch),
    )


def batch_from_v2(input_batch: Any, request_states: Any, is_warmup: bool) -> Batch:
    """Read the step's rows from model runner V2.

    Args:
        input_batch: vLLM's `gpu.input_batch.InputBatch`.
        request_states: vLLM's `gpu.states.RequestState`.
        is_warmup: whether vLLM warms up, with requests of its own.

    Returns: Batch. `prompt_len` leaves out what a resumed request had generated;
        `prefill_len` includes it.
    """
    rows = input_batch.num_reqs
    request_ids = tuple(input_batch.req_ids[:rows])
    computed = input_batch.num_computed_tokens_np[:rows].astype(np.int64)
    prompt_lens = request_states.prompt_len.np[input_batch.idx_mapping_np[:rows]]
    return Batch(
        request_ids=request_ids,
        prompt_lens=prompt_lens.astype(np.int64),
        computed=computed,
        scheduled=input_batch.num_scheduled_tokens[:rows].astype(np.int64),
        is_prefill=computed < input_batch.prefill_len_np[:rows],
        is_warmup=is_warmup,
    )
