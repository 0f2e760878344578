"""What is sent to the launcher. Imports nothing heavy: it is there before anything else of `a3po train` is."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterable
from pathlib import Path

from ..errors import Interrupted
from ..ranks.handoff import VARIABLES
from ..run.stop import SIGNALS

REPEAT_SECONDS = 1.0  # a rank that is only just starting does not hear a signal yet
KEPT = VARIABLES["signalled"]


def ignore() -> None:
    """Between fork and exec: until the child can hear the signals, which are repeated, it must not die of them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


class Signals:
    """What was sent to the launcher: caught from its first moment on, so that it always ends with 85."""

    def __init__(self) -> None:
        name = os.environ.pop(KEPT, None)
        self.number: int | None = signal.Signals[name] if name else None
        self.at_once = False
        self._repeated = 0.0
        self._before = {number: signal.signal(number, self._caught) for number in SIGNALS}

    def _caught(self, number: int, _: object) -> None:
        self.at_once |= number == signal.SIGINT and self.number == signal.SIGINT
        self.number = self.number or number

    def check(self, folder: Path) -> None:
        """Raises Interrupted if one came before any rank was started."""
        if self.number is not None:
            raise Interrupted(
                f"{folder}: interrupted by {signal.Signals(self.number).name} before it started; the same command "
                "starts it"
            )

    def pass_on(self, processes: Iterable[subprocess.Popen[bytes]], always: int | None = None) -> None:
        """To every process, again and again: to get it twice changes nothing, to miss it would.

        `always`: whatever came, send this; to srun TERM and INT would mean something else than "tell the ranks".
        """
        if self.number is not None and time.monotonic() - self._repeated >= REPEAT_SECONDS:
            self._repeated = time.monotonic()
            for each in processes:
                each.send_signal(always or self.number)  # does nothing to one that has ended

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
