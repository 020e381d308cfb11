"""All groups at once: the same blocks as vLLM's coordinator gives, and what is counted.

Oracle: vLLM's own coordinator and managers, one group after the other.
"""

import pytest

from tests.unit.kv.pools import (
    BLOCK_SIZE,
    SINK_TOKENS,
    WINDOW_TOKENS,
    CountingReport,
    make_manager,
)
from tests.unit.kv.simulation import Simulation

pytestmark = pytest.mark.vllm


def _run(takes_over, lag=1, **arguments):
    manager = make_manager([False, True, True], takes_over=takes_over, **arguments)
    run = Simulation(
        manager, [False, True, True], BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, True, lag, seed=7
    )
    if not takes_over:
        for single in manager.coordinator.single_type_managers[1:]:
            single.most_blocks = single.kv_cache_spec.most_blocks(2 * 96, 1024)
    states = []
    step = run.step

    def noted():
        step()
        states.append(
            [
                {name: [b.block_id for b in blocks] for name, blocks in m.req_to_blocks.items()}
                for m in manager.coordinator.single_type_managers
            ]
            + [manager.block_pool.get_num_free_blocks(), dict(run.counts)]
        )

    run.step = noted
    run.run(250)
    return states


@pytest.mark.parametrize(
    ("routes", "sparse"),
    [
        ([0, 0, 0, 0, 0, 0], {0, 1, 2}),
        ([0, 1, 0, 0, 0, 0], {1, 2}),  # one FULL layer keeps its cluster's keys
        ([0, 0, 1, 0, 0, 1], {0}),
        ([1, 1, 1, 1, 1, 1], set()),
        ([0, 0, 0, -1, 0, 0], {0, 2}),  # a layer without a route attends to everything
        ([-1, -1, -1, -1, -1, -1], set()),
    ],
)
def test_a_cluster_gives_back_when_all_its_layers_are_sparse(routes, sparse):
    manager = make_manager([None, None, None], layers=[[0, 1], [2, 3], [5, 4]])
    manager.flux.settle("a", routes)
    found = {
        group
        for group, single in enumerate(manager.coordinator.single_type_managers)
        if "a" in single.sparse_requests
    }
    assert found == sparse


@pytest.mark.parametrize("enable_caching", [True, False])
def test_same_blocks_as_one_group_after_the_other(enable_caching):
    expected = _run(False, enable_caching=enable_caching)
    assert _run(True, enable_caching=enable_caching) == expected
    assert len(expected) > 250


def test_a_step_inside_a_block_asks_no_manager(monkeypatch):
    """What makes many groups cheap: nothing is looked at until the next block begins."""
    from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager

    manager = make_manager([False, True, True])
    run = Simulation(
        manager, [False, True, True], BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, True, 0, seed=0
    )
    run.chooser.random = lambda: 0.9  # neither ends nor evicts
    run.add(run._tokens(64), 60)
    calls = []
    for name in ("get_num_blocks_to_allocate", "allocate_new_blocks", "cache_blocks"):
        original = getattr(SingleTypeKVCacheManager, name)
        monkeypatch.setattr(
            SingleTypeKVCacheManager,
            name,
            lambda self, *args, _original=original, _name=name, **kwargs: (
                calls.append(_name),
                _original(self, *args, **kwargs),
            )[1],
        )
    by_step = []
    for _ in range(33):
        calls.clear()
        run.step()
        by_step.append(len(calls))
    # The prompt of four blocks, then a block for each sixteen tokens.
    assert [step for step, count in enumerate(by_step) if count] == [0, 1, 16, 17, 32]


def test_report_counts_freed_and_held_blocks():
    report = CountingReport()
    manager = make_manager([False, True, True], report=report)
    run = Simulation(
        manager, [False, True, True], BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, True, 0, seed=0
    )
    run.chooser.random = lambda: 0.9
    run.add(run._tokens(500), 20)
    while run.running or run.waiting:
        run.step()
    # The last step processed up to token 518 and freed by it: (518 - 128 - 50 + 1) // 16 = 21
    # blocks but for two of sinks, in two groups; 519 tokens are 33 blocks.
    assert report.freed_blocks == 2 * (21 - 2)
    assert report.held_blocks == [3 * 33 - 2 * (21 - 2)]


