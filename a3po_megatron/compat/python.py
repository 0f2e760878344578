"""CPython 3.11 and 3.12: what its standard library does to a process.

| what | symptom without it | cause |
|---|---|---|
| `keep_mask` | helpers that are started later die of a TERM or an INT that is meant for the run | `ResourceTracker.ensure_running` ends by unblocking both in the calling thread, whatever its mask was before (Lib/multiprocessing/resource_tracker.py) |
"""  # noqa: E501

from __future__ import annotations

import functools
import signal
from multiprocessing import resource_tracker
from typing import Any


def keep_mask() -> None:
    """Starting multiprocessing's resource tracker leaves the calling thread's signal mask as it was."""
    ensure_running = resource_tracker.ResourceTracker.ensure_running
    if hasattr(ensure_running, "__wrapped__"):
        return

    @functools.wraps(ensure_running)
    def with_mask(self: Any) -> Any:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
        try:
            return ensure_running(self)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    resource_tracker.ResourceTracker.ensure_running = with_mask  # type: ignore[method-assign]
    # The module has the bound method under a name of its own, by which it is called too.
    resource_tracker.ensure_running = resource_tracker._resource_tracker.ensure_running
