"""The plugin: `flux` becomes a backend that vLLM knows, in every process, and nothing else changes.

Oracle: vLLM's own registry, AttentionConfig and plugin loader; fresh interpreters for what a
spawned process sees. Pinned: an enum member pickles by value, which a spawned engine does not know
before it loads plugins; ours pickles by name.
"""

import copy
import pickle
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from flux_vllm import plugin

pytestmark = pytest.mark.vllm

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def backends() -> Any:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    plugin.register()
    return AttentionBackendEnum


IMPORTED = """
import os, pickle, sys, traceback
from pathlib import Path

import vllm
from vllm import plugins
from vllm.engine import arg_utils
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends.registry import AttentionBackendEnum as E

assert 'FLUX' not in E.__members__
for file in map(Path, sys.argv[1:]):
    if os.fork():
        os.wait()
        continue
    output = os.open(file.with_suffix('.txt'), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        exec(file.read_text())
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(0)
"""
OTHERS = """
def path(m):
    try: return m.get_path()
    except ValueError as error: return str(error)
def state(): return {n: (m.value, path(m), pickle.loads(pickle.dumps(m)) is m)
                     for n, m in E.__members__.items() if n != 'FLUX'}
before = state()
from flux_vllm import plugin
plugin.register()
assert 'CUSTOM' in before and 'CPU_ATTN' in before
assert all(entry[2] for entry in before.values())
print(state() == before, len(E.__members__) - len(before))
"""
CHANGES = {
    "version": "vllm.__version__ = '0.34.0'",
    "platform": "del CpuPlatform.get_attn_backend_cls",
    "plugins": "del plugins.load_general_plugins",
    "no-arguments": "del arg_utils.EngineArgs",
    "arguments": "del arg_utils.EngineArgs.create_engine_config",
}
UNTOUCHED = """
from flux_vllm import plugin
plugin.register()
assert 'FLUX' not in E.__members__
for found in (getattr(CpuPlatform, 'get_attn_backend_cls', None),
              getattr(plugins, 'load_general_plugins', None)):
    assert not hasattr(getattr(found, '__func__', found), '__flux_wrapped__')
print('untouched')
"""


@pytest.fixture(scope="module")
def printed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """What each program prints in its own copy of a process that has imported vLLM, and no more."""
    folder = tmp_path_factory.mktemp("programs")
    programs = {"others": OTHERS}
    programs |= {name: change + UNTOUCHED for name, change in CHANGES.items()}
    for name, program in programs.items():
        (folder / name).write_text(program)
    files = [str(folder / name) for name in programs]
    subprocess.run([sys.executable, "-c", IMPORTED, *files], check=True)
    return lambda name: (folder / f"{name}.txt").read_text()


def run(code: str, **options: Any) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip().splitlines()[-1]


class TestRegister:
    def test_twice(self, backends: Any) -> None:
        member, names = backends["FLUX"], list(backends.__members__)
        plugin.register()
        assert backends["FLUX"] is member
        assert list(backends.__members__) == names
        assert names.count("FLUX") == 1

    def test_path(self, backends: Any) -> None:
        assert backends["FLUX"].name == "FLUX"
        assert backends["FLUX"].get_path() == plugin.BACKEND_PATH

    def test_class_is_the_platforms(self, backends: Any) -> None:
        from flux_vllm.attention_backend.cpu.backend import FluxCPUBackend

        backend = backends["FLUX"].get_class()
        assert backend is FluxCPUBackend
        # vLLM finds an impl's enum member by the backend's name.
        assert backends[backend.get_name()] is backends["FLUX"]

    @pytest.mark.slow
    def test_others_are_untouched(self, printed: Callable[[str], str]) -> None:
        """Names, values, paths and pickles of vLLM's backends are the same before and after."""
        assert printed("others").splitlines()[-1] == "True 1"


