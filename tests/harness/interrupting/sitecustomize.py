"""Put first on PYTHONPATH, this hits a training run with a signal at one exact point, as
tests/harness/interrupted_runs.py asks.

Where A3PO_TEST_DRAWS is 1, every random stream of a rank is drawn from in every update, as dropout would. Where
A3PO_TEST_CLOCK is set, the clock on the wall is set back by so many seconds when step 3 begins.

Python imports a module of this name at every start. Polling a run from outside would miss phases of milliseconds; here
the rank itself sends the signal in the moment in which it announces the phase. A3PO_TEST_INTERRUPT holds the point:

    {"rank": 1, "step": 2, "phase": "update", "nth": 1,   the n-th announcement of this phase in this step, on this rank
     "signal": "SIGUSR1", "to": "rank",                   or "launcher", "all": every rank and the launcher at once,
                                                          "family": these and all that ranks have started, as srun does
     "times": 1, "delay": 0.0,                            so often; so many seconds later, to hit the middle of a phase
     "file": ["before", "rename", "step-000004"],         or null; not the phase but this call of `os` on such a path
     "marker": "/…/fired"}                                written when it fires: once it is there, nothing fires again
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

RANK_PROGRAM = "a3po_megatron.train"
GAP_SECONDS = 0.03  # between signals that come several times


def is_rank() -> bool:
    """Whether this process is a rank; workers that it starts inherit RANK and import this module too."""
    words = sys.orig_argv  # sys.argv does not know the module yet
    return "RANK" in os.environ and "-m" in words and words[words.index("-m") + 1 :][:1] == [RANK_PROGRAM]


def children() -> dict[int, list[int]]:
    """Process id → those of what it started and what is still there."""
    found: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):  # processes end while one looks at them
                parent = int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1])
                found.setdefault(parent, []).append(int(entry.name))
    return found


def ranks_of(launcher: int) -> list[int]:
    """The process ids of all ranks that a launcher started."""
    found = []
    for process in children().get(launcher, []):
        with contextlib.suppress(OSError):
            if RANK_PROGRAM.encode() in Path(f"/proc/{process}/cmdline").read_bytes().split(b"\0"):
                found.append(process)
    return found


def family_of(process: int) -> list[int]:
    """It and all that descends from it."""
    tree, found = children(), [process]
    for each in found:
        found += tree.get(each, [])
    return found


def install(point: dict[str, Any]) -> None:
    from a3po_megatron.telemetry.clock import Clock  # imports nothing heavy

    me, launcher, announce, seen = os.getpid(), os.getppid(), Clock._announce, 0

    def targets() -> list[int]:
        if point["to"] == "rank":
            return [me]
        if point["to"] == "launcher":
            return [launcher]
        if point["to"] == "family":
            return [each for each in family_of(launcher) if each != me] + [me]
        # The launcher first, lest it finds dead ranks and says so; this process last, or nobody sends the rest.
        return [launcher, *(rank for rank in ranks_of(launcher) if rank != me), me]

    def send() -> None:
        time.sleep(point["delay"])
        hit = targets()
        with contextlib.suppress(FileExistsError), open(point["marker"], "x") as marker:
            marker.write(json.dumps({"targets": hit, **point}))
            marker.flush()
            for number in range(point["times"]):
                if number:
                    time.sleep(GAP_SECONDS)
                for process in hit:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process, signal.Signals[point["signal"]])

    def announce_and_hit(clock: Clock) -> None:
        nonlocal seen
        announce(clock)
        if os.getpid() != me or (clock.step, clock._stack[-1]) != (point["step"], point["phase"]):
            return  # a forked child's phases are not this rank's
        seen += 1
        if seen == point["nth"]:
            if point["delay"] or point["times"] > 1:
                threading.Thread(target=send, daemon=True).start()
            else:
                send()

    if point["file"] is None:
        Clock._announce = announce_and_hit
        return
    when, name, part = point["file"]
    call = getattr(os, name)

    def call_and_hit(*paths: Any, **more: Any) -> Any:
        mine = os.getpid() == me and str(paths[-1]).endswith(part)
        if mine and when == "before":
            send()
        result = call(*paths, **more)
        if mine and when == "after":
            send()
        return result

    setattr(os, name, call_and_hit)


def install_clock(seconds: float) -> None:
    from a3po_megatron.telemetry.clock import CLOCK, Clock

    begin, now = Clock.begin, time.time

    def begin_and_set(clock: Clock, step: int) -> None:
        if clock is CLOCK and step == 3:
            time.time = lambda: now() - seconds
        begin(clock, step)

    Clock.begin = begin_and_set


if is_rank() and "A3PO_TEST_CLOCK" in os.environ:
    install_clock(float(os.environ["A3PO_TEST_CLOCK"]))
if is_rank() and os.environ.get("A3PO_TEST_DRAWS") == "1":
    from draws import install_draws  # beside this file

    install_draws()
if is_rank() and "A3PO_TEST_INTERRUPT" in os.environ:
    wanted = json.loads(os.environ["A3PO_TEST_INTERRUPT"])
    if int(os.environ["RANK"]) == wanted["rank"] and not Path(wanted["marker"]).exists():
        install(wanted)
