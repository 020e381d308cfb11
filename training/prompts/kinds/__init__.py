"""Kinds of prompts: what people ask for, about prose, code and structured material."""

from training.prompts.kinds import (
    changes,
    code,
    composing,
    dated,
    entries_on,
    far,
    local,
    numbered,
    program_files,
    programs,
    reading,
    records,
    reference_works,
    shots,
    sums,
    tables,
    turns,
)
from training.prompts.kinds.drawing import Kind

_PROSE = (reading, numbered, composing, turns)
_STRUCTURED = (program_files, records, dated, reference_works, programs, changes, entries_on)
_MODULES = (far, shots, sums, code, local, tables, *_PROSE, *_STRUCTURED)
KINDS: list[Kind] = [kind for module in _MODULES for kind in module.KINDS]
