"""What the README and every page link to or name by its path is there."""

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

WRITTEN = ("models", "runs")
"""Folders of the checkout that commands write."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(<?([^)#:>]+)(?:#[^)]*)?>?\)", page.read_text(encoding="utf-8"))
    missing = [target for target in targets if not (page.parent / target).exists()]
    assert not missing


def test_pages_are_found() -> None:
    assert {"README.md", "FAQ.md", "OPERATING.md", "real_tasks.md"} <= {page.name for page in PAGES}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_files_that_are_named_exist(page: Path) -> None:
    """By a path from the page, the repository, the package or its attention backend."""
    if page.name in ("LOG.md", "CHANGELOG.md"):  # of earlier versions too
        return
    roots = [page.parent]
    roots += [REPOSITORY / root for root in (".", "flux_vllm", "flux_vllm/attention_backend")]
    text = page.read_text(encoding="utf-8")
    named = re.findall(r"`((?:[a-z_0-9]+/)+[a-z_0-9]+\.(?:py|sh|json))`", text)
    missing = []
    for name in named:  # else it is vLLM's, or what a run writes, which may be there or not
        first = name.split("/")[0]
        inside = [root for root in roots if (root / first).is_dir() and first not in WRITTEN]
        if inside and not any((root / name).is_file() for root in inside):
            missing.append(name)
    assert not missing