class TestOtherVersions:
    """A vLLM that is not known, or not as it was, loses nothing by flux being installed."""

    @pytest.mark.parametrize(
        ("version", "known"),
        [
            ("0.31.9", False),
            ("0.32.0", True),
            ("0.32.1+cpu", True),
            ("0.33.1rc1.dev5+gabc", True),
            ("0.34.0", False),
            ("1.32.0", False),
            ("dev", False),
        ],
    )
    def test_known_versions(self, version: str, known: bool) -> None:
        assert plugin.is_known_version(version) == known

    @pytest.mark.slow
    @pytest.mark.parametrize(
        ("name", "warning"),
        [
            ("version", "expected vLLM 0.32 or later, before 0.34, found 0.34.0"),
            (
                "platform",
                "expected a function get_attn_backend_cls of CpuPlatform in vLLM, found none",
            ),
            (
                "plugins",
                "expected a function load_general_plugins of vllm.plugins in vLLM, found none",
            ),
            (
                "no-arguments",
                "expected a function create_engine_config of vllm.engine.arg_utils in vLLM",
            ),
            (
                "arguments",
                "expected a function create_engine_config of EngineArgs in vLLM, found none",
            ),
        ],
    )
    def test_nothing_is_hooked(
        self, name: str, warning: str, printed: Callable[[str], str]
    ) -> None:
        shown = printed(name)
        assert "untouched" in shown.splitlines(), shown[-3000:]
        assert shown.count(warning) == 1
        assert "`--attention-backend flux` is not available" in shown


class TestSelection:
    @pytest.mark.parametrize("name", ["flux", "FLUX", "Flux", "fLuX"])
    def test_any_case(self, backends: Any, name: str) -> None:
        from vllm.config import AttentionConfig

        assert AttentionConfig(backend=name).backend is backends["FLUX"]

    def test_command_line(self, backends: Any) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
        parsed = parser.parse_args(
            ["--attention-backend", "flux", "--additional-config", '{"flux": {"policy": "full"}}']
        )
        assert parsed.attention_backend == "flux"
        assert parsed.additional_config == {"flux": {"policy": "full"}}

    def test_unknown_backends_are_still_unknown(self, backends: Any) -> None:
        from vllm.config import AttentionConfig

        with pytest.raises(ValueError, match=r"(?i)fluxx"):
            AttentionConfig(backend="fluxx")


class TestPickle:
    def test_in_this_process(self, backends: Any) -> None:
        member = backends["FLUX"]
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            assert pickle.loads(pickle.dumps(member, protocol)) is member
        assert copy.deepcopy(member) is member
        assert copy.copy(member) is member
        custom = backends["CPU_ATTN"]
        assert pickle.loads(pickle.dumps(custom)) is custom

    def test_cloudpickle(self, backends: Any) -> None:
        """Executors send callables with it."""
        import cloudpickle

        assert pickle.loads(cloudpickle.dumps(backends["FLUX"])) is backends["FLUX"]

    @pytest.mark.slow
    def test_in_a_process_without_plugins(self, backends: Any, tmp_path: Path) -> None:
        """What `vllm serve` sends into a spawned EngineCore, which unpickles it first of all."""
        from vllm.config import AttentionConfig

        config = AttentionConfig(backend="flux")
        for name, value in (("member", backends["FLUX"]), ("config", config)):
            (tmp_path / name).write_bytes(pickle.dumps(value))
        code = (
            "import pickle, sys\n"
            "member = pickle.load(open('member', 'rb'))\n"
            "config = pickle.load(open('config', 'rb'))\n"
            "again = pickle.loads(pickle.dumps(config))\n"  # and on into its workers
            "from vllm.v1.attention.backends.registry import AttentionBackendEnum as E\n"
            "from vllm import plugins\n"
            "assert not plugins.plugins_loaded\n"
            "assert member is config.backend is again.backend is E['FLUX']\n"
            "plugins.load_general_plugins()\n"
            "assert member is E['FLUX']\n"
            "print(member.get_path())\n"
        )
        assert run(code, cwd=tmp_path) == plugin.BACKEND_PATH


class TestEntryPoints:
    @pytest.fixture
    def project(self) -> dict:
        return tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]

    def load(self, target: str) -> Any:
        module, name = target.split(":")
        return getattr(import_module(module), name)

    def test_plugin(self, project: dict) -> None:
        group = project["entry-points"]["vllm.general_plugins"]
        assert {name: self.load(target) for name, target in group.items()} == {
            "flux": plugin.register
        }

    def test_command(self, project: dict) -> None:
        assert set(project["scripts"]) == {"flux-vllm"}
        assert callable(self.load(project["scripts"]["flux-vllm"]))

    def test_vllms_loader_finds_it(self, backends: Any) -> None:
        from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

        assert load_plugins_by_group(DEFAULT_PLUGINS_GROUP)["flux"] is plugin.register
