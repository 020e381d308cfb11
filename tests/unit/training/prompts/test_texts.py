"""Texts out of packages. Oracle: small files of each format, written by hand."""

import dataclasses
import gzip
import json
from pathlib import Path

import pytest

from training.prompts.fetch import Fetcher, Package
from training.prompts.markup import from_html, from_mail, from_man, from_pod, from_rst
from training.prompts.readers import READERS, read_file
from training.prompts.texts import (
    Text,
    clean_text,
    collect_texts,
    read_package,
    read_packages,
    read_texts,
    write_texts,
)


def _package(**changed: object) -> Package:
    fields = {
        "manager": "npm",
        "name": "one",
        "version": "1",
        "register": "book",
        "format": "text",
        "files": ["**/*.txt"],
    }
    return Package(**(fields | changed))  # type: ignore[arg-type]


def _prose(seed: int, paragraphs: int = 8) -> str:
    line = f"This is sentence number {seed} of a text that somebody wrote about the sea and a boat."
    return "\n\n".join(f"{line} It has a part {seed}.{at}, too." for at in range(paragraphs))


@pytest.fixture
def fetcher(tmp_path: Path) -> Fetcher:
    """Give packages that are there already, so that nothing is fetched."""
    for name in ("npm-one", "npm-two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "ARCHIVE_NAME").write_text(f"{name}.tgz")
    for number in range(6):
        (tmp_path / "npm-one" / f"{number}.txt").write_text(_prose(number))
    (tmp_path / "npm-two" / "copy.txt").write_text(_prose(3))
    (tmp_path / "npm-two" / "new.txt").write_text(_prose(77))
    return Fetcher(tmp_path)


def test_collect_texts_keeps_equal_texts_once(fetcher: Fetcher) -> None:
    packages = [_package(), _package(name="two", register="essay")]
    texts, rows = collect_texts(packages, fetcher, workers=1)
    assert [row["texts"] for row in rows] == [6, 1]
    assert [row["archive"] for row in rows] == ["npm-one.tgz", "npm-two.tgz"]
    assert texts[-1].register == "essay"
    assert "77.0" in texts[-1].text
    assert collect_texts(packages, fetcher, workers=1)[0] == texts


def test_read_package_stops_at_its_limit(fetcher: Fetcher) -> None:
    whole = read_package(_package(), fetcher.folder / "npm-one")
    size = len(whole[0].text.encode())
    limited = _package(limit_mib=1.5 * size / 2**20)
    assert read_package(limited, fetcher.folder / "npm-one") == whole[:2]


def test_read_package_skips_named_paths_and_refuses_nothing(fetcher: Fetcher) -> None:
    folder = fetcher.folder / "npm-two"
    assert len(read_package(_package(skip=["copy"]), folder)) == 1
    with pytest.raises(ValueError, match="correct its entry in sources.json"):
        read_package(_package(files=["*.rst"]), folder)


def test_long_texts_are_cut_between_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "long.txt").write_text(_prose(1, 4000))
    first, second, *_ = read_package(_package(), tmp_path)
    assert (first.title, second.title) == ("long, part 1", "long, part 2")
    assert len(first.text) <= 200_000
    assert first.text.endswith("too.")
    assert second.text.startswith("This is")


def test_texts_are_written_and_read_back(tmp_path: Path) -> None:
    texts = [Text("book", "a", "t", "en", "words"), Text("news", "b", "题", "zh", "文字\n")]
    for name in ("t.jsonl", "t.jsonl.gz", "new/t.jsonl.xz"):
        write_texts(tmp_path / name, texts)
        assert read_texts(tmp_path / name) == texts


def test_sources_are_packages_with_versions_and_readers() -> None:
    packages = read_packages()
    assert len({package.register for package in packages}) >= 8
    assert {package.language for package in packages} == {"en", "zh"}
    for package in packages:
        assert package.format in READERS
        assert package.version or package.manager == "stdlib", package.name
    assert len({dataclasses.astuple(package).__repr__() for package in packages}) == len(packages)


def test_from_html_keeps_words_lists_and_preformatted_text() -> None:
    page = (
        "<html><head><title>T</title><style>p{}</style></head><body><nav>menu</nav>"
        "<h1>Head</h1><p>One\n  two <b>three</b>.</p><ul><li>a<li>b</ul>"
        "<pre>x\n  y</pre><script>no()</script></body></html>"
    )
    text = from_html(page)
    assert "One two three." in text
    assert "- a\n- b" in text
    assert "x\n  y" in text
    assert "menu" not in text
    assert "no()" not in text


