"""Links of the README and of every page lead to files that are there."""

import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PAGES = [
    *REPOSITORY.glob("*.md"),
    *(REPOSITORY / "docs").glob("*.md"),
    *(REPOSITORY / "benchmarks").rglob("*.md"),
    *(REPOSITORY / "deploy").rglob("*.md"),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(<?([^)#:>]+)(?:#[^)]*)?>?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_pages_are_found() -> None:
    assert {"README.md", "FAQ.md", "OPERATING.md", "real_tasks.md"} <= {page.name for page in PAGES}
