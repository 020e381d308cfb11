"""docs/OPERATING.md lists every error message, as the code has it, under the class that it raises.

Oracle: the source, read with `ast`. A value put into a message is `…` on both sides.
"""

import ast
import re
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "OPERATING.md").read_text()
AT_START = {"FluxConfigError", "RouterCheckpointError", "UnsupportedConfigurationError"}
COMMANDS_AND_PAGE = {"CommandError", "HTTPException"}
"""Shown without a class: those of the tables whose heading names none."""


class Message(NamedTuple):
    """An error's text and the classes it may have."""

    text: str
    classes: frozenset[str]

    def is_listed_as(self, listed: "Message") -> bool:
        """Tell whether a row of the tables means this message."""
        return listed.text in self.text and self.classes <= listed.classes


def words(node: ast.expr) -> str:
    """Write a message's constant words, `…` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return "…"


def raised() -> dict[str, Message]:
    """Give each error by where it is made."""
    messages = {}
    for file in sorted((REPOSITORY / "flux_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in AT_START | COMMANDS_AND_PAGE:
                message = node.args[-1]  # HTTPException has its status first
                place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
                messages[place] = Message(words(message), frozenset({name}))
    return messages


def documented() -> list[Message]:
    """Give the first column of the tables of errors, with the class that the heading names."""
    section = TEXT.split("\n## What an error says\n")[1].split("\n## ")[0]
    listed = []
    for table in re.split(r"^(?=\*\*)", section, flags=re.M)[1:]:
        heading = table.split("\n|")[0]
        classes = frozenset(name for name in AT_START if f"`{name}`" in heading)
        for text in re.findall(r"^\| `` ?(.+?) ?`` \|", table, re.M):
            listed.append(Message(text, classes or frozenset(COMMANDS_AND_PAGE)))
    return listed


@pytest.mark.parametrize("listed", documented(), ids=lambda listed: listed.text)
def test_documented_message_is_in_the_code(listed):
    assert any(message.is_listed_as(listed) for message in raised().values()), listed


@pytest.mark.parametrize(("place", "message"), raised().items())
def test_message_in_the_code_is_documented(place, message):
    assert any(message.is_listed_as(listed) for listed in documented()), f"{place}: {message}"


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_link_leads_somewhere(target):
    assert (REPOSITORY / "docs" / target).exists()
