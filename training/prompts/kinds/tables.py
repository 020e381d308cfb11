"""Kinds on tables of records made up from real names: look up a cell, compare, add."""

import random

from training.prompts.kinds.drawing import Draw, Kind, Made, finish, lay_out
from training.prompts.wordings_file import phrases


def table(draw: Draw) -> Made | None:
    """A long table, and a question about one of its cells or columns."""
    rng, library = draw.rng, draw.library
    columns = rng.sample(phrases("columns", draw.language), rng.randint(3, 6))
    rows: dict[str, list[int]] = {}
    wanted = min(draw.tokens, 16000) // (5 + 6 * len(columns))
    for _ in range(20 * wanted + 200):
        if len(rows) >= max(8, wanted):
            break
        title = library.texts[library.draw_index(rng, draw.language)].title
        name = " ".join(title.replace("|", " ").split())[:28].strip(",. ")
        name = name if name not in rows else f"{name} {rng.randint(2, 99)}"
        rows.setdefault(name, [rng.randint(1, 9999) for _ in columns])
    if len(rows) < 8:
        return None
    lines = _lines(rng, columns, rows)
    name, column = rng.choice(list(rows)), rng.randrange(len(columns))
    other = rng.choice([key for key in rows if key != name])
    fields = {"row": name, "column": columns[column], "other": other}
    blocks = ["\n".join(lines)]
    text, position = lay_out(draw, "table", blocks, fields)
    return finish(
        draw, text, position=position, reference=str(rows[name][column]), max_new_tokens=48
    )


def _lines(rng: random.Random, columns: list[str], rows: dict[str, list[int]]) -> list[str]:
    style = rng.choice(("pipes", "csv", "records"))
    if style == "pipes":
        head = ["| " + " | ".join(["", *columns]) + " |", "|" + "---|" * (len(columns) + 1)]
        return head + [
            "| " + " | ".join([name, *map(str, cells)]) + " |" for name, cells in rows.items()
        ]
    if style == "csv":
        return [",".join(["name", *columns])] + [
            ",".join([name, *map(str, cells)]) for name, cells in rows.items()
        ]
    return [
        f"{name}: "
        + ", ".join(f"{column} = {cell}" for column, cell in zip(columns, cells, strict=True))
        for name, cells in rows.items()
    ]


KINDS = [Kind(name="table", weight=3, local=False, make=table)]
