"""Make a server decode given tokens first (`vllm serve --logits-processors`), then go on freely.

A request names them in `vllm_xargs`: `{"forced_tokens": [ids]}`. The log-probabilities that it
asks for stay those of the model's own logits, so that forced tokens can be scored as well.

vLLM has an interface for each of its model runners, and a server takes classes of its own runner's
only. Requests are not to use speculative decoding: a row of logits is a request.
"""

from typing import TYPE_CHECKING, Any

import torch
from vllm.sampling_params import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor
from vllm.v1.worker.gpu.sample.logits_processor import (
    LogitsContext,
    LogitsProcessor,
    LogitsProcRequestState,
)

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def forced_tokens(params: SamplingParams) -> list[int]:
    """Return a request's forced tokens; none where it does not name any.

    Raises: ValueError: something else than a list of token ids.
    """
    tokens = (params.extra_args or {}).get("forced_tokens", [])
    if not isinstance(tokens, list) or not all(
        isinstance(token, int) and token >= 0 for token in tokens
    ):
        raise ValueError(
            f"expected vllm_xargs.forced_tokens to be a list of token ids, found {tokens!r}; "
            "correct the request"
        )
    return tokens


def force(logits: torch.Tensor, token: int) -> None:
    """Leave one token possible, in place.

    Args:
        logits: [vocabulary] float32.
        token: its id.
    """
    logits.fill_(float("-inf"))
    logits[token] = 0.0


class ForcedTokensV1(AdapterLogitsProcessor):
    """Of vLLM's first model runner: CPUs, and GPUs with VLLM_USE_V2_MODEL_RUNNER=0."""

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse wrong requests when they come in."""
        forced_tokens(sampling_params)

    def is_argmax_invariant(self) -> bool:
        """Greedy decoding changes."""
        return False

    def new_req_logits_processor(self, params: SamplingParams) -> Any:
        """Return what forces the request's next token; None where it names none."""
        tokens = forced_tokens(params)
        if not tokens:
            return None

        def force_next(output: list[int], logits: torch.Tensor) -> torch.Tensor:
            # With asynchronous scheduling the latest entries of `output` may be placeholders:
            # their number is right.
            if len(output) < len(tokens):
                force(logits, tokens[len(output)])
            return logits

        return force_next


class ForcedTokensV2(LogitsProcessor):
    """Of vLLM's second model runner, the default on GPUs."""

    def __init__(self, vllm_config: "VllmConfig", req_states: LogitsProcRequestState) -> None:
        super().__init__(vllm_config, req_states)
        self._prompt_len = req_states.prompt_len
        self._forced: dict[int, list[int]] = {}

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        """Refuse wrong requests when they come in."""
        forced_tokens(sampling_params)

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        """Keep the tokens of the request in this slot."""
        self._forced[req_idx] = forced_tokens(sampling_params)
        return bool(self._forced[req_idx])

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        """Force rows whose next token is given.

        All is known on the host, where lengths are exact without speculative decoding, so nothing
        waits for the device. A chunk that does not complete its prompt has a negative step; what
        is sampled there is thrown away.
        """
        for row, slot in enumerate(ctx.idx_mapping_np.tolist()):
            tokens = self._forced.get(slot, [])
            step = int(ctx.seq_lens_upper_bound_np[row]) - int(self._prompt_len.np[slot])
            if 0 <= step < len(tokens):
                force(logits[row], tokens[step])
        return logits
