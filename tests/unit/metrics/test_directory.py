"""The folder between workers and the API server: who makes it, who reads it, who removes it.

Oracle: prometheus_client's global registry and its own multi-process collector. What happens at a
process's end is seen from outside, in processes of their own. Pinned: a forked child that exits
takes nothing away; vLLM's clean-up of its own collectors leaves ours; what a server killed by
SIGKILL left is neither shown by the next nor left lying.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from flux_vllm.metrics import directory
from flux_vllm.metrics.directory import FluxCollector, metrics_directory, prepare_front_end
from flux_vllm.metrics.store import MetricStore

OWN, VLLMS = "FLUX_METRICS_DIR", "PROMETHEUS_MULTIPROC_DIR"


@pytest.fixture(autouse=True)
def _clean(
    monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Start without folders, in a /tmp of our own; leave the global registry as it was."""
    monkeypatch.setenv("TMPDIR", str(tmp_path_factory.mktemp("tmp")))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv(OWN, raising=False)
    monkeypatch.delenv(VLLMS, raising=False)
    monkeypatch.setattr(directory, "_folder", None)
    # Engines of earlier tests in this process left theirs.
    earlier = ours()
    for collector in earlier:
        REGISTRY.unregister(collector)
    before = set(REGISTRY._collector_to_names)
    yield
    for collector in set(REGISTRY._collector_to_names) - before:
        REGISTRY.unregister(collector)
    for collector in earlier:
        REGISTRY.register(collector)


def ours() -> list[FluxCollector]:
    return [c for c in REGISTRY._collector_to_names if isinstance(c, FluxCollector)]


def shown() -> str:
    return generate_latest(REGISTRY).decode()


def run(code: str, *arguments: str) -> subprocess.CompletedProcess:
    code = "import os, sys\nfrom flux_vllm.metrics.directory import *\n" + code
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True
    )


SERVE = (
    "import os, sys, time\n"
    "from flux_vllm.metrics.directory import *\n"
    "from flux_vllm.metrics.store import MetricStore\n"
    "prepare_front_end()\n"
    "store = MetricStore(metrics_directory(), {'model_name': 'former'})\n"
    "store.add('flux_things', 3, 'Things.')\n"
    "store.set('flux_info', 1, 'Information.')\n"
    "print(metrics_directory(), flush=True)\n"
    "time.sleep(600)\n"
)


@contextmanager
def serving() -> Iterator[Path]:
    """Let another process count until it is killed; gives its folder."""
    command = [sys.executable, "-c", SERVE]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield Path(process.stdout.readline().strip())
        finally:
            process.kill()


class TestFolder:
    def test_none_without_a_front_end(self) -> None:
        assert metrics_directory() is None

    def test_made_once(self) -> None:
        count = len(ours())
        prepare_front_end()
        folder = metrics_directory()
        assert folder is not None
        assert folder.is_dir()
        assert os.environ[OWN] == str(folder)
        prepare_front_end()
        assert metrics_directory() == folder
        assert len(ours()) == count + 1

    def test_folder_of_another_process_is_not_used(self, tmp_path: Path, monkeypatch) -> None:
        """A server that a process with an engine starts inherits the name."""
        monkeypatch.setenv(OWN, str(tmp_path))
        MetricStore(tmp_path, {"model_name": "other"}).add("flux_things", 1, "Things.")
        prepare_front_end()
        folder = metrics_directory()
        assert folder not in (None, tmp_path)
        assert os.environ[OWN] == str(folder)
        assert "flux_things" not in shown()
        MetricStore(folder, {"model_name": "m"}).add("flux_things", 1, "Things.")
        assert 'flux_things_total{model_name="m"} 1.0' in shown()

    def test_vanished_folder_is_made_anew(self) -> None:
        prepare_front_end()
        first = metrics_directory()
        first.rmdir()
        prepare_front_end()
        second = metrics_directory()
        assert second != first
        assert second.is_dir()


