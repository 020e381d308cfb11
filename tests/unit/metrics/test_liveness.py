"""What is held stays, what nobody holds goes; a file that went meanwhile is not taken for held.

Oracle: the file system. The holder is a process of its own, ended by SIGKILL. Pinned: a link, a
pipe, or a file that was replaced between opening and locking.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from flux_vllm.metrics.liveness import hold, remove_ended

HOLD = (
    "import os, sys, time\n"
    "from pathlib import Path\n"
    "from flux_vllm.metrics.liveness import hold\n"
    "path = Path(sys.argv[1])\n"
    "print(hold(os.open(path, os.O_RDONLY), path), flush=True)\n"
    "time.sleep(600)\n"
)


@pytest.fixture(params=["file", "folder"])
def path(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / "held"
    if request.param == "file":
        path.write_text("counts")
    else:
        path.mkdir()
        (path / "inner").write_text("counts")
    return path


def test_remove_ended_leaves_what_lives(path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "True\n"
        remove_ended(path)
        assert path.exists()
        holder.kill()
    remove_ended(path)
    assert not path.exists()


def test_remove_ended_of_nothing(tmp_path: Path) -> None:
    remove_ended(tmp_path / "nothing")


def test_remove_ended_follows_no_link(tmp_path: Path, path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(path)
    with pytest.raises(OSError, match="link"):
        remove_ended(link)
    assert path.exists()


def test_remove_ended_waits_for_no_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    remove_ended(tmp_path / "pipe")
    assert not (tmp_path / "pipe").exists()


def test_hold_tells_that_the_file_went(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with path.open("ab") as file:
        path.unlink()
        assert not hold(file.fileno(), path)
        path.touch()  # another file of this name
        assert not hold(file.fileno(), path)
    with path.open("ab") as file:
        assert hold(file.fileno(), path)
