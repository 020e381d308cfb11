"""What we wrap and read of vLLM is there, in the form we know, in the installed 0.32 and in 0.33.

Oracle: vLLM's own source, read with `ast` alike for both (0.33's Python files are fetched once by
`tools/vllm_sources.py`), so that a function which changes its parameters or goes away fails here
first. `test_wrap.py`, `test_engines.py` and `test_worker.py` run the wrappers themselves.
"""

import ast
import functools
import re
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.vllm

VERSIONS = ["installed", "0.33.0"]

# file, class (or None), function: its parameters
SIGNATURES = {
    ("plugins/__init__.py", None, "load_general_plugins"): [],
    ("platforms/cpu.py", "CpuPlatform", "get_attn_backend_cls"): [
        "cls",
        "selected_backend",
        "attn_selector_config",
        "num_heads",
    ],
    ("engine/arg_utils.py", "EngineArgs", "create_engine_config"): [
        "self",
        "usage_context",
        "headless",
    ],
    (
        "model_executor/model_loader/weight_utils.py",
        None,
        "filter_duplicate_safetensors_files",
    ): ["hf_weights_files", "hf_folder", "index_file"],
    (
        "v1/worker/gpu/spec_decode/standalone_ar/speculator.py",
        "StandaloneARSpeculator",
        "load_draft_model",
    ): ["self", "target_model", "target_attn_layer_names"],
    ("v1/worker/gpu_worker.py", "Worker", "determine_available_memory"): ["self"],
    ("v1/worker/cpu_worker.py", "CPUWorker", "determine_available_memory"): ["self"],
    ("v1/worker/gpu_worker.py", "Worker", "execute_model"): ["self", "scheduler_output"],
    ("v1/worker/gpu_worker.py", "Worker", "sample_tokens"): ["self", "grammar_output"],
    ("v1/worker/gpu_worker.py", "Worker", "compile_or_warm_up_model"): ["self"],
    ("v1/worker/cpu_worker.py", "CPUWorker", "compile_or_warm_up_model"): ["self"],
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "capture_model"): ["self"],
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "get_model"): ["self"],
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner", "get_model"): ["self"],
    ("v1/worker/lora_model_runner_mixin.py", "LoRAModelRunnerMixin", "_set_active_loras"): [
        "self",
        "prompt_lora_mapping",
        "token_lora_mapping",
        "lora_requests",
        "mapping_type",
    ],
    ("forward_context.py", None, "set_forward_context"): [
        "attn_metadata",
        "vllm_config",
        "num_tokens",
        "num_tokens_across_dp",
        "cudagraph_runtime_mode",
        "batch_descriptor",
        "ubatch_slices",
        "slot_mapping",
        "skip_compiled",
        "is_padding",
    ],
    ("model_executor/layers/attention/attention.py", None, "unified_kv_cache_update"): [
        "key",
        "value",
        "layer_name",
    ],
    ("v1/worker/utils.py", None, "add_kv_sharing_layers_to_kv_cache_groups"): [
        "shared_kv_cache_layers",
        "kv_cache_groups",
        "runner_only_attn_layers",
    ],
    ("compilation/cudagraph_pool.py", None, "capture_pool"): ["pool", "vllm_config"],
    ("distributed/parallel_state.py", None, "graph_capture"): ["device"],
    ("v1/worker/gpu_model_runner.py", "GPUModelRunner", "_is_uniform_decode"): [
        "max_num_scheduled_tokens",
        "uniform_decode_query_len",
        "num_tokens",
        "num_reqs",
        "force_uniform_decode",
    ],
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner", "prepare_attn"): ["self", "input_batch"],
    ("v1/worker/gpu/model_runner.py", "GPUModelRunner", "gather_batch_req_state"): [
        "self",
        "scheduler_output",
        "dummy_run",
    ],
    ("v1/attention/backends/flash_attn.py", "FlashAttentionMetadataBuilder", "build"): [
        "self",
        "common_prefix_len",
        "common_attn_metadata",
        "fast_build",
    ],
    ("v1/attention/backends/registry.py", None, "register_backend"): [
        "backend",
        "class_path",
        "is_mamba",
    ],
}
# file, function, callee: keywords that a call in it passes, as our wrappers expect to find them
CALLS = {
    ("v1/worker/gpu_model_runner.py", "execute_model", "_build_attention_metadata"): {
        "num_scheduled_tokens"
    },
    (
        "v1/worker/gpu_model_runner.py",
        "_determine_batch_execution_and_padding",
        "_is_uniform_decode",
    ): {"force_uniform_decode"},
    ("v1/worker/gpu/cudagraph_utils.py", None, "capture_model"): {"profile_only"},
    ("v1/worker/gpu/model_runner.py", "execute_model", "prepare_attn"): set(),
    ("v1/worker/gpu/model_runner.py", "execute_model", "gather_batch_req_state"): set(),
    ("model_executor/model_loader/default_loader.py", None, "filter_duplicate_safetensors_files"): (
        set()
    ),
}
# file, class: names it must define (fields, properties or methods) that start-up reads
MEMBERS = {
    ("model_executor/layers/mamba/abstract.py", "MambaBase"): {
        "get_kv_cache_spec",
        "get_attn_backend",
        "kv_cache",
    },
    ("v1/kv_cache_interface.py", "MambaSpec"): {
        "shapes",
        "dtypes",
        "mamba_cache_mode",
        "num_speculative_blocks",
        "num_prefill_checkpoint_blocks",
        "prefill_checkpoint_alignment",
    },
    ("config/model.py", "ModelConfig"): {
        "use_mla",
        "is_encoder_decoder",
        "runner_type",
        "is_attention_free",
        "is_hybrid",
        "uses_mrope",
        "mrope_num_dims",
        "is_mm_prefix_lm",
        "rswa_window",
        "get_total_num_hidden_layers",
        "get_head_size",
        "model_arch_config",
        "served_model_name",
        "supports_multimodal_inputs",
        "enable_prompt_embeds",
    },
    ("config/parallel.py", "ParallelConfig"): {
        "decode_context_parallel_size",
        "prefill_context_parallel_size",
        "pipeline_parallel_size",
        "use_ubatching",
        "data_parallel_size",
        "is_moe_model",
    },
    ("config/cache.py", "CacheConfig"): {
        "prefix_match_unit",
        "kv_sharing_fast_prefill",
        "block_size",
    },
    ("config/vllm.py", "VllmConfig"): {
        "attention_config",
        "additional_config",
        "kv_transfer_config",
        "speculative_config",
        "lora_config",
        "observability_config",
    },
    ("config/compilation.py", "CompilationConfig"): {
        "cudagraph_mode",
        "static_forward_context",
        "use_inductor_graph_partition",
    },
    ("config/observability.py", "ObservabilityConfig"): {"enable_layerwise_nvtx_tracing"},
    ("v1/core/sched/output.py", "NewRequestData"): {
        "req_id",
        "prompt_token_ids",
        "prompt_embeds",
        "mm_features",
        "lora_request",
        "num_computed_tokens",
    },
    ("v1/core/sched/output.py", "CachedRequestData"): {"req_ids", "num_computed_tokens"},
    ("v1/core/sched/output.py", "SchedulerOutput"): {
        "scheduled_new_reqs",
        "scheduled_cached_reqs",
        "num_scheduled_tokens",
        "finished_req_ids",
    },
    ("distributed/parallel_state.py", "GroupCoordinator"): {
        "world_size",
        "cpu_group",
        "device_group",
        "is_first_rank",
        "is_last_rank",
        "isend_tensor_dict",
        "recv_tensor_dict",
    },
    ("model_executor/offloader/base.py", "BaseOffloader"): {
        "sync_prev_onload",
        "join_after_forward",
    },
    ("config/attention.py", "AttentionConfig"): {"backend"},
    ("config/speculative.py", "SpeculativeConfig"): {
        "method",
        "attention_backend",
        "use_gemma4_mtp",
    },
    ("v1/kv_cache_interface.py", "UniformTypeKVCacheSpecs"): {"first_spec"},
    ("v1/worker/gpu/model_runner.py", "BatchReqState"): {"has_prefill", "decode_graph_eligible"},
    ("v1/attention/backends/flash_attn.py", "FlashAttentionMetadataBuilder"): {
        "aot_sliding_window"
    },
    ("v1/attention/backends/flash_attn.py", "FlashAttentionMetadata"): {"max_num_splits"},
    ("config/model_arch.py", "ModelArchitectureConfig"): {"__getitem__", "head_size"},
    ("v1/attention/backends/flash_attn.py", "FlashAttentionImpl"): {"sinks"},
    ("v1/attention/backends/cpu_attn.py", "CPUAttentionBackendImpl"): {"sinks"},
    ("model_executor/layers/attention/attention.py", "Attention"): {
        "kv_sharing_target_layer_name",
        "query_quant",
    },
}


