"""A run that stands still ends by itself, resumably, and says which rank stood still where."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from a3po_megatron.config import TelemetryOptions
from a3po_megatron.launch.local import free_port
from a3po_megatron.telemetry.beats import Beat, read_beats
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog, stalled
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


class Stores:
    """One store in this process, with what the watchdog uses of torch's."""

    def __init__(self) -> None:
        self.held: dict[str, bytes] = {}

    def set(self, key: str, value: str) -> None:
        self.held[key] = value.encode()

    def add(self, key: str, value: int) -> int:
        self.set(key, str(int(self.held.get(key, b"0")) + value))
        return int(self.held[key])

    def append(self, key: str, value: str) -> None:
        self.held[key] = self.held.get(key, b"") + value.encode()

    def get(self, key: str) -> bytes:
        return self.held[key]

    def check(self, keys: list[str]) -> bool:
        return all(key in self.held for key in keys)

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.held[key] for key in keys]

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.held.get(key, b"") == expected.encode():
            self.set(key, desired)
        return self.held[key]


def test_of_each_node_one_file_says_where_its_ranks_are_and_how_far_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (logs := tmp_path / "logs").mkdir()
    store, clocks = Stores(), [Clock() for _ in range(4)]
    dogs = [Watchdog(tmp_path, rank, 5, FAST, clock, print) for rank, clock in enumerate(clocks)]
    beats = []
    for rank, dog in enumerate(dogs):
        monkeypatch.setenv("SLURMD_NODENAME", f"h/{rank // 2}")
        beats.append(dog.beats_over(store))
        clocks[rank].begin(4)
    with clocks[0].phase("reward"):
        pass
    with clocks[1].phase("reward"):
        for _ in range(2):
            for each in beats:
                each.round()
                each.write()
    assert sorted(path.name for path in logs.iterdir()) == ["node-h_0.beat", "node-h_1.beat"]
    found = {rank: beat for rank, (beat, _) in read_beats(logs).items()}
    assert list(found) == [0, 1, 2, 3]  # one has not even begun
    assert [found[rank].count for rank in range(4)] == [2, 1, 2, 1]  # as the first of each node heard it
    assert found[1].place == "phase reward of step 4" and found[1].changes < found[0].changes
    (logs / "node-h_1.beat").write_text("rank 3 bea")  # cut off
    assert list(read_beats(logs)) == [0, 1]


STUCK = """
import os, sys, threading, time
from datetime import timedelta
from pathlib import Path
from torch.distributed import PrefixStore, TCPStore
from a3po_megatron.config import TelemetryOptions
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog

def say(*words):
    print(*words, flush=True)  # the process ends without cleaning up

def waits_for_ever(lock):
    lock.acquire()

folder, rank, port = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
store = TCPStore("127.0.0.1", port, 2, rank == 0, timedelta(seconds=60), wait_for_workers=False)
clock = Clock()
dog = Watchdog(folder, rank, 2, TelemetryOptions(stall_seconds=1.0, stall_factor=2.0), clock, say)
dog.meet(PrefixStore("beats", store.clone()))
store.add("met", 1)
while store.add("met", 0) < 2:
    time.sleep(0.05)
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


def two_ranks(folder: Path, script: str) -> list[subprocess.Popen[bytes]]:
    (folder / "logs").mkdir()
    port = str(free_port())
    return [
        subprocess.Popen([sys.executable, "-c", script, str(folder), str(rank), port], cwd=ROOT, stdout=subprocess.PIPE)
        for rank in range(2)
    ]


def test_two_ranks_that_stand_still_end_with_85_name_the_one_behind_and_leave_the_stacks_of_both(
    tmp_path: Path,
) -> None:
    ranks = two_ranks(tmp_path, STUCK)
    begun = time.monotonic()
    for rank, process in enumerate(ranks):
        assert process.wait(60) == 85
        assert process.stdout is not None
        words = process.stdout.read().decode()
        assert words.startswith("interrupted rank 1 (phase score of step 7; no progress for ")
        assert "waits_for_ever" in (tmp_path / "logs" / f"rank-{rank}.stacks").read_text()
    assert time.monotonic() - begun < 50


WORKS = """
def at_work(rank, clock, lock):
    \"\"\"Rank 0 waits, as in a collective; rank 1 is behind it and gets on.\"\"\"
    while rank == 0 or not time.sleep(0.1):
        if rank == 0:
            time.sleep(60)
        clock.beat()

