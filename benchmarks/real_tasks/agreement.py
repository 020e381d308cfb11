"""Agreement with full attention's own greedy answers: less noisy than scores.

The teacher is what vLLM's own backend answered, with its 20 likeliest tokens of every position.
Another engine decodes the same tokens by force, after it has settled its routes from the prompt
alone and prefilled under them, and gives its own likeliest tokens. By position:

- equal: both put the same token first (bfloat16 logits tie; a shared one suffices);
- the KL divergence of the two distributions, coarsened to the tokens that both name and one class
  for all others: never more than that of the whole distributions, close to it where the named ones
  hold nearly all.

Dimension legend: N positions of all answers, C candidates of a position, P prompts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.real_tasks.engine import MOST_LOGPROBS, Answer, TopLogprobs

_LEAST_REST = 1e-6
"""Of the class of all other tokens: probabilities are sums of rounded ones."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """Of one answer's positions."""

    tokens: int
    equal_tokens: float
    """Share of positions at which both put the same token first."""
    same_prefix: float
    """Share of the answer before the first position that differs; greedy decoding would part
    there."""
    kl: float
    """Mean, nats a token, of the other engine's distribution from the teacher's."""


def compare(teacher: Sequence[TopLogprobs], other: Sequence[TopLogprobs]) -> Agreement:
    """Compare one answer's positions.

    Raises: ValueError: of different length.
    """
    if len(teacher) != len(other) or not teacher:
        raise ValueError(
            f"expected the candidates of {len(teacher)} positions, and of at least one, found "
            f"{len(other)}"
        )
    equal = np.array(
        [bool(_first(one) & _first(two)) for one, two in zip(teacher, other, strict=True)]
    )
    differ = np.flatnonzero(~equal)
    same = int(differ[0]) if len(differ) else len(equal)
    kl = [divergence(one, two) for one, two in zip(teacher, other, strict=True)]
    return Agreement(
        tokens=len(equal),
        equal_tokens=float(equal.mean()),
        same_prefix=same / len(equal),
        kl=float(np.mean(kl)),
    )


def _first(top: TopLogprobs) -> set[int]:
    most = max(top.values())
    return {token for token, value in top.items() if value == most}


def divergence(teacher: TopLogprobs, other: TopLogprobs) -> float:
    """Return KL(teacher || other) of one position in nats, coarsened as above.

    Raises: ValueError: both name no token in common, not even the one that was decoded.
    """
    shared = sorted(teacher.keys() & other.keys())
    if not shared:
        raise ValueError(
            f"expected candidates that hold the decoded token, found {sorted(teacher)} and "
            f"{sorted(other)} without one in common"
        )
    ours = np.exp([teacher[token] for token in shared])
    theirs = np.exp([other[token] for token in shared])
    ours, theirs = _with_rest(ours), _with_rest(theirs)
    return max(0.0, float((ours * np.log(ours / theirs)).sum()))


def _with_rest(named: np.ndarray) -> np.ndarray:
    """Add the class of all other tokens, and make probabilities sum to one."""
    whole = np.append(named, max(_LEAST_REST, 1 - named.sum()))
    normalized: np.ndarray = whole / whole.sum()
    return normalized


@dataclass(frozen=True, slots=True)
class Teacher:
    """Full attention's answers to one family of tasks, in a file that other engines read."""

    digest: str
    """Of the prompts."""
    answers: list[list[int]]
    """Token ids, by prompt."""
    top_logprobs: list[list[TopLogprobs]]

    @classmethod
    def of(cls, digest: str, answers: Sequence[Answer]) -> "Teacher":
        """Make a teacher of what an engine answered with log-probabilities."""
        return cls(
            digest,
            [answer.token_ids for answer in answers],
            [answer.top_logprobs for answer in answers],
        )

    def write(self, path: Path) -> None:
        """Write it so that a file of this name is always complete."""
        lengths = [len(answer) for answer in self.answers]
        ids = np.full((sum(lengths), MOST_LOGPROBS + 1), -1, dtype=np.int32)
        logprobs = np.zeros(ids.shape, dtype=np.float32)
        positions = (top for answer in self.top_logprobs for top in answer)
        for row, top in enumerate(positions):
            ids[row, : len(top)] = list(top)
            logprobs[row, : len(top)] = list(top.values())
        path.parent.mkdir(parents=True, exist_ok=True)
        begun = path.with_suffix(".begun.npz")
        np.savez_compressed(
            begun,
            about=json.dumps({"digest": self.digest}),
            lengths=np.array(lengths, dtype=np.int64),
            tokens=np.array([token for answer in self.answers for token in answer], np.int32),
            ids=ids,
            logprobs=logprobs,
        )
        begun.replace(path)

    @classmethod
    def read(cls, path: Path, digest: str) -> "Teacher":
        """Read what `write` wrote.

        Raises: ValueError: it answered other prompts.
        """
        with np.load(path) as file:
            found = json.loads(str(file["about"]))["digest"]
            if found != digest:
                raise ValueError(
                    f"{path}: expected answers to the prompts of digest {digest}, found {found}; "
                    "answer again with vLLM's own backend, into an empty folder"
                )
            ends = np.cumsum(file["lengths"]).tolist()
            tokens, ids, logprobs = file["tokens"], file["ids"], file["logprobs"]
        begins = [0, *ends[:-1]]
        tops = [
            {
                int(token): float(value)
                for token, value in zip(names, values, strict=True)
                if token >= 0
            }
            for names, values in zip(ids, logprobs, strict=True)
        ]
        parts = list(zip(begins, ends, strict=True))
        return cls(
            digest,
            [tokens[begin:end].tolist() for begin, end in parts],
            [tops[begin:end] for begin, end in parts],
        )