class TestSeveralEngines:
    """Metrics are those of this front end's engines, correct or absent."""

    def test_two_engines_of_a_process_add_up(self) -> None:
        """Under the same model name; the first engine's counts stay when it is gone."""
        for count in (3, 4):
            prepare_front_end()
            MetricStore(metrics_directory(), {"model_name": "m"}).add("flux_things", count, "T.")
        assert 'flux_things_total{model_name="m"} 7.0' in shown()
        MetricStore(metrics_directory(), {"model_name": "n"}).add("flux_things", 5, "T.")
        assert 'flux_things_total{model_name="m"} 7.0' in shown()
        assert 'flux_things_total{model_name="n"} 5.0' in shown()

    def test_forked_front_end_shows_its_own(self) -> None:
        """What the parent counted, before or after the fork, is not in the child's scrape."""
        lines = run(
            "from prometheus_client import generate_latest\n"
            "from flux_vllm.metrics.store import MetricStore\n"
            "def count(things):\n"
            "    prepare_front_end()\n"
            "    MetricStore(metrics_directory(), {}).add('flux_things', things, 'T.')\n"
            "def show(who):\n"
            "    text = generate_latest().decode()\n"
            "    print(who, *(l for l in text.splitlines() if l.startswith('flux_')), flush=True)\n"
            "count(3)\n"
            "if os.fork() == 0:\n"
            "    show('child')\n"
            "    count(4)\n"
            "    show('child')\n"
            "    sys.exit(0)\n"
            "os.wait()\n"
            "show('parent')\n"
        ).stdout.splitlines()
        assert lines == ["child", "child flux_things_total 4.0", "parent flux_things_total 3.0"]

    def test_two_servers_of_one_parent_share_nothing(self) -> None:
        prepare_front_end()
        MetricStore(metrics_directory(), {}).add("flux_things", 1, "T.")
        folders = [
            run("prepare_front_end(); print(metrics_directory())").stdout.strip() for _ in range(2)
        ]
        assert len({*folders, str(metrics_directory())}) == 3
        assert metrics_directory().is_dir()


class TestCollector:
    def test_shows_what_workers_count(self) -> None:
        prepare_front_end()
        store = MetricStore(metrics_directory(), {"model_name": "m"})
        for expected in (1.0, 2.0):
            store.add("flux_things", 1, "Things.")
            assert f'flux_things_total{{model_name="m"}} {expected}' in shown()

    def test_nothing_counted_yet(self) -> None:
        prepare_front_end()
        assert "flux_" not in shown()

    def test_folder_gone(self, tmp_path: Path) -> None:
        folder = tmp_path / "f"
        folder.mkdir()
        collector = FluxCollector(str(folder))
        MetricStore(folder, {}).add("flux_things", 1, "Things.")
        assert len(collector.collect()) == 1
        for file in folder.iterdir():
            file.unlink()
        folder.rmdir()
        assert collector.collect() == []

    def test_two_folders_can_be_registered(self, tmp_path: Path) -> None:
        """Metrics of equal names in two collectors do not clash: none is announced."""
        registry = CollectorRegistry()
        for name in ("a", "b"):
            (tmp_path / name).mkdir()
            MetricStore(tmp_path / name, {"model_name": name}).add("flux_things", 1, "Things.")
            registry.register(FluxCollector(str(tmp_path / name)))
        text = generate_latest(registry).decode()
        assert 'flux_things_total{model_name="a"} 1.0' in text
        assert 'flux_things_total{model_name="b"} 1.0' in text

    @pytest.mark.vllm
    def test_vllm_leaves_it_registered(self) -> None:
        """vLLM's stat logger unregisters its own collectors before it makes new ones."""
        from vllm.v1.metrics.prometheus import unregister_vllm_metrics

        prepare_front_end()
        MetricStore(metrics_directory(), {"model_name": "m"}).add("flux_things", 1, "Things.")
        unregister_vllm_metrics()
        assert "flux_things_total" in shown()


