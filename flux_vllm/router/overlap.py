"""Where the end of a prompt stands in the prompt a second time.

A question whose words occur in the far part of the prompt, and not in the window that SPARSE layers
see, needs what they do not see. A probe of the prompt's two ends cannot know that; token ids can.

Dimension legend: N tokens of a prompt.
"""

from collections.abc import Sequence
from typing import Final

import numpy as np

GRAMS: Final = (1, 3)
"""Tokens in a row that are compared."""
ENDS: Final = (128, 32)
"""Latest tokens whose grams are looked up, the longest first."""
WIDTH: Final = 2 * len(GRAMS) * len(ENDS)
_FACTOR: Final = np.int64(-7046029254386353131)
"""Odd; products wrap around, and grams of three tokens in effect never share a number."""


def overlap(token_ids: Sequence[int] | np.ndarray, near_tokens: int) -> np.ndarray:
    """Return what share of the grams at a prompt's end occurs earlier, by where.

    Args:
        token_ids: [N] of the whole prompt.
        near_tokens: latest tokens that count as near; those before them are far.

    Returns: [WIDTH] float32, for each gram and end in turn: the share of its distinct grams that
        occur far, and of those that do but do not occur near, before the end.
    """
    ids = np.asarray(token_ids, dtype=np.int64)
    split = max(0, len(ids) - near_tokens)
    is_asked = np.zeros(int(ids.max()) + 1, dtype=bool)
    is_asked[ids[-ENDS[0] :]] = True
    may_occur = is_asked[
        ids
    ]  # all else is passed over at once, or long prompts would take four times as long
    shares = []
    for gram in GRAMS:
        starts, numbers = _grams(ids, may_occur, gram)
        far = numbers[starts <= split - gram]
        for end in ENDS:
            start = max(split, len(ids) - end)
            asked = np.unique(numbers[starts >= start])
            far = asked[_occur(asked, far)]  # a shorter end's are among a longer one's
            is_near = _occur(far, numbers[(starts >= split) & (starts <= start - gram)])
            shares += [len(far) / max(len(asked), 1), (~is_near).sum() / max(len(asked), 1)]
    return np.array(shares, dtype=np.float32)


def _grams(ids: np.ndarray, may_occur: np.ndarray, gram: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the grams of which every token may occur.

    Returns: where they start, ascending, and a number for each: equal grams have equal ones.
    """
    count = max(0, len(ids) - gram + 1)
    whole = may_occur[:count].copy()
    for place in range(1, gram):
        whole &= may_occur[place : place + count]
    starts = np.flatnonzero(whole)
    numbers = ids[starts]
    for place in range(1, gram):
        numbers = numbers * _FACTOR + ids[starts + place]
    return starts, numbers


def _occur(asked: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Say which of some distinct ascending numbers are among others."""
    found = np.zeros(len(asked), dtype=bool)
    if len(asked):
        places = np.searchsorted(asked, numbers).clip(max=len(asked) - 1)
        found[places[asked[places] == numbers]] = True
    return found
