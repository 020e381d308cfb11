"""Random admission, chunks, decode, preemption, aborts and eviction on vLLM's real KVCacheManager.

Oracle: `simulation.py`, which knows prefixes and definitions and nothing of the managers.
"""

from dataclasses import replace

import pytest

from flux_vllm.kv.spec import FluxSpec
from tests.unit.kv.pools import BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, make_manager
from tests.unit.kv.simulation import Simulation

pytestmark = pytest.mark.vllm

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2))]


def _simulation(
    is_local=True, lag=0, seed=0, is_sparse=(False, True, True), full_decode_tokens=0, **manager
):
    patterns = {"is_local": is_local, "full_decode_tokens": full_decode_tokens}
    return Simulation(
        make_manager(is_sparse, **patterns, **manager),
        list(is_sparse),
        BLOCK_SIZE,
        SINK_TOKENS,
        WINDOW_TOKENS,
        lag=lag,
        seed=seed,
        **patterns,
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
def test_every_query_finds_its_keys(is_local, lag, seed):
    run = _simulation(is_local, lag, seed)
    run.run(300)
    assert run.manager.block_pool.get_num_free_blocks() == len(run.manager.block_pool.blocks) - 1
    assert min(run.counts[what] for what in ("hits", "preemptions", "null")) > 0, run.counts
    assert bool(run.counts["null_hits"]) == is_local, run.counts


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
@pytest.mark.parametrize("is_sparse", [(None, None, None), (True, None, None), (None, True, False)])
def test_every_query_finds_its_keys_under_routes_of_its_own(is_sparse, is_local, lag, seed):
    run = _simulation(is_local, lag, seed, is_sparse)
    run.run(300)
    assert run.manager.block_pool.get_num_free_blocks() == len(run.manager.block_pool.blocks) - 1
    assert min(run.counts[what] for what in ("hits", "preemptions", "null")) > 0, run.counts
    flux = run.manager.flux
    assert not flux._live
    assert flux._given_back == 0
    assert not any(manager.sparse_requests for manager in flux._waiting)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
@pytest.mark.parametrize("is_sparse", [(False, True, True), (True, None, None)])
def test_an_answers_first_tokens_find_every_key(is_sparse, is_local, lag, seed):
    run = _simulation(is_local, lag, seed, is_sparse, full_decode_tokens=30)
    run.run(300)
    assert run.manager.block_pool.get_num_free_blocks() == len(run.manager.block_pool.blocks) - 1
    assert min(run.counts[what] for what in ("hits", "preemptions", "null")) > 0, run.counts
    assert not run.counts["null_hits"], "the first tokens read the middle of a prefix"


@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("is_sparse", [(False, True, True), (None, None, None)])
def test_keys_freed_before_the_last_full_decode_are_noticed(monkeypatch, is_sparse, lag):
    """One token too early; two where a step is in flight, which reads them before they go."""
    whole_until = FluxSpec.whole_until
    monkeypatch.setattr(
        FluxSpec, "whole_until", lambda *arguments: whole_until(*arguments) - 1 - lag
    )
    run = _simulation(
        lag=lag, is_sparse=is_sparse, full_decode_tokens=30, num_blocks=400, enable_caching=False
    )
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match=r"group .*query .*: key .* in block"):
        run.run(300)


def test_routes_of_another_request_are_noticed():
    run = _simulation(is_sparse=(None, None, None))
    run.check_blocks = lambda: None
    settle, former = run.manager.flux.settle, [[0, 0, 0]]

    def settle_late(name, routes):
        settle(name, former.pop())
        former.append(routes)

    run.manager.flux.settle = settle_late
    with pytest.raises(AssertionError, match="group .*query"):
        run.run(300)


def test_a_hit_for_sparse_routes_does_not_serve_others(monkeypatch):
    """A prefix whose middle is gone serves no request whose routes are not known."""
    from flux_vllm.kv.manager import FluxManager

    monkeypatch.setattr(FluxManager, "is_sparse", lambda self, name: True)
    run = _simulation(is_sparse=(None, None, None))
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match="group .*query"):
        run.run(300)


@pytest.mark.parametrize("enable_caching", [True, False])
def test_all_layers_sparse(enable_caching):
    run = _simulation(is_sparse=(True,), enable_caching=enable_caching)
    run.run(300)
    assert run.counts["null"] > 0
    assert run.manager.block_pool.get_num_free_blocks() == len(run.manager.block_pool.blocks) - 1


def test_without_prefix_cache():
    run = _simulation(enable_caching=False)
    run.run(300)
    assert run.counts["null"] > 0
    assert not run.counts["hits"]


def test_a_window_freed_too_early_is_noticed():
    run = _simulation(is_sparse=(False, True), enable_caching=False)
    run.keys_read = replace(run.keys_read, window_tokens=WINDOW_TOKENS + 200)
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match=r"group 1, query .* key .* is "):
        run.run(300)


def test_a_hit_one_block_short_is_noticed(monkeypatch):
    monkeypatch.setattr(
        FluxSpec,
        "window_block",
        lambda self, position: max(0, position - WINDOW_TOKENS + 1) // BLOCK_SIZE + 1,
    )
    run = _simulation()
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match="key"):
        run.run(300)


def test_exchanged_groups_are_noticed():
    run = _simulation()
    run.is_sparse = [True, False, True]
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match="group 1"):
        run.run(300)


def test_prefill_that_reads_everything_is_noticed():
    run = _simulation(is_local=True)
    run.keys_read = replace(run.keys_read, is_local=False)
    run.check_blocks = lambda: None
    with pytest.raises(AssertionError, match="key"):
        run.run(300)
