"""The independent reference: a server's steps replayed in plain transformers and float32.

A server computes a request in steps, and a step reads keys that earlier steps wrote, perhaps under
other routes or for another request. `Request` keeps that history, so a test can replay what a
server did, step by step: chunked prefill, prefix-cache hits (`history.first(n)` of another
request), second turns (the same), preemption and resume. `ReferenceModel.run` is the short form.

Nothing here or in the modules it stands on (`reference_steps`, `reference_attention`,
`reference_router`, `oracle`) comes from `flux_vllm`: all is written from the definitions of
DESIGN.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from tests.helpers.reference_attention import Phase, SparsePattern, masked_attention
from tests.helpers.reference_router import FULL, SPARSE, ReferenceRouter
from tests.helpers.reference_steps import History, StepModel, StepRecord

__all__ = [
    "FULL",
    "SPARSE",
    "History",
    "ReferenceModel",
    "ReferenceRouter",
    "Request",
    "SparsePattern",
    "StepRecord",
    "masked_attention",
]

_LOGIT_SLICE = 256  # positions per vocabulary product


class ReferenceModel(StepModel):
    """A model that computes whole requests; a single step is `StepModel.step`."""

    def run(
        self,
        prompt: Sequence[int],
        chunks: Sequence[int] | None = None,
        *,
        pattern: SparsePattern,
        routes: Sequence[int] | None = None,
        router: ReferenceRouter | None = None,
        num_decode: int = 0,
        threshold: float = 0.5,
        history: History | None = None,
        forced_tokens: Sequence[int] | None = None,
        score_prompt: bool = True,
        keep_prompt_table: bool = False,
    ) -> "Request":
        """Compute one request as an undisturbed server would: prefill in chunks, then decode.

        Args:
            prompt: token ids.
            chunks: lengths of the prefill steps, in all what `history` leaves of the prompt; None
                is one chunk.
            pattern: what SPARSE means.
            routes: per layer, for all steps; None lets the router decide.
            router: decides by the prompt alone, once.
            num_decode: output tokens. The first comes with the prompt's last chunk, and the last is
                never computed: the history ends one token before it.
            threshold: FULL where P(FULL) is at least this.
            history: of the first tokens of the prompt, in a prefix-cache hit or a second turn.
            forced_tokens: what to "sample" instead of the likeliest tokens.
            score_prompt: False skips the prompt's log-probabilities.
            keep_prompt_table: keep them for the whole vocabulary.
        Returns: Request: finished; more steps may still be asked of it.
        """
        request = Request(
            self,
            prompt,
            pattern,
            routes=routes,
            router=router,
            threshold=threshold,
            history=history,
            forced_tokens=forced_tokens,
            score_prompt=score_prompt,
            keep_prompt_table=keep_prompt_table,
        )
        left = len(request.prompt) - len(request.history)
        chunks = [left] if chunks is None else list(chunks)
        if sum(chunks) != left:
            raise ValueError(f"chunks: expected lengths that sum to {left}, got {chunks}")
        for length in chunks:
            request.step(length)
        while len(request.output_tokens) < num_decode:
            request.step(1)
        return request


@dataclass
class Request:
    """One request on a simulated server, computed by the steps it is told.

    Attributes:
        model: what computes.
        prompt: token ids.
        pattern, router, threshold: as for `ReferenceModel.run`.
        routes: per layer, for all steps in which they matter; given, or the router's.
        history: the tokens computed so far.
        forced_tokens, score_prompt, keep_prompt_table: as for `ReferenceModel.run`.
        output_tokens: sampled by each step that reached the last known token.
        output_logprobs: for each of them the [V] log-probabilities it was taken from.
        prompt_logprobs: [prompt] of each prompt token given those before it; NaN for the first and
            where the predecessor was not computed here.
        prompt_table: [prompt, V] the same for the whole vocabulary, if kept.
        steps: what was done.
        p_full: [layers] the router's P(FULL); None without one.
        prompt_done: whether the prompt was once complete.
    """

    model: ReferenceModel
    prompt: Sequence[int]
    pattern: SparsePattern
    routes: Sequence[int] | None = None
    router: ReferenceRouter | None = None
    threshold: float = 0.5
    history: History | None = None
    forced_tokens: Sequence[int] | None = None
    score_prompt: bool = True
    keep_prompt_table: bool = False
    output_tokens: list[int] = field(default_factory=list, init=False)
    output_logprobs: list[torch.Tensor] = field(default_factory=list, init=False)
    prompt_logprobs: torch.Tensor = field(init=False)
    prompt_table: torch.Tensor | None = field(default=None, init=False)
    steps: list[StepRecord] = field(default_factory=list, init=False)
    p_full: torch.Tensor | None = field(default=None, init=False)
    prompt_done: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.prompt = list(self.prompt)
        self.history = self.history or self.model.empty_history()
        known = len(self.history)
        if known >= len(self.prompt) or self.history.tokens != self.prompt[:known]:
            raise ValueError("history: expected the first tokens of the prompt, fewer than all")
        if self.routes is None and self.router is None:
            raise ValueError("routes, router: expected at least one of them")
        if self.router is not None:
            self.p_full = self.router.p_full(self.model, self.prompt)
            if self.routes is None:
                self.routes = (self.p_full >= self.threshold).int().tolist()
        self.prompt_logprobs = torch.full((len(self.prompt),), float("nan"))
        if self.keep_prompt_table:
            self.prompt_table = torch.full((len(self.prompt), self.model.vocab_size), float("nan"))

    @property
    def tokens(self) -> list[int]:
        """The prompt and what was sampled."""
        return [*self.prompt, *self.output_tokens]

    @property
    def greedy_tokens(self) -> list[int]:
        """The likeliest token wherever one was sampled, forced or not."""
        return [int(row.argmax()) for row in self.output_logprobs]

    @property
    def margins(self) -> torch.Tensor:
        """Give of each computed position `StepRecord.margins`, as computed last."""
        margins = torch.full((len(self.history),), float("inf"))
        for record in self.steps:
            margins[record.start : record.start + record.length] = record.margins
        return margins

    def step(
        self,
        length: int,
        phase: Phase | None = None,
        drafts: Sequence[int] = (),
    ) -> StepRecord:
        """Compute the next `length` tokens; sample one if none is left, and one a draft.

        Args:
            length: tokens, the drafts included.
            phase: default "prefill" for a step that starts inside the prompt, else "decode". A
                server that calls recomputed output tokens prefill needs it said.
            drafts: what the server took for the tokens after the last known one, and accepted.
        Returns: StepRecord: what was done.
        """
        start = len(self.history)
        known, prompt_len = [*self.tokens, *drafts], len(self.prompt)
        end = start + length
        if not start + len(drafts) < end <= len(known):
            expected = f"{1 + len(drafts)} to {len(known) - start}"
            raise ValueError(f"length: expected {expected}, got {length}")
        phase = phase or ("prefill" if start < prompt_len else "decode")
        routes = self.routes_at(end)
        if phase == "decode" and end <= prompt_len + self.pattern.full_decode_tokens:
            routes = [FULL] * self.model.num_layers
        elif phase == "prefill" and self.pattern.sparse_prefill:
            routes = [SPARSE] * self.model.num_layers
        hidden, self.history, record = self.model.step(
            self.history,
            known[start:end],
            phase=phase,
            pattern=self.pattern,
            prompt_len=prompt_len,
            routes=routes,
        )
        self.steps.append(record)
        if self.score_prompt and not self.prompt_done:
            self._score_prompt(hidden, start)
        self.prompt_done |= end >= prompt_len
        if end == len(known):
            for row in hidden[-1 - len(drafts) :]:
                self._sample(row[None])
        return record

    def routes_at(self, end: int) -> Sequence[int]:
        """Give the routes of a step that ends at a position: FULL until a router must decide."""
        early = self.router is not None and max(len(self.prompt), end) <= self.router.reach
        return [FULL] * self.model.num_layers if early else self.routes

    def preempt(self, keep: int = 0, source: History | None = None) -> None:
        """Throw the history away, but for `keep` tokens that a prefix cache still has.

        Args:
            keep: tokens.
            source: whose keys the cache has; default this request's own.
        """
        kept = (self.history if source is None else source).first(keep)
        if kept.tokens != self.tokens[:keep]:
            raise ValueError("source: expected the history of this request's first tokens")
        self.history = kept

    def replay(self, steps: Sequence[tuple]) -> "Request":
        """Compute steps as a server logged them; a step that goes back is a preemption.

        Args:
            steps: of each the start, the length and, where not the default of `step`, the phase.
        """
        for start, *arguments in steps:
            if start != len(self.history):
                self.preempt(start)
            self.step(*arguments)
        return self

    def _score_prompt(self, hidden: torch.Tensor, start: int) -> None:
        """Fill in the prompt tokens that the hidden states [q, hidden] from `start` on predict."""
        count = min(len(hidden), len(self.prompt) - 1 - start)
        for low in range(0, count, _LOGIT_SLICE):
            high = min(low + _LOGIT_SLICE, count)
            table = self.model.logprobs(hidden[low:high])
            rows = slice(start + low + 1, start + high + 1)
            targets = torch.tensor(self.prompt[rows])
            self.prompt_logprobs[rows] = table.gather(1, targets[:, None])[:, 0]
            if self.prompt_table is not None:
                self.prompt_table[rows] = table

    def _sample(self, hidden: torch.Tensor) -> None:
        """Take the next token, the likeliest or the forced one, after hidden state [1, hidden]."""
        table = self.model.logprobs(hidden)[0]
        index = len(self.output_tokens)
        forced = self.forced_tokens is not None and index < len(self.forced_tokens)
        self.output_tokens.append(self.forced_tokens[index] if forced else int(table.argmax()))
        self.output_logprobs.append(table)