class TestSeveralApiServers:
    def test_vllms_folder_is_used(self, tmp_path: Path, monkeypatch) -> None:
        """vLLM then shows a registry of its own, which reads all files of its folder."""
        monkeypatch.setenv(VLLMS, str(tmp_path))
        monkeypatch.setenv(OWN, "/nowhere")
        count = len(ours())
        prepare_front_end()
        assert len(ours()) == count
        assert metrics_directory() == tmp_path
        MetricStore(tmp_path, {"model_name": "m"}).add("flux_things", 3, "Things.")
        registry = CollectorRegistry()
        MultiProcessCollector(registry, path=str(tmp_path))
        assert 'flux_things_total{model_name="m"} 3.0' in generate_latest(registry).decode()

    def test_restart_in_the_same_folder_begins_at_0(self, tmp_path: Path, monkeypatch) -> None:
        """Only what still lives is shown, as the workers that several API servers share."""
        monkeypatch.setenv(VLLMS, str(tmp_path))
        of_vllm = tmp_path / "counter_7.db"
        of_vllm.touch()

        def shown() -> str:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, path=str(tmp_path))
            return generate_latest(registry).decode()

        with serving() as folder:
            assert folder == tmp_path
            prepare_front_end()
            of_vllm.unlink()  # was left alone; empty, it cannot be read
            assert 'flux_things_total{model_name="former"} 3.0' in shown()
            assert 'flux_info{model_name="former"} 1.0' in shown()
        assert 'flux_things_total{model_name="former"} 3.0' in shown()
        prepare_front_end()
        assert "flux" not in shown()
        assert list(tmp_path.iterdir()) == []
        store = MetricStore(metrics_directory(), {"model_name": "former"})
        store.add("flux_things", 1, "Things.")
        assert 'flux_things_total{model_name="former"} 1.0' in shown()

    def test_files_do_not_collide_with_prometheus_clients(self, tmp_path: Path) -> None:
        """In one process both write: its own counter under the bare process id, ours beside it."""
        code = (
            "from pathlib import Path\n"
            "from prometheus_client import Counter, CollectorRegistry, generate_latest\n"
            "from prometheus_client.multiprocess import MultiProcessCollector\n"
            "from flux_vllm.metrics.store import MetricStore\n"
            "prepare_front_end()\n"
            "Counter('vllm_own', 'Own.').inc(7)\n"
            "MetricStore(metrics_directory(), {}).add('flux_things', 3, 'Things.')\n"
            "registry = CollectorRegistry()\n"
            "MultiProcessCollector(registry)\n"
            "print(generate_latest(registry).decode())\n"
        )
        environment = os.environ | {VLLMS: str(tmp_path)}
        done = subprocess.run(
            [sys.executable, "-c", "from flux_vllm.metrics.directory import *\n" + code],
            capture_output=True,
            text=True,
            check=True,
            env=environment,
        )
        assert "vllm_own_total 7.0" in done.stdout
        assert "flux_things_total 3.0" in done.stdout


class TestExit:
    def test_folder_goes_with_the_front_end(self) -> None:
        folder = Path(run("prepare_front_end(); print(metrics_directory())").stdout.strip())
        assert folder.name.startswith("flux-metrics-")
        assert not folder.exists()

    def test_forked_child_leaves_it(self) -> None:
        shown = run(
            "prepare_front_end()\n"
            "child = os.fork()\n"
            "if child == 0: sys.exit(0)\n"  # runs the inherited exit handlers
            "os.waitpid(child, 0)\n"
            "print(metrics_directory().is_dir(), metrics_directory())\n"
        ).stdout.split()
        assert shown[0] == "True"
        assert not Path(shown[1]).exists()

    def test_process_that_inherited_a_name_leaves_that_folder(
        self, tmp_path: Path, monkeypatch
    ) -> None:
        monkeypatch.setenv(OWN, str(tmp_path))
        run("prepare_front_end()")
        assert tmp_path.is_dir()

    def test_killed_front_ends_folder_goes_at_the_next_start(self) -> None:
        with serving() as former:
            prepare_front_end()
            assert former.is_dir()
        assert former.is_dir()
        folder = run("prepare_front_end(); print(metrics_directory().is_dir())").stdout
        assert folder.strip() == "True"
        assert not former.exists()
        assert metrics_directory().is_dir()  # ours, which lives

    def test_links_and_files_are_left(self, tmp_path: Path) -> None:
        (tmp_path / "kept").touch()
        link, file = (Path(tempfile.gettempdir(), f"flux-metrics-{name}") for name in ("a", "b"))
        link.symlink_to(tmp_path)
        file.touch()
        prepare_front_end()
        assert (tmp_path / "kept").exists()
        assert link.is_symlink()
        assert file.exists()
