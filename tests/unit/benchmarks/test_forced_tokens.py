"""Forced tokens under both of vLLM's interfaces; oracle: the argmax that is left."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("vllm")

from vllm.sampling_params import SamplingParams

from benchmarks.forced_tokens import ForcedTokensV1, ForcedTokensV2, forced_tokens

pytestmark = pytest.mark.vllm


def _params(tokens: object = None) -> SamplingParams:
    return SamplingParams(extra_args=None if tokens is None else {"forced_tokens": tokens})


@pytest.mark.parametrize("tokens", ["12", [1.5], [-1], ["1"]])
@pytest.mark.parametrize("processor", [ForcedTokensV1, ForcedTokensV2])
def test_other_than_token_ids_is_refused(processor, tokens) -> None:
    with pytest.raises(ValueError, match=r"expected vllm_xargs\.forced_tokens to be a list"):
        processor.validate_params(_params(tokens))


def test_requests_that_force_nothing() -> None:
    assert forced_tokens(_params()) == []
    assert forced_tokens(SamplingParams(extra_args={"other": 1})) == []
    assert ForcedTokensV1(None, torch.device("cpu"), False).new_req_logits_processor(_params()) is (
        None
    )


def test_first_runner_forces_by_the_number_of_output_tokens() -> None:
    processor = ForcedTokensV1(None, torch.device("cpu"), False)
    assert not processor.is_argmax_invariant()
    force_next = processor.new_req_logits_processor(_params([3, 5]))
    free = torch.tensor([0.0, 4.0, 1.0, 2.0, 3.0, -1.0])
    output: list[int] = []
    for expected in (3, 5, 1):
        assert int(force_next(output, free.clone()).argmax()) == expected
        output.append(-1)  # a placeholder of asynchronous scheduling


def test_second_runner_forces_by_length_and_slot() -> None:
    """Rows in another order than slots; a chunk, a first, a second, a free and a foreign row."""
    prompt_len = np.array([100, 10, 20, 30, 40], dtype=np.int32)
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=prompt_len))
    processor = ForcedTokensV2(None, states)
    for slot in range(4):
        assert processor.add_request(slot, _params([slot, slot + 1]))
    assert not processor.add_request(4, _params())
    slots = [3, 0, 1, 4, 2]
    visible = {0: 64, 1: 10, 2: 21, 3: 32, 4: 40}
    free = torch.full((5, 8), -1.0)
    free[:, 7] = 2.0
    ctx = SimpleNamespace(
        idx_mapping_np=np.array(slots, dtype=np.int32),
        # Padded, as for a decode graph.
        seq_lens_upper_bound_np=np.array([visible[slot] for slot in slots] + [0] * 3, np.int32),
    )
    logits = processor.apply(free.clone(), ctx)
    chosen = dict(zip(slots, logits.argmax(dim=-1).tolist(), strict=True))
    assert chosen == {0: 7, 1: 1, 2: 3, 3: 7, 4: 7}
    for row in (0, 1, 3):
        torch.testing.assert_close(logits[row], free[row], rtol=0, atol=0)


def test_second_runner_forgets_a_slots_last_request() -> None:
    states = SimpleNamespace(prompt_len=SimpleNamespace(np=np.array([4], dtype=np.int32)))
    processor = ForcedTokensV2(None, states)
    processor.add_request(0, _params([1]))
    processor.add_request(0, _params())
    ctx = SimpleNamespace(idx_mapping_np=np.array([0]), seq_lens_upper_bound_np=np.array([4]))
    assert int(processor.apply(torch.tensor([[0.0, 1.0, 2.0]]), ctx).argmax()) == 2
