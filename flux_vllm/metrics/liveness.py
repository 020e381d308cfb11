"""Locks that tell what a living process left on disk from what a dead one did.

The kernel frees a lock however its process ends. A process id in a name would not do: ids are used
again, and mean something else in another container.
"""

import fcntl
import os
import shutil
import stat
from contextlib import suppress
from pathlib import Path

_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # no link, and no wait for a pipe's writer


def hold(descriptor: int, path: Path) -> bool:
    """Lock an open file or folder, until its descriptor closes.

    Args:
        descriptor: open on `path`.
        path: its name.

    Returns: whether it is still there; False if `remove_ended` was faster.
    """
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(descriptor), path.stat())
    return False


def remove_ended(path: Path) -> None:
    """Remove a file or folder that no living process holds.

    Raises: PermissionError: it is held by nobody, and this user may not remove it.
    """
    try:
        descriptor = os.open(path, _FLAGS)
    except FileNotFoundError:
        return
    try:
        # Shared, as readers of a journal lock: none of us takes another for the owner.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        # Still locked here, so that nobody begins to hold what is about to go.
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    except BlockingIOError:
        pass
    finally:
        os.close(descriptor)