"""


def test_a_rank_that_waits_for_one_that_is_slow_but_at_work_ends_nothing(tmp_path: Path) -> None:
    script = STUCK.replace("    lock.acquire()\n    waits_for_ever(lock)\n", "    at_work(rank, clock, lock)\n")
    ranks = two_ranks(tmp_path, WORKS + script)
    try:
        deadline = time.monotonic() + 60
        while 0 not in (found := read_beats(tmp_path / "logs")) or found[0][0].silence < 6:  # its limit is 1 s
            assert time.monotonic() < deadline
            time.sleep(0.1)
        assert [process.poll() for process in ranks] == [None, None]
        assert found[0][0].silence > found[0][0].limit  # it is beyond its limit, and knows better
    finally:
        for process in ranks:
            process.kill()
            process.wait()


def test_two_ranks_whose_store_is_gone_with_rank_0_end_with_85_and_say_so(tmp_path: Path) -> None:
    ranks = two_ranks(tmp_path, STUCK.replace("stall_seconds=1.0", "stall_seconds=2.0"))
    while not list((tmp_path / "logs").glob("node-*.beat")):
        time.sleep(0.02)
    time.sleep(1)
    ranks[0].send_signal(signal.SIGSTOP)  # a node that froze: no connection breaks
    try:
        assert ranks[1].wait(60) == 85
    finally:
        ranks[0].kill()
        ranks[0].wait()
    assert ranks[1].stdout is not None
    words = ranks[1].stdout.read().decode()
    assert "interrupted rank 0 (phase " in words and "no heartbeat: its store has not answered for " in words
    assert stalled(tmp_path / "logs") in words


def say(store: Stores, rank: int, count: int, changes: int, silence: float = 0.1) -> None:
    store.set(f"{rank}", Beat(rank, count, silence, 8.0, changes, "phase update of step 3").line())


def test_a_heartbeat_is_missed_when_its_counter_stands_still(tmp_path: Path, times: list[float]) -> None:
    (tmp_path / "logs").mkdir()
    store = Stores()
    dog = Watchdog(tmp_path, 0, 3, FAST, Clock(), print)
    beats = dog.beats_over(store)
    said = []
    for number in range(60):  # 15 s
        times.append(number * dog.period)
        say(store, 1, number, 10)  # both are ahead of rank 0, which waits for them
        say(store, 2, 3, 10)
        beats.round()
        said.append(dog.look(beats))
    assert dog.limit() == 8.0
    assert not any(said[: int(8.0 / dog.period) + 1])
    assert said[int(8.0 / dog.period) + 1].startswith("rank 2 (phase update of step 3; no heartbeat) stood still")


def test_a_rank_that_never_came_is_named_and_one_that_is_late_and_at_work_is_not(
    tmp_path: Path, times: list[float]
) -> None:
    (tmp_path / "logs").mkdir()
    for missing in (True, False):
        store, clock = Stores(), Clock()
        dog = Watchdog(tmp_path, 0, 3, FAST, clock, print)
        beats, said, begun = dog.beats_over(store), [], times[-1]
        for number in range(60):
            times.append(begun + number * dog.period)
            say(store, 1, number, 50)
            if not missing:
                say(store, 2, number, 0)
            beats.round()
            said.append(dog.look(beats))
        words = next(filter(None, said), None)
        assert (words or "").startswith("rank 2 (phase start-up; no heartbeat) stood still") == missing


LEFT = """
import sys, time
from datetime import timedelta
from pathlib import Path
from torch.distributed import PrefixStore, TCPStore
from a3po_megatron.config import TelemetryOptions
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.watchdog import Watchdog

def say(*words):
    print(*words, flush=True)

store = TCPStore("127.0.0.1", 0, 1, True, timedelta(seconds=60), wait_for_workers=False)
dog = Watchdog(Path(sys.argv[1]), 0, 1, TelemetryOptions(stall_seconds=1.0, stall_factor=2.0), Clock(), say)
dog.meet(PrefixStore("beats", store.clone()))
say("watches")
sys.stdin.readline()
PrefixStore("beats", store).set("stall", "rank 1 stood still, again")
time.sleep(60)
"""


def test_what_an_earlier_start_left_does_not_end_a_run_and_what_a_rank_says_now_does(tmp_path: Path) -> None:
    stall = tmp_path / "logs" / "stall"
    stall.parent.mkdir()
    stall.write_text("rank 1 stood still, once")
    rank = subprocess.Popen(
        [sys.executable, "-c", LEFT, str(tmp_path)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    )
    try:
        assert rank.stdout is not None and rank.stdin is not None
        assert rank.stdout.readline() == "watches\n"
        time.sleep(0.5)  # four looks
        assert rank.poll() is None
        rank.stdin.write("\n")
        rank.stdin.flush()
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
