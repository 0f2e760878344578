"""The one lock: `flock` of an open file or folder.

It belongs to the processes that hold the file open, not to something that they could leave behind: what a killed
process held is free as soon as the last one that inherited it is gone.
"""

from __future__ import annotations

import fcntl
import math
import time
from pathlib import Path
from typing import IO, Any

from ..errors import RequestError
from .run_folder import RunFolder

POLL_SECONDS = 0.1


def take(file: IO[Any] | int, seconds: float = math.inf) -> None:
    """Locks an open file, waiting for it for so long.

    Raises BlockingIOError if another process has it even then, and another OSError where the file system has no locks.
    """
    if seconds == math.inf:
        fcntl.flock(file, fcntl.LOCK_EX)
        return
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(POLL_SECONDS)


def hold(folder: Path, seconds: float = 0.0, advice: str = "choose another --run-dir") -> IO[str]:
    """Returns the lock of an existing run folder: nobody else can have it while this file is open.

    Waits for it for so long; raises RequestError if a run is live in the folder even then, or it cannot be locked.
    """
    path = RunFolder(folder).lock
    try:
        lock = path.open("a")
    except OSError as error:
        raise RequestError(f"{path}: cannot open it: {error.strerror}") from error
    try:
        take(lock, seconds)
        return lock
    except BlockingIOError as error:
        lock.close()
        raise RequestError(f"{folder}: a run is live in this folder; {advice}") from error
    except OSError as error:
        lock.close()
        raise RequestError(
            f"{folder}: its file system has no locks ({error.strerror}), and two runs must not write into one "
            "folder: mount it with them (Lustre: -o flock), or choose a --run-dir elsewhere"
        ) from error


def is_live(folder: Path) -> bool | None:
    """Says whether a run holds the folder's lock; None: this file system cannot say."""
    try:
        with RunFolder(folder).lock.open() as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two that look do not see each other
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
