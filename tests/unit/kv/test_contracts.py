"""What `free_kv` takes from vLLM is there, in the form we know, in the installed 0.32 and in 0.33.

Oracle: vLLM's own source, read with `ast` for both as in `tests/unit/hooks/test_sources.py`.
"""

import ast

import pytest

from tests.unit.hooks.test_sources import VERSIONS, attributes, find, members, parsed, path_id

pytestmark = pytest.mark.vllm

COORDINATOR = ("v1/core/kv_cache_coordinator.py", "KVCacheCoordinator")
SCHEDULER = ("v1/core/sched/scheduler.py", "Scheduler")
MANAGER = ("v1/core/single_type_kv_cache_manager.py", "SingleTypeKVCacheManager")
SIGNATURES = {
    ("v1/worker/gpu_worker.py", "Worker", "get_kv_cache_spec"): "self",
    (*SCHEDULER, "__init__"): (
        "self vllm_config kv_cache_config structured_output_manager block_size hash_block_size "
        "mm_registry include_finished_set log_stats"
    ),
    (*SCHEDULER, "update_from_output"): "self scheduler_output model_runner_output",
    (*SCHEDULER, "_free_request"): "self request delay_free_blocks",
    ("config/scheduler.py", "SchedulerConfig", "get_scheduler_cls"): "self",
    ("v1/outputs.py", "AsyncModelRunnerOutput", "get_output"): "self",
    (*COORDINATOR, "find_longest_cache_hit"): "self block_hashes max_cache_hit_length",
    (*COORDINATOR, "remove_skipped_blocks"): (
        "self request_id processed_computed_tokens num_prompt_tokens"
    ),
    (*COORDINATOR, "get_num_blocks_to_allocate"): (
        "self request_id num_tokens new_computed_blocks num_encoder_tokens total_computed_tokens "
        "num_local_computed_tokens num_tokens_main_model apply_admission_cap prefill_end"
    ),
    (*COORDINATOR, "allocate_new_blocks"): (
        "self request_id num_tokens num_tokens_main_model num_encoder_tokens"
    ),
    (*COORDINATOR, "cache_blocks"): "self request num_computed_tokens",
    (*COORDINATOR, "get_num_cacheable_tokens"): "self num_computed_tokens kv_cache_group_id",
    (*COORDINATOR, "free"): "self request_id",
    (*COORDINATOR, "pop_blocks_for_free"): "self request_id",
    (*MANAGER, "remove_skipped_blocks"): (
        "self request_id processed_computed_tokens num_prompt_tokens"
    ),
    (*MANAGER, "get_num_blocks_to_allocate"): (
        "self request_id num_tokens new_computed_blocks total_computed_tokens "
        "num_local_computed_tokens num_tokens_main_model apply_admission_cap prefill_end"
    ),
    (*MANAGER, "find_longest_cache_hit"): (
        "cls block_hashes max_length kv_cache_group_ids block_pool kv_cache_spec drop_eagle_block "
        "alignment_tokens dcp_world_size pcp_world_size"
    ),
    (MANAGER[0], None, "register_all_kvcache_specs"): "vllm_config",
    ("v1/kv_cache_spec_registry.py", "KVCacheSpecRegistry", "register"): (
        "cls kvcache_spec_cls manager_class uniform_type_base_spec"
    ),
    ("v1/core/block_pool.py", "BlockPool", "free_blocks"): "self ordered_blocks",
    ("v1/core/block_pool.py", "BlockPool", "get_cached_block"): (
        "self block_hash kv_cache_group_ids"
    ),
}
MEMBERS = {
    ("config/vllm.py", "VllmConfig"): {"max_in_flight_tokens"},
    ("config/scheduler.py", "SchedulerConfig"): {
        "async_scheduling",
        "disable_hybrid_kv_cache_manager",
        "scheduler_cls",
    },
    SCHEDULER: {"kv_cache_manager", "max_model_len", "requests"},
    ("v1/core/block_pool.py", "BlockPool"): {"hash_block_size", "get_num_free_blocks"},
    MANAGER: {"req_to_blocks", "num_cached_block", "_null_block", "block_pool"},
    COORDINATOR: {"single_type_managers"},
}
# The keywords by which we take arguments.
CALLS = {
    ("v1/core/kv_cache_manager.py", "allocate_slots", "get_num_blocks_to_allocate"): {
        "request_id",
        "num_tokens",
        "prefill_end",
    },
    ("v1/core/kv_cache_manager.py", "allocate_slots", "remove_skipped_blocks"): {
        "num_prompt_tokens",
    },
    ("v1/core/sched/scheduler.py", "_request_remaining_blocks", "get_num_blocks_to_allocate"): {
        "request_id",
        "num_tokens",
        "apply_admission_cap",
        "prefill_end",
    },
    ("v1/engine/core.py", "__init__", "Scheduler"): {"vllm_config", "kv_cache_config"},
}