def test_admission_asks_for_what_a_prompt_holds_at_once():
    """A prompt that would not fit whole is taken where its SPARSE groups give back meanwhile."""
    prompt_blocks = -(-900 // BLOCK_SIZE)
    most = -(-(WINDOW_TOKENS - 1 + 128 + 2 * 96) // BLOCK_SIZE) + 1 + 2
    room = prompt_blocks + 2 * most
    assert room < 3 * prompt_blocks
    for num_blocks, fits in ((room + 1, True), (room, False)):
        run = Simulation(
            make_manager([False, True, True], num_blocks=num_blocks),
            [False, True, True],
            BLOCK_SIZE,
            SINK_TOKENS,
            WINDOW_TOKENS,
            True,
            0,
            seed=0,
        )
        run.add(run._tokens(900), 5)
        run.step()
        assert bool(run.running) == fits


def test_prompt_held_until_recomputed_after_preemption():
    """Patterns that read everything in prefill: a resumed request's own tokens are prefill too."""
    run = Simulation(
        make_manager([False, True], is_local=False),
        [False, True],
        BLOCK_SIZE,
        SINK_TOKENS,
        WINDOW_TOKENS,
        False,
        1,
        seed=0,
    )
    run.chooser.random = lambda: 0.9
    live = run.add(run._tokens(400), 200)
    while live.request.num_output_tokens < 90:
        run.step()
    manager = run.manager.coordinator.single_type_managers[1]
    blocks = manager.req_to_blocks[live.request.request_id]
    assert any(block.is_null for block in blocks)
    run.preempt(live)
    run.manager.reset_prefix_cache()
    while live.request.num_computed_tokens < 485:
        run.step()
        blocks = manager.req_to_blocks[live.request.request_id]
        assert not any(block.is_null for block in blocks)
    for _ in range(8):
        run.step()
    assert any(block.is_null for block in manager.req_to_blocks[live.request.request_id])


def _routed(num_blocks, report=None, **arguments):
    is_sparse = [None, None, None]
    manager = make_manager(is_sparse, num_blocks=num_blocks, report=report, **arguments)
    run = Simulation(manager, is_sparse, BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, True, 0, seed=0)
    run.chooser.random = lambda: 0.9
    return run


PROMPT_BLOCKS = -(-900 // BLOCK_SIZE)


@pytest.mark.parametrize(("missing", "fits"), [(0, True), (1, False)])
def test_a_request_without_routes_is_admitted_as_full(missing, fits):
    run = _routed(3 * PROMPT_BLOCKS + 1 - missing)
    live = run.add(run._tokens(900), 5)
    live.sparse = [True, True, False]
    run.step()
    assert bool(run.running) == fits


def test_a_preempted_request_is_admitted_by_its_routes():
    """What it holds at once is known then: two clusters give back meanwhile."""
    most = -(-(WINDOW_TOKENS - 1 + 128 + 2 * 96) // BLOCK_SIZE) + 1 + 2
    run = _routed(3 * PROMPT_BLOCKS + 1, enable_caching=False)
    live = run.add(run._tokens(900), 5)
    live.sparse = [True, True, False]
    run.step()
    run.preempt(live)
    pool = run.manager.block_pool
    for missing, fits in ((1, False), (0, True)):
        spare = pool.get_num_free_blocks() - (PROMPT_BLOCKS + 2 * most) + missing
        taken = pool.get_new_blocks(spare)
        run.check_blocks = lambda: None
        run.step()
        assert bool(run.running) == fits
        pool.free_blocks(taken)


def test_a_request_that_fits_thanks_to_others_is_counted():
    report = CountingReport()
    whole = 3 * -(-500 // BLOCK_SIZE)
    run = _routed(2 * whole, report=report)
    for expected in (0, 1):
        live = run.add(run._tokens(500), 50)
        live.sparse = [True, True, False]
        for _ in range(9):
            run.step()
        assert live in run.running
        assert report.admitted_requests == expected
    # Two clusters of each gave back; the third, FULL, holds all.
    assert report.freed_blocks == run.manager.flux._given_back > 0


def test_hits_without_their_middle_count_as_given_back():
    report = CountingReport()
    run = Simulation(
        make_manager([True, False], report=report),
        [True, False],
        BLOCK_SIZE,
        SINK_TOKENS,
        WINDOW_TOKENS,
        True,
        0,
        seed=0,
    )
    run.chooser.random = lambda: 0.9
    prompt = run._tokens(500)
    for _ in range(2):
        run.add(prompt, 2)
        while run.running or run.waiting:
            run.step()
    assert run.counts["null_hits"] == 1
    assert run.manager.flux._given_back == 0
    # 31 full blocks and one begun; the second finds 31 of them, less those between in one group.
    assert report.held_blocks[1] <= report.held_blocks[0] < 2 * 32


@pytest.mark.parametrize(
    ("counts", "num_blocks", "asked"), [(False, 400, 1), (True, 400, 2), (True, 20, 1)]
)
def test_admission_counts_whole_prompts_for_the_metric_alone(counts, num_blocks, asked):
    """A request that waits asks in every step, so what nobody reads is not counted."""
    run = _routed(num_blocks, report=CountingReport() if counts else None)
    flux = run.manager.flux
    needed, caps = flux._num_to_allocate, []

    def noted(**arguments):
        caps.append(arguments.get("apply_admission_cap", False))
        return needed(**arguments)

    live = run.add(run._tokens(900), 5)
    flux._num_to_allocate = noted
    flux.get_num_blocks_to_allocate(
        live.request.request_id,
        900,
        apply_admission_cap=True,
        prefill_end=900,
        new_computed_blocks=((), (), ()),
        num_encoder_tokens=0,
        total_computed_tokens=0,
        num_local_computed_tokens=0,
        num_tokens_main_model=900,
    )
    assert caps == [True, False][:asked]


def test_without_prefix_caching_nothing_is_cached():
    run = _routed(400, enable_caching=False)

    def cached(*arguments):
        raise AssertionError(f"asked to cache {arguments}")

    run.manager.flux._cache = cached
    run.add(run._tokens(100), 40)
    while run.running or run.waiting:
        run.step()


def test_nobody_asks_once_a_hit_is_looked_up():
    """Routes of the last one that asked serve no other lookup, whatever came of its own."""
    run = _routed(400)
    live = run.add(run._tokens(500), 60)
    live.sparse = [True, True, True]
    while live.request.num_output_tokens < 2:
        run.step()
    request, flux = live.request, run.manager.flux
    run.manager.evict_blocks({9})  # of the middle, which was given back
    hashes = request.block_hashes
    _, asked, _ = run.manager.get_computed_blocks(request)
    assert asked > 400
    assert flux.find_longest_cache_hit(hashes, 499)[1] < asked

    def fails(request):
        assert flux.find_longest_cache_hit(hashes, 499)[1] == asked
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flux.look_up(fails, request)
    assert flux.find_longest_cache_hit(hashes, 499)[1] < asked


def test_blocks_that_another_request_holds_are_not_given_back():
    report = CountingReport()
    manager = make_manager([True, True], is_local=False, report=report)
    run = Simulation(
        manager, [True, True], BLOCK_SIZE, SINK_TOKENS, WINDOW_TOKENS, False, 0, seed=0
    )
    run.chooser.random = lambda: 0.9
    prompt = run._tokens(400)
    run.add(prompt, 60)
    for _ in range(5):
        run.step()
    run.add(prompt, 60)  # hits what the first, whose prompt is complete, still holds

    def held():
        return {block.block_id for block in manager.block_pool.blocks[1:] if block.ref_cnt}

    given_back = 0
    for _ in range(35):
        before = held()
        run.step()
        given_back += len(before - held())
    assert (len(run.running), run.counts["hits"]) == (2, 1)
    assert report.freed_blocks == manager.flux._given_back == given_back > 0
