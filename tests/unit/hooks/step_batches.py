"""Hand-made batches in the real data structures of vLLM's two model runners.

V1: `gpu_input_batch.InputBatch` and `CachedRequestState`, as `_update_states` fills them. V2:
`gpu.states.RequestState`, stepped by the real `update_requests` and gathered by the real
`gather_batch_req_state`, called on a bare object that has only what they read; the rest of V2's
`InputBatch` (tensors made by Triton kernels) is None, and `num_computed_tokens_np` is copied as
`prepare_inputs` does. All is on the CPU: RequestState is told that there is no UVA, and then keeps
copies, as it does by itself on platforms without pinned memory.
"""

import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch

from flux_vllm.batch import Batch
from flux_vllm.hooks import rows

CPU = torch.device("cpu")
MAX_LEN, BLOCK = 512, 16


@dataclass(frozen=True)
class Req:
    """A request as the scheduler sees it before a step.

    `outputs` tokens were generated; `resumed` after a preemption, so that they are recomputed.
    """

    name: str
    prompt: int
    computed: int
    scheduled: int
    outputs: int = 0
    resumed: bool = False
    drafts: int = 0


def unwrapped(function: Any) -> Any:
    """Give vLLM's own function of a wrapped one."""
    assert hasattr(function, "__flux_wrapped__")
    return function.__wrapped__


def new_request(name: str, tokens: list[int] | None, computed: int = 0, **changes: Any) -> Any:
    """Make vLLM's own NewRequestData."""
    from vllm.v1.core.sched.output import NewRequestData

    fields = {
        "req_id": name,
        "prompt_token_ids": tokens,
        "mm_features": [],
        "sampling_params": None,
        "pooling_params": None,
        "block_ids": ([1],),
        "num_computed_tokens": computed,
        "lora_request": None,
    }
    return NewRequestData(**fields | changes)


def blocks(tokens: int) -> list[int]:
    return list(range(1, tokens // BLOCK + 2))


class RunnerV1:
    """Model runner V1's batch."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu_input_batch import InputBatch

        self.batch = InputBatch(
            max_num_reqs=8,
            max_model_len=MAX_LEN,
            max_num_batched_tokens=MAX_LEN,
            device=CPU,
            vocab_size=100,
            block_sizes=[BLOCK],
            max_num_blocks_per_req=[MAX_LEN // BLOCK],
        )

    def add(self, req: Req) -> None:
        from vllm import SamplingParams
        from vllm.v1.worker.gpu_input_batch import CachedRequestState

        state = CachedRequestState(
            req_id=req.name,
            prompt_token_ids=[3] * req.prompt,
            mm_features=[],
            sampling_params=SamplingParams(temperature=0),
            generator=None,
            block_ids=(blocks(req.computed + req.scheduled),),
            num_computed_tokens=req.computed,
            output_token_ids=[5] * req.outputs,
        )
        self.batch.add_request(state)

    def remove(self, name: str) -> None:
        """Take a request out, as when it ends or is preempted."""
        self.batch.remove_request(name)

    def settle(self) -> None:
        """Close the gaps that removals left, as each step does before it runs."""
        self.batch.condense()
        self.batch.refresh_metadata()

    def step(self, reqs: list[Req]) -> Batch:
        return rows.batch_from_v1(self.batch, {req.name: req.scheduled for req in reqs})


class RunnerV2:
    """Model runner V2's request states, and the batch it makes of them."""

    def __init__(self) -> None:
        from vllm.v1.worker.gpu import buffer_utils
        from vllm.v1.worker.gpu.states import RequestState

        with mock.patch.object(buffer_utils, "is_uva_available", return_value=False):
            self.states = RequestState(
                max_num_reqs=8,
                max_model_len=MAX_LEN,
                max_num_batched_tokens=MAX_LEN,
                num_speculative_steps=3,
                vocab_size=100,
                device=CPU,
                use_dense_all_token_ids=True,
            )
        self.runner = SimpleNamespace(
            req_states=self.states,
            block_tables=None,
            kv_block_zeroer=None,
            decode_query_len=1,
            use_pp=False,
            pcp_manager=None,
            adaptive_verification=None,
        )

    def add(self, req: Req) -> None:
        # A resumed request comes with its outputs; else they grow while it runs.
        known = req.prompt + (req.outputs if req.resumed else 0)
        self.states.add_request(
            req_id=req.name,
            prompt_len=req.prompt,
            all_token_ids=[3] * known,
            num_computed_tokens=0,
            max_tokens=100,
        )

    def remove(self, name: str) -> None:
        """Take a request out, as when it ends or is preempted."""
        self.states.remove_request(name)

    def settle(self) -> None:
        """V2 has no gaps to close: it gathers its rows anew."""

    def _scheduler_output(self, reqs: list[Req]) -> SimpleNamespace:
        tokens = {req.name: req.scheduled for req in reqs}
        cached = SimpleNamespace(
            req_ids=[req.name for req in reqs],
            num_computed_tokens=[req.computed for req in reqs],
            new_block_ids=[None] * len(reqs),
        )
        return SimpleNamespace(
            num_scheduled_tokens=tokens,
            total_num_scheduled_tokens=sum(tokens.values()),
            scheduled_spec_decode_tokens={r.name: [7] * r.drafts for r in reqs if r.drafts},
            scheduled_cached_reqs=cached,
            new_block_ids_to_zero=None,
            kv_cache_block_copies=None,
        )

    def gather(self, reqs: list[Req]) -> Any:
        """Run the real gathering of a step's rows. Returns: BatchReqState, uniform length."""
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        output = self._scheduler_output(reqs)
        GPUModelRunner.update_requests(self.runner, output)
        return GPUModelRunner.gather_batch_req_state(self.runner, output, dummy_run=False)

    def batch(self, reqs: list[Req], padded_rows: int = 0) -> Any:
        """Make V2's InputBatch."""
        from vllm.v1.worker.gpu.input_batch import InputBatch

        state, _ = self.gather(reqs)
        fields: dict[str, Any] = dict.fromkeys(f.name for f in dataclasses.fields(InputBatch))
        fields |= {name: value for name, value in state._asdict().items() if name in fields}
        fields |= {
            "num_reqs": len(state.req_ids),
            "num_reqs_after_padding": len(state.req_ids) + padded_rows,
            "num_computed_tokens_np": self.states.num_computed_tokens_np[state.idx_mapping_np],
        }
        return InputBatch(**fields)

    def step(self, reqs: list[Req], padded_rows: int = 0, is_warmup: bool = False) -> Batch:
        return rows.batch_from_v2(self.batch(reqs, padded_rows), self.states, is_warmup)


def rows_of(context: Batch) -> dict[str, tuple[int, int, int, bool]]:
    """Give (prompt, computed, scheduled, is_prefill) by request."""
    for column in (context.prompt_lens, context.computed, context.scheduled):
        assert column.dtype == np.int64
    assert context.is_prefill.dtype == np.bool_
    columns = (
        context.prompt_lens,
        context.computed,
        context.scheduled,
        context.is_prefill,
    )
    rows = zip(*(column.tolist() for column in columns), strict=True)
    return dict(zip(context.request_ids, rows, strict=True))