@functools.cache
def package(version: str) -> Path:
    if version == "installed":
        import vllm

        return Path(vllm.__file__).parent
    from tools.vllm_sources import vllm_sources

    return vllm_sources(version) / "vllm"


@functools.cache
def parsed(version: str, file: str) -> ast.Module:
    return ast.parse((package(version) / file).read_text())


def members(body: list[ast.stmt]) -> dict[str, ast.stmt]:
    found: dict[str, ast.stmt] = {}
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            found[node.target.id] = node
    return found


def attributes(class_node: ast.ClassDef) -> set[str]:
    """Name what a class defines in its body, or sets on itself when it is made."""
    found = members(class_node.body)
    assigned = {
        node.attr
        for name in ("__init__", "__post_init__")
        for node in ast.walk(found.get(name, ast.Module([], [])))
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
    }
    return found.keys() | assigned


def find(version: str, file: str, class_name: str | None, name: str) -> Any:
    scope = members(parsed(version, file).body)
    if class_name is not None:
        assert class_name in scope, f"{version} {file}: no class {class_name}"
        scope = members(scope[class_name].body)  # type: ignore[attr-defined]
    assert name in scope, f"{version} {file}: {class_name} has no {name}"
    return scope[name]


def path_id(value: Any) -> str:
    return ".".join(str(part) for part in value if part) if isinstance(value, tuple) else ""


