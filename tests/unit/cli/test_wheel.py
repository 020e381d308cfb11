"""The built wheel: what it ships, and that vLLM finds the plugin in a clean environment.

The clean environment is a new venv with the wheel in it. vLLM and torch are lent to it from the
environment that runs the tests; the checkout and its editable install are out of its sight.
"""

import configparser
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]

LOAD = """\
from importlib.metadata import distribution
entries = distribution("flux-vllm").entry_points
for group, name in (("console_scripts", "flux-vllm"), ("vllm.general_plugins", "flux")):
    (entry,) = entries.select(group=group, name=name)
    print(name, callable(entry.load()))
"""

FIND = """\
import flux_vllm
from vllm.plugins import load_general_plugins
from vllm.v1.attention.backends.registry import AttentionBackendEnum
load_general_plugins()
print(flux_vllm.__file__, AttentionBackendEnum["FLUX"].get_path())
"""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, so that the checkout stays clean."""
    source = tmp_path_factory.mktemp("source")
    shutil.copytree(
        REPOSITORY / "flux_vllm",
        source / "flux_vllm",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    (source / "training").mkdir()
    (source / "training" / "__init__.py").touch()
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        if (REPOSITORY / name).exists():
            shutil.copy(REPOSITORY / name, source)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", str(source)],
        check=True,
        capture_output=True,
        cwd=source,
    )
    (built,) = (source / "dist").glob("*.whl")
    return built


def test_wheel_ships_the_package_alone(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flux_vllm"}
    assert "flux_vllm/py.typed" in names
    assert {f"flux_vllm/live/page.{kind}" for kind in ("css", "html", "js")} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    modules = {
        str(file.relative_to(REPOSITORY)) for file in (REPOSITORY / "flux_vllm").rglob("*.py")
    }
    assert modules <= set(names)


def test_wheel_asks_for_neither_torch_nor_vllm(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith("METADATA"))
        lines = archive.read(metadata).decode().splitlines()
    core = [
        line.removeprefix("Requires-Dist: ")
        for line in lines
        if line.startswith("Requires-Dist: ") and "extra ==" not in line
    ]
    assert sorted(line.split(">")[0] for line in core) == [
        "numpy",
        "prometheus-client",
        "safetensors",
    ]


@pytest.fixture
def clean(wheel: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Give the Python and the packages' folder of a new venv that holds the wheel alone."""
    venv.create(tmp_path / "clean", with_pip=False)
    (packages,) = (tmp_path / "clean" / "lib").glob("python3.*/site-packages")
    subprocess.run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index"),
            *("--target", str(packages), str(wheel)),
        ],
        check=True,
    )
    return tmp_path / "clean" / "bin" / "python", packages


def test_entry_points(wheel: Path, clean: tuple[Path, Path], tmp_path: Path) -> None:
    """What vLLM and the shell look for, by name; both load without torch and vLLM."""
    entries = configparser.ConfigParser()
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/entry_points.txt"))
        entries.read_string(archive.read(name).decode())
    assert dict(entries["console_scripts"]) == {"flux-vllm": "flux_vllm.cli:main"}
    assert dict(entries["vllm.general_plugins"]) == {"flux": "flux_vllm.plugin:register"}
    shown = subprocess.run(
        [str(clean[0]), "-c", LOAD], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    assert shown.stdout.splitlines() == ["flux-vllm True", "flux True"]


@pytest.mark.vllm
def test_vllm_finds_the_installed_wheel(clean: tuple[Path, Path], tmp_path: Path) -> None:
    python, packages = clean
    (packages / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    shown = subprocess.run(
        [str(python), "-c", FIND],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert shown.returncode == 0, shown.stderr[-3000:]
    file, path = shown.stdout.splitlines()[-1].split()
    assert Path(file).is_relative_to(packages)
    assert path.startswith("flux_vllm.")
