"""Blocks that an answer's first tokens read: held until they are computed, whole for a hit.

Oracle: positions counted one by one, and `simulation.py`, which checks every query's keys and which
blocks are held.
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


def _note_freeing(run):
    """Returns: by call, tokens processed, and whether the first request lacks a block then."""
    coordinator, notes = run.manager.coordinator, []
    remove = coordinator.remove_skipped_blocks
    managers = coordinator.single_type_managers

    def noted(request_id, processed, **arguments):
        remove(request_id, processed, **arguments)
        blocks = [block for m in managers for block in m.req_to_blocks.get(request_id, ())]
        notes.append((processed, any(block.is_null for block in blocks)))

    coordinator.remove_skipped_blocks = noted
    return notes


def _answering(is_local, lag, outputs, window_tokens=WINDOW_TOKENS, report=None):
    """One prompt of 400 tokens, of whose answer 40 tokens read everything."""
    is_sparse = [False, True, True]
    sizes = {"window_tokens": window_tokens, "is_local": is_local, "full_decode_tokens": 40}
    manager = make_manager(is_sparse, report=report, **sizes)
    run = Simulation(manager, is_sparse, BLOCK_SIZE, SINK_TOKENS, lag=lag, seed=0, **sizes)
    run.chooser.random = lambda: 0.9
    return run, run.add(run._tokens(400), outputs)


@pytest.mark.parametrize("lag", [0, 1], ids=["sync", "async"])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
@pytest.mark.parametrize("outputs", [41, 42, 43, 60])
def test_held_until_an_answers_first_tokens_are_computed(is_local, lag, outputs):
    report = CountingReport()
    run, _ = _answering(is_local, lag, outputs, report=report)
    notes = _note_freeing(run)
    while run.running or run.waiting:
        run.step()
    assert notes == [(processed, processed >= 440) for processed, _ in notes]
    # The token sampled last is never computed; a step in flight is not processed.
    last = 400 + outputs - 2 - lag
    assert notes[-1][0] == last
    freed = max((last - 128 - WINDOW_TOKENS + 1) // BLOCK_SIZE - 2, 0) if last >= 440 else 0
    assert report.freed_blocks == 2 * freed
    assert report.held_blocks == [3 * -(-(399 + outputs) // BLOCK_SIZE) - 2 * freed]


@pytest.mark.parametrize("is_cached", [True, False])
@pytest.mark.parametrize("answered", [20, 85])
@pytest.mark.parametrize("is_local", [True, False], ids=["streaming", "triangle"])
def test_a_preempted_answer_is_whole_again(is_local, answered, is_cached):
    """By position, whether it had given back or not; recomputed text reads as prefill does."""
    # A window of 40, so that no block becomes free between the hit and the end of what is lacking.
    run, live = _answering(is_local, 0, 150, window_tokens=40)
    while live.request.num_output_tokens < answered:
        run.step()
    run.preempt(live)
    if not is_cached:
        run.manager.reset_prefix_cache()
    notes = _note_freeing(run)
    while run.running or run.waiting:
        run.step()
    # Nothing took its blocks: it hits all full ones that it had, whatever it gave back.
    hit = (400 + answered - 1) // BLOCK_SIZE * BLOCK_SIZE if is_cached else 0
    assert bool(run.counts["hits"]) == is_cached
    (start, lacks), *later = notes
    assert (start, lacks) == (hit, False)
    bound = 440 if is_local else max(440, 400 + answered)
    assert later == [(processed, processed >= bound) for processed, _ in later]
    assert later[-1][1]