@pytest.mark.parametrize("version", VERSIONS)
class TestVllmIsAsWeKnowIt:
    @pytest.mark.parametrize(("place", "expected"), SIGNATURES.items(), ids=path_id)
    def test_signature(self, version: str, place: tuple, expected: list[str]) -> None:
        arguments = find(version, *place).args
        assert [a.arg for a in arguments.posonlyargs + arguments.args] == expected
        assert not arguments.kwonlyargs
        assert arguments.vararg is None
        assert arguments.kwarg is None

    @pytest.mark.parametrize(("place", "keywords"), CALLS.items(), ids=path_id)
    def test_call(self, version: str, place: tuple, keywords: set[str]) -> None:
        """The call that we step into is there, by the name that we replace."""
        file, caller, callee = place
        callers = [
            node
            for node in ast.walk(parsed(version, file))
            if caller is None or (isinstance(node, ast.FunctionDef) and node.name == caller)
        ]
        passed = [
            {keyword.arg for keyword in call.keywords}
            for node in callers
            for call in ast.walk(node)
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == callee
        ]
        assert passed, f"{caller} does not call {callee}"
        assert all(keywords <= found for found in passed)

    @pytest.mark.parametrize(("place", "names"), MEMBERS.items(), ids=path_id)
    def test_members(self, version: str, place: tuple, names: set[str]) -> None:
        file, class_name = place
        found = attributes(members(parsed(version, file).body)[class_name])
        assert names <= found, names - found

    def test_tokens_and_positions_are_of_the_dtypes_that_a_probe_gives(self, version: str) -> None:
        """Compiled models do not check what they get."""
        for file in ("v1/worker/gpu_model_runner.py", "v1/worker/gpu/input_batch.py"):
            source = (package(version) / file).read_text()
            for name, dtype in (("input_ids", "int32"), ("positions", "int64")):
                made = re.search(rf"self\.{name} = [^=]*?dtype=torch\.(\w+)", source)
                assert made is not None
                assert made[1] == dtype

    def test_build_takes_the_scheduled_tokens(self, version: str) -> None:
        place = "v1/worker/gpu_model_runner.py", "GPUModelRunner", "_build_attention_metadata"
        function = find(version, *place)
        assert "num_scheduled_tokens" in [argument.arg for argument in function.args.args]

    def test_dummy_runs_do_not_look_like_steps(self, version: str) -> None:
        """V1's warm-up builds metadata without `num_scheduled_tokens`."""
        function = find(version, "v1/worker/gpu_model_runner.py", "GPUModelRunner", "_dummy_run")
        calls = [
            {keyword.arg for keyword in call.keywords}
            for call in ast.walk(function)
            if isinstance(call, ast.Call)
            and ast.unparse(call.func).endswith("_build_attention_metadata")
        ]
        assert calls
        assert all("num_scheduled_tokens" not in passed for passed in calls)

    @pytest.mark.parametrize(
        "place",
        [
            (
                "v1/spec_decode/llm_base_proposer.py",
                "SpecDecodeBaseProposer",
                "_create_draft_vllm_config",
            ),
            ("v1/worker/gpu/spec_decode/eagle/utils.py", None, "load_eagle_model"),
            (
                "v1/worker/gpu/spec_decode/standalone_ar/speculator.py",
                "StandaloneARSpeculator",
                "load_draft_model",
            ),
        ],
        ids=path_id,
    )
    def test_drafters_are_made_of_the_engines_configuration(
        self, version: str, place: tuple
    ) -> None:
        """V1 and V2's EAGLE by the drafter's own backend in it, V2's draft model by the engine's.

        `tests/unit/startup/test_drafter.py` runs the installed version's.
        """
        source = ast.unparse(find(version, *place))
        assert "vllm_config" in source
        by_name = "attention_backend" in source or "apply_draft_overrides" in source
        assert by_name == ("standalone_ar" not in place[0])

    def test_plugins_come_before_the_configuration(self, version: str) -> None:
        """EngineArgs looks `load_general_plugins` up anew, so it finds ours."""
        function = find(version, "engine/arg_utils.py", "EngineArgs", "__post_init__")
        imports = [
            alias.name
            for node in ast.walk(function)
            if isinstance(node, ast.ImportFrom) and node.module == "vllm.plugins"
            for alias in node.names
        ]
        assert imports == ["load_general_plugins"]

    def test_connectors_see_no_layer_without_a_batch_of_theirs(self, version: str) -> None:
        """A probe comes before a step's metadata is bound and after the last one's is cleared."""
        file = "model_executor/layers/attention/kv_transfer_utils.py"
        hook = find(version, file, None, "maybe_transfer_kv_layer")
        assert "not connector.has_connector_metadata()" in ast.unparse(hook)

    def test_no_cpu_worker_method_hides_ours(self, version: str) -> None:
        """`execute_model` is wrapped on the object; a CPUWorker of its own would do too."""
        scope = members(parsed(version, "v1/worker/cpu_worker.py").body)
        bases = [ast.unparse(base) for base in scope["CPUWorker"].bases]  # type: ignore[attr-defined]
        assert bases == ["Worker"]
