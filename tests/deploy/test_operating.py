"""docs/OPERATING.md lists every error message, as the code has it.

Oracle: the source, read with `ast`. A value put into a message is `…` on both sides.
"""

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEXT = (REPOSITORY / "docs" / "OPERATING.md").read_text()
ERRORS = {
    "FluxConfigError",
    "RouterCheckpointError",
    "UnsupportedConfigurationError",
    "CommandError",
    "HTTPException",
}


def words(node: ast.expr) -> str:
    """Write a message's constant words, `…` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(words(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    return "…"


def raised() -> dict[str, str]:
    """Give each error's message by where it is made."""
    messages = {}
    for file in sorted((REPOSITORY / "flux_vllm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            name = getattr(node.func, "id", "") if isinstance(node, ast.Call) else ""
            if name in ERRORS:
                message = node.args[-1]  # HTTPException has its status first
                place = f"{file.relative_to(REPOSITORY)}:{node.lineno}"
                messages[place] = words(message)
    return messages


def documented() -> list[str]:
    """Give the first column of the tables under the heading on errors."""
    section = TEXT.split("\n## What an error says\n")[1].split("\n## ")[0]
    return re.findall(r"^\| `` ?(.+?) ?`` \|", section, re.M)


@pytest.mark.parametrize("message", documented())
def test_documented_message_is_in_the_code(message):
    assert any(message in text for text in raised().values()), message


@pytest.mark.parametrize(("place", "text"), raised().items())
def test_message_in_the_code_is_documented(place, text):
    assert any(message in text for message in documented()), f"{place}: {text}"


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#:]+)\)", TEXT))
def test_link_leads_somewhere(target):
    assert (REPOSITORY / "docs" / target).exists()
