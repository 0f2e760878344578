"""A run that stands still ends by itself, resumably, and says which rank stood still where."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from a3po_megatron.config import TelemetryOptions
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog, position
from tests.harness.ranks import ROOT
from tests.test_launch import ended, rank_processes, start, wait_for_phase  # noqa: F401

pytestmark = pytest.mark.alone

FAST = TelemetryOptions(stall_seconds=2.0, stall_factor=3.0)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the clock reads: the last value of the list."""
    now = [0.0]
    monkeypatch.setattr("a3po_megatron.telemetry.clock.time.monotonic", lambda: now[-1])
    return now


def test_the_limit_of_a_phase_follows_from_its_own_longest_silence(tmp_path: Path, times: list[float]) -> None:
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 1, FAST, clock, print)
    assert dog.limit() == 8.0  # a phase that was never gone through: four times the least
    with clock.phase("update"):
        times.append(5.0)
        clock.beat()
        times.append(6.0)
    with clock.phase("score"):
        times.append(6.1)
    with clock.phase("update"):
        assert dog.limit() == 15.0  # three times the 5 s between two beats, not the 6 s of the phase
        times.append(20.0)
        assert clock.silence() == pytest.approx(13.9)
        assert clock.silence() < dog.limit()
    with clock.phase("score"):
        assert dog.limit() == 2.0


