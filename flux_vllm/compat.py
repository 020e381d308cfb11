"""Every place where vLLM has no extension point for what we need, patched here and nowhere else.

vLLM 0.32 and 0.33. Each patch wraps one function; `tests/unit/test_compat.py` fails when vLLM's
side of it changes. Only the first two touch classes, and both ask first whether the engine uses
flux; the rest wrap the objects of a flux engine alone.
"""

import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from flux_vllm.batch import Batch
from flux_vllm.errors import UnsupportedConfigurationError
from flux_vllm.router.checkpoint import ROUTER_FILE_NAME
from flux_vllm.routing.prompts import Prompt


def uses_flux(vllm_config: Any) -> bool:
    """Say whether an engine's attention backend is ours."""
    backend = vllm_config.attention_config.backend
    return backend is not None and backend.name == "FLUX"


# In every process that loads plugins.


def install_front_end_hooks() -> None:
    """Let the platform choose our backend, and check an engine's configuration before it starts."""
    from vllm import plugins
    from vllm.platforms.cpu import CpuPlatform

    wrap(CpuPlatform, "get_attn_backend_cls", _choose_on_cpu, is_classmethod=True)
    wrap(plugins, "load_general_plugins", _hook_again)
    arguments = sys.modules.get("vllm.engine.arg_utils")
    if arguments is not None:  # not yet, where a program loads the plugins first of all
        wrap(arguments.EngineArgs, "create_engine_config", _check_engine_config)


def _hook_again(original: Callable) -> None:
    """EngineArgs asks for the plugins before it makes a configuration, loaded or not."""
    original()
    install_front_end_hooks()


def _choose_on_cpu(
    original: Callable,
    selected_backend: Any,
    attn_selector_config: Any,
    *args: Any,
    **kwargs: Any,
) -> str:
    """vLLM's CPU platform knows its own backends only and passes over any other."""
    if selected_backend is None or selected_backend.name != "FLUX":
        return original(selected_backend, attn_selector_config, *args, **kwargs)
    if attn_selector_config.use_mla or attn_selector_config.use_sparse:
        raise UnsupportedConfigurationError(
            "--attention-backend flux: expected a model with ordinary attention over keys and "
            "values, found multi-head latent or sparse attention (MLA); serve it without "
            "--attention-backend flux"
        )
    return selected_backend.get_path()


def _check_engine_config(original: Callable, self: Any, *args: Any, **kwargs: Any) -> Any:
    from flux_vllm import startup

    vllm_config = original(self, *args, **kwargs)
    startup.check_front_end(vllm_config)
    return vllm_config


# In the worker of a flux engine.


def install_worker_hooks() -> None:
    """Attach the runtime to workers; called when our backend is imported, so only for flux."""
    from vllm.model_executor.model_loader import default_loader
    from vllm.platforms import current_platform
    from vllm.v1.worker.gpu_worker import Worker

    wrap(default_loader, "filter_duplicate_safetensors_files", _leave_router_out)

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


def _cluster_layers(original: Callable, self: Any) -> Any:
    """vLLM groups layers by their specs; the runner is asked again when graphs are profiled."""
    from flux_vllm.kv.worker import cluster_kv_cache

    if uses_flux(self.vllm_config):
        cluster_kv_cache(self)
    return original(self)


def _attach_then_measure(original: Callable, self: Any) -> int:
    """The model is loaded and the KV cache is not sized yet: attach, and set memory aside."""
    from flux_vllm import startup

    if not uses_flux(self.vllm_config):
        return original(self)
    held = _device_memory(self.device)
    runtime = startup.attach(self.model_runner, self.vllm_config, self.device)
    hook_worker(self, runtime)
    held = _device_memory(self.device) - held
    return startup.reserve_buffers(original(self) - held, self, runtime)


def _device_memory(device: Any) -> int:
    import torch

    return 0 if device.type == "cpu" else torch.cuda.memory_allocated(device)


def kv_cache_groups(worker: Any) -> list[Any]:
    """Say how vLLM will group the model's layers in its KV cache (KVCacheGroupSpec)."""
    vllm_config, specs = worker.vllm_config, dict(worker.get_kv_cache_spec())
    try:
        from vllm.v1.core.kv_cache_config_builder import get_kv_cache_config_builder
    except ImportError:  # vLLM 0.32
        from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

        return get_kv_cache_groups(vllm_config, specs)
    return get_kv_cache_config_builder(vllm_config).get_kv_cache_groups(vllm_config, specs)


def hook_worker(worker: Any, runtime: Any) -> None:
    """Tell the runtime of each step's requests and of those that ended."""

    def execute_model(original: Callable, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        runtime.finish(scheduler_output.finished_req_ids)
        try:
            runtime.admit(map(prompt_of, scheduler_output.scheduled_new_reqs))
            if runtime.has_open_prompts:
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
        runtime.end_step()
        return output

    def warm_up(original: Callable, *args: Any, **kwargs: Any) -> Any:
        runtime.is_warming_up = True
        try:
            return original(*args, **kwargs)
        finally:
            runtime.is_warming_up = False

    wrap_object(worker, "compile_or_warm_up_model", warm_up)
    wrap_object(worker, "execute_model", execute_model)
    wrap_object(worker, "sample_tokens", sample_tokens)
    # For `collective_rpc`.
    worker.flux_status = runtime.status
    worker.flux_fix_routes = runtime.fix_routes
    _hook_runner(worker.model_runner, runtime)


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


def wrap(owner: Any, name: str, wrapper: Callable, is_classmethod: bool = False) -> None:
    """Replace a function of a class or module by `wrapper(original, ...)`, once."""
    found = vars(owner)[name]
    function = found.__func__ if is_classmethod else found
    if hasattr(function, "__flux_wrapped__"):
        return

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if is_classmethod:
            return wrapper(functools.partial(function, args[0]), *args[1:], **kwargs)
        return wrapper(function, *args, **kwargs)

    wrapped.__flux_wrapped__ = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped) if is_classmethod else wrapped)


def wrap_object(target: Any, name: str, wrapper: Callable) -> None:
    """Replace one object's method by `wrapper(original, ...)`."""
    original = getattr(target, name)
    setattr(target, name, functools.wraps(original)(functools.partial(wrapper, original)))
