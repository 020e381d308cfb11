"""Fetch the Python files of another vLLM version, to test against it without installing it.

    python tools/vllm_sources.py 0.33.0

prints a folder that holds `vllm/`, for PYTHONPATH. The wheel (hundreds of MB, nearly all of it
compiled) is downloaded once by pip, and only its `*.py` files are kept, in the user's cache.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# The files are the same for every platform; this one has a wheel for each version.
_PLATFORM = "manylinux_2_28_x86_64"


def cache_folder() -> Path:
    """Give the folder that keeps what was fetched."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "flux-vllm" / "vllm-sources"


def vllm_sources(version: str) -> Path:
    """Return a folder with the `vllm` package's Python files, fetched unless they are there.

    Args:
        version: of vLLM, such as "0.33.0".

    Raises: RuntimeError: pip could not download it.
    """
    folder = cache_folder() / version
    if (folder / "vllm" / "version.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        wheel = _download(version, Path(temporary) / "wheel")
        _extract(wheel, Path(temporary) / "files")
        try:
            (Path(temporary) / "files").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "vllm" / "version.py").is_file():
                raise
    return folder


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"vllm=={version}", "--no-deps"]
    command += ["--only-binary=:all:", f"--platform={_PLATFORM}", "--no-cache-dir"]
    command += ["--disable-pip-version-check", "--quiet", f"--dest={folder}"]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(
            f"vllm {version}: expected pip to download its wheel, found\n{done.stderr.strip()}\n"
            "make the package index reachable, or unpack the wheel's *.py files into "
            f"{cache_folder() / version}"
        )
    (wheel,) = folder.glob("*.whl")
    return wheel


def _extract(wheel: Path, folder: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(
            folder, [name for name in names if name.startswith("vllm/") and name.endswith(".py")]
        )


def main() -> None:
    """Print the folder of the version asked for."""
    parser = argparse.ArgumentParser(
        description="Fetch the Python files of a vLLM version into the user's cache."
    )
    parser.add_argument("version", help='such as "0.33.0"')
    print(vllm_sources(parser.parse_args().version))


if __name__ == "__main__":
    main()
