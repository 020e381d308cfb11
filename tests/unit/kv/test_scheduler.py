"""vLLM's real schedulers, extended: many requests, each with routes of its own, some aborted.

Oracle: `named_worker.py`, which knows prefixes and definitions and nothing of the scheduler.
"""

import json
import random
from collections import deque

import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus

from flux_vllm.kv.register import register
from tests.unit.kv.named_worker import NamedWorker
from tests.unit.kv.pools import BLOCK_SIZE, MAX_MODEL_LEN, SINK_TOKENS, WINDOW_TOKENS, sparse_spec

pytestmark = pytest.mark.vllm

GROUPS, BLOCKS, CHUNK = 3, 260, 96


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's configuration."""
    folder = tmp_path_factory.mktemp("model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": GROUPS,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "hidden_size": 32,
        "head_dim": 32,
        "intermediate_size": 32,
        "vocab_size": 1000,
        "max_position_embeddings": MAX_MODEL_LEN,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


class Service:
    """A scheduler and its worker.

    Args:
        folder: of a model's configuration.
        is_async: whether each step is scheduled while the one before it runs.
        is_local: whether SPARSE prefill reads sinks and window alone.
        seed: of everything random.
        full_decode_tokens: of an answer, for which SPARSE decode reads everything.
    """

    def __init__(self, folder, is_async, is_local, seed, full_decode_tokens=0):
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.structured_output import StructuredOutputManager

        from flux_vllm.kv.scheduler import AsyncFluxScheduler, FluxScheduler

        register()
        init_none_hash(sha256)
        config = EngineArgs(
            model=str(folder),
            skip_tokenizer_init=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=CHUNK,
            max_num_seqs=8,
            enable_prefix_caching=True,
        ).create_engine_config()
        config.scheduler_config.async_scheduling = is_async
        config.cache_config.num_gpu_blocks = BLOCKS
        groups = [
            KVCacheGroupSpec(
                [f"model.layers.{layer}.self_attn.attn"],
                sparse_spec(
                    layer,
                    is_local,
                    waits_for_routes=True,
                    full_decode_tokens=full_decode_tokens,
                ),
            )
            for layer in range(GROUPS)
        ]
        self.scheduler = (AsyncFluxScheduler if is_async else FluxScheduler)(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=BLOCKS, kv_cache_tensors=[], kv_cache_groups=groups
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.chooser = random.Random(seed)
        self.worker = NamedWorker(
            self.scheduler,
            BLOCK_SIZE,
            SINK_TOKENS,
            WINDOW_TOKENS,
            is_local,
            full_decode_tokens,
            self.chooser,
        )
        self.lag = int(is_async)
        self.counts = {"preempted": 0, "aborted": 0, "hits": 0, "freed": 0}
        self.added = 0
        self._in_flight = deque()
        self._hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
        self._documents = [self._tokens(500) for _ in range(3)]
        free = self.worker.pool.free_blocks
        self._finished = []

        def counted(blocks):
            self.counts["freed"] += 1
            free(blocks)

        self.worker.pool.free_blocks = counted

    def _tokens(self, length):
        return [self.chooser.randrange(1000) for _ in range(length)]

    def add(self):
        """Queue a document's beginning and a question, or a question about an earlier answer."""
        if self._finished and self.chooser.random() < 0.4:
            known = self.chooser.choice(self._finished)[:700]
        else:
            known = self.chooser.choice(self._documents)[: self.chooser.randrange(500)]
        outputs = self.chooser.randrange(1, 60)
        request = Request(
            f"request-{self.added}",
            known + self._tokens(self.chooser.randrange(1, 40)),
            SamplingParams(max_tokens=outputs, ignore_eos=True),
            None,
            block_hasher=self._hasher,
        )
        self.added += 1
        self.scheduler.add_request(request)

    def abort(self):
        """Abort a request, running or waiting."""
        name = self.chooser.choice(list(self.scheduler.requests))
        self.scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)
        self.counts["aborted"] += 1

    def step(self):
        """Schedule a step, and process what is no longer in flight."""
        output = self.scheduler.schedule()
        self.counts["preempted"] += len(output.preempted_req_ids or ())
        self.counts["hits"] += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        self.check_blocks()
        self._in_flight.append((output, self.worker.execute(output)))
        while len(self._in_flight) > self.lag:
            self._process(*self._in_flight.popleft())

    def _process(self, output, result):
        rows = self.worker.rows
        self.scheduler.update_from_output(output, result)
        ended = [n for n in result.req_ids if n in rows and n not in self.scheduler.requests]
        self._finished = (self._finished + [list(rows[name].tokens) for name in ended])[-20:]

    def check_blocks(self):
        """Check that no block is free and held, or neither."""
        managers = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        held = {
            block.block_id
            for manager in managers
            for blocks in manager.req_to_blocks.values()
            for block in blocks
            if not block.is_null
        }
        free = {b.block_id for b in self.worker.pool.free_block_queue.get_all_free_blocks()}
        assert not held & free
        assert len(held) + len(free) == BLOCKS - 1

    def run(self, requests):
        """Serve so many requests, with aborts, to the end."""
        while self.added < requests or self.scheduler.requests:
            if self.added < requests and len(self.scheduler.requests) < 12:
                self.add()
            if self.scheduler.requests and self.chooser.random() < 0.01:
                self.abort()
            if self.chooser.random() < 0.005:
                self.scheduler.reset_prefix_cache(reset_running_requests=not self.lag)
            self.step()
        while self._in_flight:
            self._process(*self._in_flight.popleft())

    def check_end(self):
        """Check that nothing is left of any request."""
        assert self.worker.pool.get_num_free_blocks() == BLOCKS - 1
        flux = self.scheduler._flux
        assert not flux._live
        assert flux._given_back == 0
        assert not any(manager.sparse_requests for manager in flux._waiting)


@pytest.mark.parametrize("full_decode_tokens", [0, 20])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_mixed_requests(folder, is_async, is_local, full_decode_tokens):
    service = Service(folder, is_async, is_local, 3, full_decode_tokens)
    service.run(120)
    service.check_end()
    assert min(service.counts.values()) > 0, service.counts


@pytest.mark.parametrize("is_async", [False, True], ids=["sync", "async"])
def test_hits_are_looked_up_for_the_request_that_asks(folder, is_async):
    service = Service(folder, is_async, is_local=True, seed=0)
    coordinator, asking = service.scheduler.kv_cache_manager.coordinator, []
    find = coordinator.find_longest_cache_hit

    def noted(*arguments):
        asking.append(service.scheduler._flux._asking)
        return find(*arguments)

    coordinator.find_longest_cache_hit = noted
    service.add()
    service.add()
    while service.scheduler.requests:
        service.step()
    assert list(dict.fromkeys(asking)) == ["request-0", "request-1"]


@pytest.mark.slow
@pytest.mark.long
def test_soak_of_2000_requests(folder):
    service = Service(folder, is_async=True, is_local=True, seed=0)
    service.run(2000)
    service.check_end()
    assert min(service.counts.values()) > 20, service.counts
