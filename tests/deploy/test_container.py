"""The container's own scripts in a clean virtual environment: installed, started, asked, stopped.

No container engine is needed: what the Dockerfile runs, deploy/install.sh, start.sh and health.py,
runs here as it stands. vLLM and torch are lent by the environment that runs the tests, in place of
vLLM's image; the checkout and its editable install are out of sight.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

import demo.server
from tests.helpers.metrics import parse, total

REPOSITORY = Path(__file__).resolve().parents[2]
DEPLOY = REPOSITORY / "deploy"
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()
ROUTER = REPOSITORY / "flux_vllm" / "data" / "smollm2-135m-instruct"

pytestmark = [pytest.mark.slow, pytest.mark.vllm]


def lend_packages(environment: Path) -> None:
    """Let a virtual environment see what is installed here, but for this project."""
    (packages,) = (environment / "lib").glob("python3.*/site-packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        ours = "flux_vllm" in entry.name
        if not ours and not (packages / entry.name).exists() and entry.suffix != ".pth":
            (packages / entry.name).symlink_to(entry)


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Install by deploy/install.sh from a copy of what .dockerignore lets into an image."""
    folder = tmp_path_factory.mktemp("image")
    source = folder / "source"
    source.mkdir()
    for name in re.findall(r"^!(\S+)$", (REPOSITORY / ".dockerignore").read_text(), re.M):
        path = REPOSITORY / name
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / name, ignore=ignore)
        else:
            shutil.copy(path, source)
    clean = folder / "python"
    venv.create(clean, with_pip=True)
    # Python 3.11 brings a setuptools that is too old to build with; ours is lent instead.
    uninstall = [clean / "bin" / "python", "-m", "pip", "uninstall", "--yes", "setuptools"]
    subprocess.run(uninstall, check=True, capture_output=True)
    lend_packages(clean)
    done = subprocess.run(
        ["bash", "deploy/install.sh"],
        cwd=source,
        # setuptools is lent as well: nothing has to be downloaded.
        env=outside() | {"PYTHON": str(clean / "bin" / "python"), "PIP_NO_BUILD_ISOLATION": "0"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert str(clean) in done.stdout.splitlines()[-1]
    return clean


def outside() -> dict[str, str]:
    """Give an environment that knows nothing of the checkout."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


class ContainerServer(demo.server.Server):
    """The container's entry point."""

    program = ("bash", str(DEPLOY / "start.sh"))

    def __init__(self, model: Path, log: Path, *arguments: str) -> None:
        super().__init__([str(model), *arguments], log)
        self._command.remove("serve")  # start.sh says it
        option = self._command.index("--port")  # FLUX_PORT says it
        self.port = self._command[option + 1]
        del self._command[option : option + 2]


@pytest.fixture(scope="module")
def server(
    environment: Path, sample_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ContainerServer]:
    """Start by deploy/start.sh, as the image's entry point: a model, then vLLM's arguments."""
    folder = tmp_path_factory.mktemp("container")
    path = f"{environment / 'bin'}{os.pathsep}{os.environ['PATH']}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", path)
        patch.delenv("VLLM_PLUGINS", raising=False)
        patch.chdir(folder)
        flux = f'{{"flux": {{"router": "{ROUTER}"}}}}'
        arguments = ("--additional-config", flux, "--enforce-eager", "--max-model-len", "1024")
        cache = ("--kv-cache-memory-bytes", str(128 << 20))
        server = ContainerServer(sample_model, folder / "log", *arguments, *cache)
        patch.setenv("FLUX_PORT", server.port)
        with server:
            yield server


def test_installed_apart_from_the_checkout(environment: Path, tmp_path: Path) -> None:
    show = "import flux_vllm, vllm; print(flux_vllm.__file__)"
    python = environment / "bin" / "python"
    shown = subprocess.run(
        [python, "-c", show],
        cwd=tmp_path,
        env=outside(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert Path(shown.stdout.split()[-1]).is_relative_to(environment)
    assert (environment / "bin" / "flux-vllm").is_file()


def test_health_check(server: ContainerServer) -> None:
    check = [sys.executable, str(DEPLOY / "health.py")]
    up = subprocess.run(check, env={"FLUX_PORT": server.port})
    assert up.returncode == 0
    down = subprocess.run(check, env={"FLUX_PORT": "9"}, capture_output=True, text=True)
    assert down.returncode == 1
    assert "http://127.0.0.1:9/health" in down.stderr


def test_completion_is_routed(server: ContainerServer, sample_model: Path) -> None:
    def complete(prompt: str) -> str:
        body = {"model": str(sample_model), "prompt": prompt, "max_tokens": 8}
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).json()
        return str(answer["choices"][0]["text"])

    assert "Paris" in complete("The capital of France is")  # within sinks and window: no routes
    complete("The quick brown fox jumps over the lazy dog. " * 80)
    samples = parse(server.get("/metrics"))
    assert total(samples, "flux_route_decisions_total") == 30


def test_live_page_is_loaded(server: ContainerServer) -> None:
    assert httpx.get(f"{server.url}/flux", follow_redirects=True, timeout=30).status_code == 200


@pytest.mark.parametrize("arguments", [[], ["--port", "80"]], ids=["nothing", "an-option"])
def test_start_without_a_model_says_how(arguments: list[str]) -> None:
    command = ["bash", str(DEPLOY / "start.sh"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"expected a model first, found '{(arguments or ['nothing'])[0]}'" in done.stderr


@pytest.mark.parametrize("port", [["--port", "9000"], ["--port=9000"]], ids=["apart", "joined"])
def test_start_with_a_port_names_flux_port(port: list[str]) -> None:
    """The health check asks at FLUX_PORT, and would call a server elsewhere dead."""
    command = ["bash", str(DEPLOY / "start.sh"), "MODEL", "--max-model-len", "64", *port]
    done = subprocess.run(command, capture_output=True, text=True, env={"PATH": "/usr/bin:/bin"})
    assert done.returncode == 2
    assert "expected the port in FLUX_PORT" in done.stderr


def test_install_without_vllm_says_so(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    done = subprocess.run(
        ["bash", str(DEPLOY / "install.sh")],
        env=outside() | {"PYTHON": str(tmp_path / "bare" / "bin" / "python")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "expected vLLM in" in done.stderr


def test_dockerfile_runs_these_scripts() -> None:
    assert "bash /source/deploy/install.sh /source" in DOCKERFILE
    for script in ("start.sh", "health.py"):
        assert f"/source/deploy/{script}" in DOCKERFILE
        assert f"/opt/flux/{script}" in DOCKERFILE
    (plugins,) = re.findall(r"VLLM_PLUGINS=(\S+) ", DOCKERFILE)
    assert f"VLLM_PLUGINS:-{plugins}}}" in (DEPLOY / "start.sh").read_text()
