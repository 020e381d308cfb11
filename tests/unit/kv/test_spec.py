"""The spec alone: what it holds, how it travels, how vLLM sizes memory by it.

Oracle: positions counted one by one.
"""

import copy
import pickle
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from flux_vllm.kv.register import register
from tests.conftest import REPOSITORY
from tests.unit.kv.keys_read import KeysRead
from tests.unit.kv.pools import BLOCK_SIZE, FULL, sparse_spec

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("window_tokens", [1, 15, 16, 17, 50, 300])
@pytest.mark.parametrize("processed", [0, 1, 60, 177, 192, 193, 194, 500])
def test_freed_end_keeps_the_window_and_a_tile_before_it(window_tokens, processed):
    spec = sparse_spec(window_tokens=window_tokens)
    first_key = processed - window_tokens + 1
    kept_from = max(first_key - 128, 0)
    blocks = [block for block in range(100) if (block + 1) * BLOCK_SIZE <= kept_from]
    assert spec.freed_end(processed) == len(blocks)
    assert spec.window_block(processed) == max(first_key, 0) // BLOCK_SIZE


def test_freed_end_keeps_a_larger_tile_of_float8():
    spec = replace(sparse_spec(window_tokens=50), dtype=torch.uint8)
    first_key = 500 - 50 + 1
    assert spec.freed_end(500) == (first_key - 224) // BLOCK_SIZE
    assert spec.most_blocks(1, 10**6) == sparse_spec(window_tokens=50 + 96).most_blocks(1, 10**6)


def test_freed_end_keeps_a_block_where_blocks_are_larger_than_tiles():
    spec = replace(sparse_spec(window_tokens=100), block_size=256)
    assert spec.freed_end(256 + 100 - 1 + 255) == 0
    assert spec.freed_end(256 + 100 - 1 + 256) == 1


@pytest.mark.parametrize(
    ("sink_tokens", "blocks"), [(0, 1), (1, 1), (16, 1), (17, 2), (32, 2), (33, 3)]
)
def test_sink_blocks(sink_tokens, blocks):
    assert sparse_spec(sink_tokens=sink_tokens).sink_blocks == blocks


def test_most_blocks_is_what_the_worst_moment_holds():
    spec = sparse_spec()
    for in_flight in (1, 16, 97, 192):
        worst = 0
        for processed in range(900):
            last = -(-(processed + in_flight) // BLOCK_SIZE)
            freed = max(spec.freed_end(processed) - spec.sink_blocks, 0)
            worst = max(worst, last - freed)
        assert worst <= spec.most_blocks(in_flight, 10**6) <= worst + 1
    assert spec.most_blocks(192, 100) == -(-100 // BLOCK_SIZE)
    assert sparse_spec(is_local=False).most_blocks(1, 1000) == -(-1000 // BLOCK_SIZE)


@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
@pytest.mark.parametrize("full_decode_tokens", [0, 1, 30])
@pytest.mark.parametrize("resumed_tokens", [0, 101, 110, 130, 131, 160])
def test_whole_until_the_last_query_that_reads_everything(
    is_local, full_decode_tokens, resumed_tokens
):
    """By position, whether an answer's first tokens are decoded or computed anew."""
    prompt = 100
    spec = sparse_spec(is_local=is_local, full_decode_tokens=full_decode_tokens)
    keys = KeysRead(BLOCK_SIZE, 0, 1, is_local, full_decode_tokens)
    expected = 0
    for position in range(50, 300):
        for prefill_end in (prompt, max(prompt, resumed_tokens)):
            if len(keys.of(position, prompt, position < prefill_end, True)) == position + 1:
                expected = position + 1
    if not (is_local or full_decode_tokens or resumed_tokens):
        expected += 1  # vLLM's end of a fresh prefill is that of a resumed one, less its last token
    assert spec.whole_until(prompt, max(prompt, resumed_tokens - 1)) == expected


def test_most_blocks_is_everything_where_an_answers_first_tokens_read_it():
    spec = sparse_spec(full_decode_tokens=1)
    assert not spec.frees_in_prefill
    assert spec.most_blocks(1, 1000) == -(-1000 // BLOCK_SIZE)


def test_max_memory_usage_bytes():
    config = SimpleNamespace(
        max_in_flight_tokens=96, model_config=SimpleNamespace(max_model_len=10**5)
    )
    spec = sparse_spec()
    assert spec.page_size_bytes == FULL.page_size_bytes
    assert spec.max_memory_usage_bytes(config) == spec.most_blocks(96, 10**5) * spec.page_size_bytes
    waits = sparse_spec(waits_for_routes=True)
    assert waits.max_memory_usage_bytes(config) == 10**5 // BLOCK_SIZE * spec.page_size_bytes


def test_copies_are_equal():
    spec = sparse_spec(3, is_local=False)
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert spec != replace(spec, cluster=2)


def test_reading_process_registers_it(tmp_path):
    """The scheduler's process gets specs from its workers and knows nothing else of flux."""
    register()  # as a worker does before it makes specs
    file = tmp_path / "spec.pickle"
    file.write_bytes(pickle.dumps(sparse_spec()))
    code = (
        "import pickle, sys, pathlib\n"
        f"spec = pickle.loads(pathlib.Path({str(file)!r}).read_bytes())\n"
        "from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry\n"
        "from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec\n"
        "names = [KVCacheSpecRegistry.get_manager_class(spec).__name__]\n"
        "from vllm.v1 import kv_cache_spec_registry as registry\n"
        "known = registry._REGISTRY_KVCACHESPEC_LIST\n"
        "names += [str(kind in known) for kind in (FullAttentionSpec, SlidingWindowSpec)]\n"
        "sys.stdout.write(' '.join(names))\n"
    )
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    assert shown.stdout.split()[-3:] == ["FluxManager", "True", "True"]