def test_ranks_that_others_wait_for_have_gone_through_fewer_phases(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    clocks = [Clock(), Clock()]
    for rank, clock in enumerate(clocks):
        clock.attach(tmp_path / "logs" / f"rank-{rank}.phase")
        clock.begin(4)
    with clocks[0].phase("reward"):
        pass
    with clocks[1].phase("reward"):
        assert position(tmp_path / "logs", 1) < position(tmp_path / "logs", 0)
        assert position(tmp_path / "logs", 1)[1] == "phase reward of step 4"
    assert position(tmp_path / "logs", 2) == (0, "phase start-up")  # has not even begun


STUCK = """
import sys, threading
from pathlib import Path
from a3po_megatron.config import TelemetryOptions
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog

def say(*words):
    print(*words, flush=True)  # the process ends without cleaning up

def waits_for_ever(lock):
    lock.acquire()

folder, rank = Path(sys.argv[1]), int(sys.argv[2])
clock = Clock()
clock.attach(folder / "logs" / f"rank-{rank}.phase")
Watchdog(folder, rank, 2, TelemetryOptions(stall_seconds=1.0, stall_factor=2.0), clock, say).start()
clock.begin(7)
lock = threading.Lock()
with clock.phase("score"):
    pass
if rank == 0:
    with clock.phase("reward"):
        pass
with clock.phase("score"):
    lock.acquire()
    waits_for_ever(lock)
"""


def test_two_ranks_that_stand_still_end_with_85_name_the_one_behind_and_leave_the_stacks_of_both(
    tmp_path: Path,
) -> None:
    (tmp_path / "logs").mkdir()
    ranks = [
        subprocess.Popen([sys.executable, "-c", STUCK, str(tmp_path), str(rank)], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(2)
    ]
    begun = time.monotonic()
    for rank, process in enumerate(ranks):
        assert process.wait(60) == 85
        assert process.stdout is not None
        words = process.stdout.read().decode()
        assert words.startswith("interrupted rank 1 (phase score of step 7; no progress for ")
        assert "waits_for_ever" in (tmp_path / "logs" / f"rank-{rank}.stacks").read_text()
    assert time.monotonic() - begun < 50


WORKS = """
import os, sys, time
from pathlib import Path

if sys.argv[2] == "1":  # on a node whose clock is an hour behind

    def replace(path, target):
        os.utime(path, (time.time() - 3600, time.time() - 3600))
        os.replace(path, target)

    Path.replace = replace

def at_work(rank, clock, lock):
    \"\"\"Rank 0 waits, as in a collective; rank 1 is behind it and gets on.\"\"\"
    while rank == 0 or not time.sleep(0.1):
        if rank == 0:
            time.sleep(60)
        clock.beat()

"""


def test_a_rank_that_waits_for_one_that_is_slow_but_at_work_ends_nothing(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    script = STUCK.replace("    lock.acquire()\n    waits_for_ever(lock)\n", "    at_work(rank, clock, lock)\n")
    ranks = [
        subprocess.Popen([sys.executable, "-c", WORKS + script, str(tmp_path), str(rank)], cwd=ROOT)
        for rank in range(2)
    ]
    try:
        time.sleep(10)  # ten times the limit of the waiting one
        assert [process.poll() for process in ranks] == [None, None]
        words = (tmp_path / "logs/rank-0.beat").read_text().split()
        assert float(words[1]) > float(words[4])  # it is beyond its limit, and knows better
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_a_heartbeat_is_missed_when_its_counter_stands_still_whatever_time_its_file_bears(
    tmp_path: Path, times: list[float]
) -> None:
    (logs := tmp_path / "logs").mkdir()
    clock = Clock()
    dog = Watchdog(tmp_path, 0, 3, FAST, clock, print)
    (logs / "rank-0.phase").write_text("3 update\nchanges 9\n")
    for rank in (1, 2):  # both are ahead of rank 0, which waits for them
        (logs / f"rank-{rank}.phase").write_text("3 update\nchanges 10\n")
    said = []
    for number in range(60):  # 15 s
        times.append(number * dog.period)
        (logs / "rank-1.beat").write_text(f"silent 0.1 s of 8.0 s, beat {number}\n")
        os.utime(logs / "rank-1.beat", (0, 0))
        (logs / "rank-2.beat").write_text("silent 0.1 s of 8.0 s, beat 3\n")  # the file server's clock goes on
        said.append(dog.look())
    assert dog.limit() == 8.0
    assert not any(said[: int(8.0 / dog.period) + 1])
    assert said[int(8.0 / dog.period) + 1].startswith("rank 2 (phase update of step 3; no heartbeat) stood still")


LEFT = """
import sys, time
from pathlib import Path
from a3po_megatron.config import TelemetryOptions
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog

def say(*words):
    print(*words, flush=True)

Watchdog(Path(sys.argv[1]), 0, 1, TelemetryOptions(stall_seconds=1.0, stall_factor=2.0), Clock(), say).start()
say("watches")
time.sleep(60)
"""


def test_what_an_earlier_start_left_or_what_cannot_be_read_does_not_end_a_run_nor_its_watch(tmp_path: Path) -> None:
    stall = tmp_path / "logs" / "stall"
    stall.parent.mkdir()
    stall.write_text("rank 1 stood still, once")
    rank = subprocess.Popen(
        [sys.executable, "-c", LEFT, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True, bufsize=1
    )
    try:
        assert rank.stdout is not None
        assert rank.stdout.readline() == "watches\n"
        time.sleep(0.5)  # four looks
        stall.rename(stall.with_suffix(".previous"))
        stall.mkdir()
        time.sleep(0.5)
        assert rank.poll() is None
        stall.rmdir()
        stall.write_text("rank 1 stood still, again")
        assert rank.wait(10) == 85
        assert rank.stdout.read() == "interrupted rank 1 stood still, again\n"
    finally:
        rank.kill()
        rank.wait()


@pytest.mark.soak  # that ranks which stand still end with 85 and are named is shown above of two processes
def test_a_run_one_rank_of_which_is_stopped_ends_with_85_and_names_it(
    tmp_path: Path,
    ended: list[subprocess.Popen[str]],  # noqa: F811
) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, "trainer.steps=500", "telemetry.stall_seconds=8")
    ended.append(launcher)
    wait_for_phase(folder, 1, ("update",))
    rank_processes(launcher)[1].send_signal(signal.SIGSTOP)
    errors: list[str] = []
    reader = threading.Thread(target=lambda: errors.append(launcher.communicate()[1]))
    reader.start()
    assert launcher.wait(120) == 85
    reader.join(10)
    assert "error: rank 1 (phase " in errors[0]
    assert "stood still" in errors[0]
    for rank in range(2):  # also of the stopped one
        assert "Thread 0x" in (folder / "logs" / f"rank-{rank}.stacks").read_text()
