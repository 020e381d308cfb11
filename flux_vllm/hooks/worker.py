"""Hooks of a flux engine's workers: the runtime's beginning, and the begin and end of its steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flux_vllm.hooks.rows import (
    batch_from_v1,
    batch_from_v2,
    context_ends,
    is_prefill_v1,
    prompt_of,
)
from flux_vllm.hooks.wrap import wrap, wrap_object
from flux_vllm.kv.channel import send_routes
from flux_vllm.kv.worker import cluster_kv_cache
from flux_vllm.router.place import ROUTER_FILE_NAME
from flux_vllm.selection import uses_flux
from flux_vllm.startup.attach import attach
from flux_vllm.startup.memory import reserve_buffers


def install() -> None:
    """Attach the runtime to workers; called as vLLM loads our backend, so only for flux."""
    from vllm.model_executor.model_loader import default_loader
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu.spec_decode.standalone_ar.speculator import StandaloneARSpeculator
    from vllm.v1.worker.gpu_worker import Worker

    wrap(default_loader, "filter_duplicate_safetensors_files", _leave_router_out)
    wrap(StandaloneARSpeculator, "load_draft_model", _load_draft_model)

    classes = [Worker]
    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        classes.append(CPUWorker)
    wrap(Worker, "get_kv_cache_spec", _cluster_layers)
    for worker_class in classes:
        if "determine_available_memory" in vars(worker_class):
            wrap(worker_class, "determine_available_memory", _attach_then_measure)


def _leave_router_out(original: Callable, files: list[str], *args: Any, **kwargs: Any) -> list[str]:
    """vLLM reads every safetensors file of a model's folder that has no index; ours is no shard."""
    return original([f for f in files if Path(f).name != ROUTER_FILE_NAME], *args, **kwargs)


def _load_draft_model(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    """Model runner V2 gives a draft model the engine's backend, whatever the drafter's own is."""
    from vllm.config import replace

    engine = self.vllm_config
    if not uses_flux(engine):
        return original(self, *args, **kwargs)
    own = engine.speculative_config.attention_backend
    self.vllm_config = replace(
        engine, attention_config=replace(engine.attention_config, backend=own)
    )
    try:
        return original(self, *args, **kwargs)
    finally:
        self.vllm_config = engine


def _cluster_layers(original: Callable, self: Any) -> Any:
    """vLLM groups layers by their specs; the runner is asked again when graphs are profiled."""
    if uses_flux(self.vllm_config):
        cluster_kv_cache(self)
    return original(self)


def _attach_then_measure(original: Callable, self: Any) -> int:
    """The model is loaded and the KV cache is not sized yet: attach, and set memory aside."""
    if not uses_flux(self.vllm_config):
        return original(self)
    held = _device_memory(self.device)
    runtime = attach(self.model_runner, self.vllm_config, self.device)
    hook_worker(self, runtime)
    held = _device_memory(self.device) - held
    return reserve_buffers(original(self) - held, self, runtime)


def _device_memory(device: Any) -> int:
    return 0 if device.type == "cpu" else torch.cuda.memory_allocated(device)


def hook_worker(worker: Any, runtime: Any) -> None:
    """Tell the runtime of each step's requests and of those that ended."""

    def execute_model(original: Callable, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        runtime.finish(scheduler_output.finished_req_ids)
        try:
            if scheduler_output.scheduled_new_reqs:
                runtime.admit(map(prompt_of, scheduler_output.scheduled_new_reqs))
            if runtime.prompts_may_be_due():
                runtime.decide_due(context_ends(scheduler_output))
            output = original(scheduler_output, *args, **kwargs)
        except BaseException:
            runtime.abandon_step()
            raise
        if output is not None:
            runtime.end_step()  # nothing was run, so nothing is sampled
        return output

    def sample_tokens(original: Callable, *args: Any, **kwargs: Any) -> Any:
        try:
            output = original(*args, **kwargs)
        except BaseException:
            runtime.abandon_step()
            raise
        decided = runtime.end_step()
        config = runtime.config
        if decided is not None and config.free_kv and config.needs_router:
            output = send_routes(output, decided)
        return output

    def warm_up(original: Callable, *args: Any, **kwargs: Any) -> Any:
        runtime.is_warming_up = True
        try:
            # Before vLLM's own, at whose end it begins to report what is compiled.
            runtime.warm_up(worker.model_runner)
            return original(*args, **kwargs)
        finally:
            runtime.end_warm_up()

    wrap_object(worker, "compile_or_warm_up_model", warm_up)
    wrap_object(worker, "execute_model", execute_model)
    wrap_object(worker, "sample_tokens", sample_tokens)
    # For `collective_rpc`.
    worker.flux_status = runtime.status
    worker.flux_fix_routes = runtime.fix_routes
    worker.flux_set_threshold = runtime.set_threshold
    _hook_runner(worker.model_runner, runtime)


def _hook_runner(runner: Any, runtime: Any) -> None:
    """Read each step's rows, keep prefill rows out of full CUDA graphs, and capture the probe.

    vLLM treats a prompt's last single token like a decode row and may replay a graph for it, but
    the kernels of prefill rows are chosen in Python.
    """

    def capture(original: Callable, *args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        # vLLM also captures once to measure memory, before there is a KV cache.
        if runtime.probe is not None and not kwargs.get("profile_only", False):
            runtime.probe.capture()
        return result

    if hasattr(runner, "capture_model"):
        wrap_object(runner, "capture_model", capture)
    if hasattr(runner, "_build_attention_metadata"):

        def is_uniform_decode(original: Callable, *args: Any, **kwargs: Any) -> bool:
            forced = kwargs.get("force_uniform_decode")
            if forced is None and is_prefill_v1(runner.input_batch).any():
                return False
            return original(*args, **kwargs)

        wrap_object(runner, "_is_uniform_decode", is_uniform_decode)

        def build(original: Callable, *args: Any, **kwargs: Any) -> Any:
            scheduled = kwargs.get("num_scheduled_tokens")
            if scheduled is not None:
                runtime.begin_step(batch_from_v1(runner.input_batch, scheduled))
            return original(*args, **kwargs)

        wrap_object(runner, "_build_attention_metadata", build)
    else:

        def gather(original: Callable, *args: Any, **kwargs: Any) -> Any:
            state, uniform = original(*args, **kwargs)
            if state is not None and state.has_prefill:
                return state._replace(decode_graph_eligible=False), None
            return state, uniform

        wrap_object(runner, "gather_batch_req_state", gather)

        def prepare_attn(original: Callable, input_batch: Any) -> Any:
            runtime.begin_step(batch_from_v2(input_batch, runner.req_states, runtime.is_warming_up))
            return original(input_batch)

        wrap_object(runner, "prepare_attn", prepare_attn)