def test_from_man_reads_macros_and_fonts() -> None:
    source = (
        '.\\" a comment\n.TH CAT 1\n.SH NAME\ncat \\- join \\fIfiles\\fP\n.SH OPTIONS\n'
        '.TP\n.BR \\-n ", " \\-\\-number\nnumber\nlines\n.nf\n  kept  as\n  it is\n.fi\n'
    )
    text = from_man(source)
    assert "cat - join files" in text
    assert "-n, --number number lines" in text
    assert "  kept  as\n  it is" in text
    assert "comment" not in text


def test_from_pod_and_rst_drop_their_marks() -> None:
    assert from_pod("=head1 NAME\n\nB<perl> - C<< a > b >> I<x>\n\n=cut\n").split("\n")[0] == "NAME"
    assert "perl - a" in from_pod("B<perl> - C<a>")
    rst = ".. _label:\n\nSee :ref:`this page <label>` and `Link <http://x>`_ and :func:`run`.\n"
    assert from_rst(rst).strip() == "See this page and Link and run."


def test_from_mail_drops_addresses_signatures_and_html() -> None:
    mail = "From: Ann Lee <a@b.c>\nSubject: Boats\nTo: x@y\n\nHi joe@z.org, hello.\n-- \nAnn\n"
    assert from_mail(mail) == "From: Ann Lee\nSubject: Boats\n\nHi (address) hello."
    assert from_mail(mail.replace("To:", "Content-Type: text/html\nTo:")) == ""


def test_brown_words_lose_their_tags(tmp_path: Path) -> None:
    path = tmp_path / "ca01"
    path.write_text(
        "\n\n\tThe/at jury/nn said/vbd ``/`` no/at ''/'' ,/, ok/jj ./.\n\n\n\tNext/ap ./.\n"
    )
    assert read_file(path, "brown") == [("ca01", 'The jury said "no", ok.\n\nNext.')]


def test_tagged_news_loses_its_tags(tmp_path: Path) -> None:
    path = tmp_path / "news.txt"
    path.write_text("１２月/t  新华社/nt  ，/w  [北京/ns  大学/n]nt  开学/v\n")
    assert read_file(path, "tagged_zh") == [("12月新华社，北京大学开学",) * 2]


def test_game_dialogues_have_speakers(tmp_path: Path) -> None:
    path = tmp_path / "01_Old_Port.cfg"
    path.write_text(
        '[message]\nspeaker=Konrad\nmessage= _ "We go ""now""."\n[/message]\n'
        '[part]\nstory= _ "Night fell."\n[/part]\n'
    )
    assert read_file(path, "wesnoth") == [("Old Port", 'Konrad: We go "now".\n\nNight fell.')]


def test_rfc_pages_are_joined(tmp_path: Path) -> None:
    path = tmp_path / "rfc1.txt.gz"
    foot, head = "Doe    Standards Track    [Page 1]", "RFC 1   Title   May 1999"
    page = f"   one two\n\n\n\n{foot}\n\f\n{head}\n\n\n   three\n"
    path.write_bytes(gzip.compress(page.encode()))
    [(title, text)] = read_file(path, "rfc")
    assert title == "RFC 1"
    assert "[Page" not in text
    assert "May 1999" not in text
    assert "three" in text


def test_factbook_is_flattened(tmp_path: Path) -> None:
    path = tmp_path / "xx.json"
    country = {
        "Government": {"Country name": {"conventional short form": {"text": "Xland"}}},
        "People": {"Population": {"text": "7 <b>million</b>"}},
    }
    path.write_text(json.dumps(country))
    [(title, text)] = read_file(path, "factbook")
    assert title == "Xland"
    assert "Population: 7 million" in text


def test_clean_text_keeps_words_and_shortens_rules() -> None:
    assert clean_text("a\u200bb \n\n\n\nc ======== d\x07") == "ab\n\nc === d"
    assert clean_text("x = 1  # ========\n\ty", code=True) == "x = 1  # ========\n    y"
    assert clean_text("中文，ok") == "中文，ok"


def test_titles_of_code_do_not_name_the_folder_of_packages(tmp_path: Path) -> None:
    (tmp_path / "lib/a/b/c").mkdir(parents=True)
    (tmp_path / "lib/a/b/c/m.py").write_text("value = other + 1  # more\n" * 40)
    (tmp_path / "top.py").write_text("value = other - 1  # less\n" * 40)
    package = _package(register="code", format="code", files=["**/*.py"])
    found = read_package(package, tmp_path)
    assert {text.title for text in found} == {"a/b/c/m.py", "top.py"}
    assert {text.language for text in found} == {"py"}
