"""Scores kept on disk: an interrupted evaluation goes on, and routers share static baselines."""

import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

from training.data.encoding import Encoded
from training.evaluation.scoring import Scorer, Scores
from training.policies import Policy, StaticPolicy, ThresholdPolicy

_PIECE = 100
"""Prompts scored between two writes. A hundred prompts a task and length fill whole pieces, so that
an evaluation of more of them begins with those."""

_MARK = ".begun"
"""Ends the name of an empty file that stands for a piece while it is computed."""
_FIRST_PATIENCE_S = 60.0

_NAMES = [field.name for field in fields(Scores)]


class StoredScorer:
    """A scorer that looks results up before it computes them.

    Args:
        scorer: computes what is missing.
        folder: for the results; may be shared by evaluations of several routers, also at once.
        setting: what else scores depend on: model, dtype.
    """

    def __init__(self, scorer: Scorer, folder: Path, setting: dict[str, Any]) -> None:
        self.scorer = scorer
        self.routed = scorer.routed
        self.folder = folder
        self.setting = setting | {"pattern": {"name": scorer.pattern.name} | asdict(scorer.pattern)}
        # How old a mark of another evaluation's may be before its piece is computed here: twice
        # what the longest one took here.
        self.patience_s = _FIRST_PATIENCE_S
        self._longest_s = 0.0
        folder.mkdir(parents=True, exist_ok=True)

    def score(self, prompts: Sequence[Encoded], policy: Policy) -> Scores:
        """Score a policy as `Scorer.score` does, piece by piece.

        Raises: TypeError: a policy that has no known identity.
        """
        pieces = []
        for piece in _pieces(len(prompts)):
            key = self._key(prompts[piece], policy)
            pieces.append((self.folder / f"{key}.npz", prompts[piece]))
        if self.scorer.world.size == 1:
            # Evaluations side by side take different pieces first.
            for path, chosen in pieces:
                if not path.exists() and _claim(path):
                    self._compute(path, chosen, policy)
        parts = [
            _read(path) if self._is_there(path) else self._compute(path, chosen, policy)
            for path, chosen in pieces
        ]
        return Scores(*(np.concatenate([getattr(part, name) for part in parts]) for name in _NAMES))

    def _is_there(self, path: Path) -> bool:
        """Say whether a piece is stored, waiting while another evaluation may be computing it."""
        if self.scorer.world.size > 1:
            return bool(self.scorer.world.gather(path.exists())[0])  # all do as the first sees it
        while not path.exists() and _age(path) < self.patience_s:
            time.sleep(0.05)
        return path.exists()

    def _compute(self, path: Path, prompts: Sequence[Encoded], policy: Policy) -> Scores:
        if self.scorer.world.size == 1:
            path.with_suffix(_MARK).touch()  # whoever waits for another's waits for this one
        began = time.monotonic()
        scores = self.scorer.score(prompts, policy)
        self._longest_s = max(self._longest_s, time.monotonic() - began)
        self.patience_s = 2 * self._longest_s
        if self.scorer.world.is_main:
            _write(path, scores)
        # No process may look for a later piece before this one is there for all.
        self.scorer.world.wait()
        return scores

    def _key(self, prompts: Sequence[Encoded], policy: Policy) -> str:
        digest = hashlib.sha256(json.dumps(self.setting, sort_keys=True).encode())
        for prompt in prompts:
            lengths = (len(prompt), prompt.prompt_len, prompt.prefix_len, prompt.shared_len)
            digest.update(f"{prompt.task} {lengths}".encode())
            digest.update(prompt.token_ids.tobytes())
        digest.update(_identity(policy))
        # Routes given beforehand do not depend on it: routers that look elsewhere share them.
        if not isinstance(policy, StaticPolicy):
            digest.update(repr(self.scorer.inputs).encode())
        return digest.hexdigest()[:32]


def _identity(policy: Policy) -> bytes:
    """Return what a policy decides by."""
    if isinstance(policy, StaticPolicy):
        return repr(policy.routes).encode()
    if isinstance(policy, ThresholdPolicy):
        weights = policy.router.state_dict()
        parts = [weights[name].float().cpu().numpy().tobytes() for name in sorted(weights)]
        return b"".join([repr(policy.threshold).encode(), *parts])
    raise TypeError(
        f"expected a StaticPolicy or a ThresholdPolicy, found {type(policy).__name__}; score it "
        "with the Scorer itself"
    )


def _pieces(count: int) -> Iterator[slice]:
    for start in range(0, count, _PIECE):
        yield slice(start, start + _PIECE)


def _claim(path: Path) -> bool:
    """Say whether no other evaluation has begun a piece."""
    # One that was cut leaves its mark; the piece is then computed by whoever misses it in the end.
    mark = path.with_suffix(_MARK)
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return False
    if path.exists():  # ended since it was looked for
        mark.unlink(missing_ok=True)
        return False
    return True


def _age(path: Path) -> float:
    """Return the seconds since an evaluation began a piece; infinite where none has."""
    try:
        return time.time() - path.with_suffix(_MARK).stat().st_mtime
    except FileNotFoundError:
        return float("inf")


def _write(path: Path, scores: Scores) -> None:
    """Write in one atomic step: a cut leaves no half file, nor do two evaluations at once."""
    temporary = path.with_suffix(f".{os.getpid()}.writing")
    with temporary.open("wb") as file:
        np.savez_compressed(file, **{name: getattr(scores, name) for name in _NAMES})
    temporary.replace(path)
    path.with_suffix(_MARK).unlink(missing_ok=True)


def _read(path: Path) -> Scores:
    with np.load(path) as stored:
        return Scores(*(stored[name] for name in _NAMES))
