"""Kinds on the end of long material of entries: go on with it, write its last entry otherwise."""

from training.prompts.kinds.dated import transcript_turns
from training.prompts.kinds.drawing import Draw, Kind, Made, finish
from training.prompts.kinds.entries import Ask, asked_last
from training.prompts.kinds.program_files import log_lines, settings_sections
from training.prompts.kinds.records import catalogue_records, payment_list
from training.prompts.wordings_file import choose

_MATERIAL = (
    lambda draw: log_lines(draw)[1],
    lambda draw: settings_sections(draw)[1],
    lambda draw: catalogue_records(draw)[1],
    lambda draw: payment_list(draw)[1],
    lambda draw: transcript_turns(draw)[1],
)


def next_entry(draw: Draw) -> Made | None:
    """A log, records, payments or the like that stop: what comes next."""
    written = draw.rng.choice(_MATERIAL)(draw)
    shown, after = "\n".join(written[:-1]) + "\n", written[-1]
    if draw.rng.random() < 0.5:
        return Made(prompt=shown, reference=after, max_new_tokens=96)
    wording = choose(draw.rng, "next_entry", draw.language)
    pieces = [wording.lead, shown.rstrip("\n"), wording.ask]
    return finish(draw, "\n\n".join(filter(None, pieces)), reference=after, max_new_tokens=96)


def convert_entry(draw: Draw) -> Made | None:
    """A log, records, payments or the like, then one entry of them to write in another form."""
    written = draw.rng.choice(_MATERIAL)(draw)
    ask = Ask(wording="convert_entry", fields={"piece": written[-1]}, max_new_tokens=160)
    return asked_last(draw, "\n".join(written[:-1]), ask)


KINDS = [
    Kind(name="next_entry", weight=3, local=True, make=next_entry),
    Kind(name="convert_entry", weight=3, local=True, make=convert_entry),
]
