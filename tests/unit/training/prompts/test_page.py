"""The page's table of kinds. Oracle: the kinds themselves, their docstrings and weights."""

import re
from pathlib import Path

from training.prompts.kinds import KINDS

PAGE = (Path(__file__).resolve().parents[4] / "docs" / "PROMPTS.md").read_text("utf-8")


def test_the_table_of_kinds_is_that_of_the_code() -> None:
    total = sum(kind.weight for kind in KINDS)
    expected = []
    for kind in KINDS:
        line = (kind.make.__doc__ or "").splitlines()[0].rstrip(".")
        share, local = f"{100 * kind.weight / total:.1f}%", "yes" if kind.local else ""
        expected.append(f"| {kind.name} | {share} | {line} | {local} |")
    table = PAGE.partition("## Kinds")[2]
    assert re.findall(r"^\| \w+ \| .*$", table, re.M)[1:] == expected, "\n" + "\n".join(expected)


def test_the_local_share_of_the_page_is_that_of_the_code() -> None:
    local = sum(kind.weight for kind in KINDS if kind.local) / sum(kind.weight for kind in KINDS)
    assert f"Local: {100 * local:.0f}%." in PAGE