def _calls(version, file, caller, callee):
    return [
        {keyword.arg for keyword in call.keywords}
        for node in ast.walk(parsed(version, file))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name == caller
        for call in ast.walk(node)
        if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == callee
    ]


def _callers(version, place, callee):
    """Name the methods of a class that call a function."""
    file, class_name = place
    methods = members(members(parsed(version, file).body)[class_name].body)
    return {name for name in methods if _calls(version, file, name, callee)}


@pytest.mark.parametrize("version", VERSIONS)
class TestVllmIsAsWeKnowIt:
    @pytest.mark.parametrize(("place", "expected"), SIGNATURES.items(), ids=path_id)
    def test_signature(self, version, place, expected):
        arguments = find(version, *place).args
        assert [argument.arg for argument in arguments.args] == expected.split()
        assert not arguments.kwonlyargs + arguments.posonlyargs

    @pytest.mark.parametrize(("place", "names"), MEMBERS.items(), ids=path_id)
    def test_members(self, version, place, names):
        file, class_name = place
        assert names <= attributes(members(parsed(version, file).body)[class_name])

    @pytest.mark.parametrize(("place", "keywords"), CALLS.items(), ids=path_id)
    def test_call(self, version, place, keywords):
        calls = _calls(version, *place)
        assert calls
        assert all(keywords <= passed for passed in calls)

    def test_growing_prompts_are_asked_for_by_name(self, version):
        calls = _calls(
            version, "v1/engine/async_llm.py", "_add_streaming_input_request", "process_inputs"
        )
        assert [passed for passed in calls if "resumable" in passed]

    def test_freeing_comes_before_counting(self, version):
        """`allocate_slots` frees first, then counts what it needs."""
        source = ast.unparse(
            find(version, "v1/core/kv_cache_manager.py", "KVCacheManager", "allocate_slots")
        )
        freeing = source.index("remove_skipped_blocks(")
        assert freeing < source.rindex("get_num_blocks_to_allocate(")
        assert freeing < source.index("allocate_new_blocks(")
        assert "total_computed_tokens - request.num_in_flight_tokens" in source[freeing:]

    def test_the_asking_request_is_known_before_a_hit_is_looked_up(self, version):
        place = ("v1/core/kv_cache_manager.py", "KVCacheManager", "get_computed_blocks")
        lookup = find(version, *place)
        assert [argument.arg for argument in lookup.args.args][:2] == ["self", "request"]
        assert _callers(version, SCHEDULER, "_get_local_prefix_cache_hit") == {"schedule"}
        # `schedule` asks again for a connector's sake, which is refused.
        asking = {"_get_local_prefix_cache_hit", "schedule"}
        assert _callers(version, SCHEDULER, "get_computed_blocks") == asking
        manager = "v1/core/kv_cache_manager.py"
        assert _calls(version, manager, "get_computed_blocks", "find_longest_cache_hit")

    def test_an_ended_request_is_freed_by_one_function(self, version):
        for caller in ("finish_requests", "update_from_output"):
            assert _calls(version, SCHEDULER[0], caller, "_free_request"), caller
        assert _calls(version, SCHEDULER[0], "_free_request", "_free_blocks")

    def test_an_output_takes_further_attributes(self, version):
        """Routes travel as an attribute of a dataclass without slots, by pickle."""
        classes = [
            node
            for node in parsed(version, "v1/outputs.py").body
            if isinstance(node, ast.ClassDef) and node.name == "ModelRunnerOutput"
        ]
        assert [ast.unparse(mark) for mark in classes[0].decorator_list] == ["dataclass"]
        assert "__slots__" not in ast.unparse(classes[0])
        for executor in ("multiproc_executor.py", "uniproc_executor.py"):
            source = ast.unparse(parsed(version, f"v1/executor/{executor}"))
            assert "isinstance(output, AsyncModelRunnerOutput)" in source or (
                "isinstance(result, AsyncModelRunnerOutput)" in source
            )
            assert ".get_output()" in source

    def test_workers_sent_specs_are_pickled(self, version):
        """The core registers vLLM's own specs before it asks workers for theirs."""
        function = find(version, "v1/engine/core.py", "EngineCore", "_initialize_kv_caches")
        source = ast.unparse(function)
        assert source.index("register_all_kvcache_specs(") < source.index("get_kv_cache_specs()")
