"""When a rank leaves: a signal, the time limit with a lead from what phases took, what is worth finishing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a3po_megatron.files.run_folder import LEAD
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.run.stop import CAUTION, MARGIN_SECONDS, SIGNALS, Interrupt

pytestmark = pytest.mark.alone


class Now:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return Now()


def test_the_first_signal_is_remembered_however_many_come(now: Now, monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    interrupt, caught, deadline = Interrupt(now), list[int](), time.monotonic() + 60
    remember = interrupt._caught
    monkeypatch.setattr(interrupt, "_caught", lambda number, frame: (remember(number, frame), caught.append(number)))
    try:
        interrupt.install()
        assert interrupt.due("score") is None
        sent = [signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
        for number in sent:
            before = len(caught)
            os.kill(os.getpid(), number)
            while len(caught) == before and time.monotonic() < deadline:
                time.sleep(0.01)
        assert caught == sent
        assert interrupt.due("score") == "SIGUSR1"
        assert interrupt.due("score") == "SIGUSR1"
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_is_heard_while_the_main_thread_waits_in_a_call() -> None:
    """So that the time until KILL is counted from TERM, not from when the wait is over."""
    code = (
        "import os, signal, threading, time\n"
        "from a3po_megatron.run.stop import INTERRUPT\n"
        "INTERRUPT.install()\n"
        "start = time.monotonic()\n"
        "threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()\n"
        "time.sleep(2.0)\n"
        "print(INTERRUPT._killed - 30 - start)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert 0.1 < float(done.stdout) < 1.5


RANK_AND_HELPERS = """
import multiprocessing, os, signal, subprocess, sys, threading, time
from multiprocessing import resource_tracker
if sys.argv[1] == "blocked":
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1, signal.SIGTERM, signal.SIGINT])
from a3po_megatron.run.stop import INTERRUPT, SIGNALS
INTERRUPT.install()
from a3po_megatron.compat import python
python.keep_mask()
resource_tracker.ensure_running()  # unblocks TERM and INT in the thread that starts it, unless it is kept from it
helpers = []
def help():
    helpers.append(subprocess.Popen([sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
                                    stdout=subprocess.PIPE))
help()
thread = threading.Thread(target=help)
thread.start(), thread.join()
process = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(60,))
process.start()
for helper in helpers:
    helper.stdout.readline()
for number in SIGNALS:
    for pid in [*(helper.pid for helper in helpers), process.pid, os.getpid()]:
        os.kill(pid, number)
deadline = time.monotonic() + 30
while INTERRUPT.signal is None and time.monotonic() < deadline:
    time.sleep(0.01)
time.sleep(0.3)
print(INTERRUPT.signal, [helper.poll() for helper in helpers], process.exitcode)
for helper in helpers:
    helper.kill()
process.kill()
"""


@pytest.mark.parametrize("parent", ["blocked", "open"])
def test_what_a_rank_starts_does_not_die_of_signals_that_are_meant_for_the_run_and_the_rank_hears_them(
    parent: str,
) -> None:
    """Slurm and terminals signal all processes of a job; here the rank, two plain children, one of multiprocessing."""
    command = [sys.executable, "-c", RANK_AND_HELPERS, parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    heard, rest = done.stdout.split(" ", 1)
    assert heard in {number.name for number in SIGNALS}, done.stderr
    assert rest == "[None, None] None\n"


def test_the_lead_before_the_time_limit_is_what_lies_ahead_and_a_save_took_so_far(now: Now) -> None:
    interrupt = Interrupt(now)
    interrupt.limit(1000.0, elapsed=50.0)  # at 1050
    for took in (8.0, 20.0, 10.0):
        interrupt.observe({"update": took, "publish": 2.0, "save": took / 10})
    lead = CAUTION * (20.0 + 2.0 + 2.0) + MARGIN_SECONDS
    for seconds, due in ((1050 - lead - 0.1, None), (1050 - lead + 0.1, "the time limit")):
        now.seconds = seconds
        assert interrupt.due("update", "publish") == due
    now.seconds = 1050 - lead + 0.1
    assert interrupt.due("score") is None  # a shorter way to the next place where it can leave
    for _ in range(5):
        interrupt.observe({"update": 1.0, "publish": 1.0, "save": 0.1})  # what was long ago is forgotten
    assert interrupt.due("update", "publish") is None


def test_the_end_of_a_slurm_job_is_a_time_limit_too_and_the_earlier_one_counts(
    now: Now, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 500))
    interrupt = Interrupt(now)
    interrupt.limit(None, elapsed=0.0)
    now.seconds = 600 - MARGIN_SECONDS - 3
    assert interrupt.due() is None
    now.seconds = 600 - MARGIN_SECONDS + 3
    assert interrupt.due() == "the time limit"
    interrupt.limit(10_000.0, elapsed=0.0)
    assert interrupt.due() is None
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time()) + 1))
    interrupt.limit(10_000.0, elapsed=0.0)
    assert interrupt.due() == "the time limit"


def test_a_rollout_is_finished_only_if_what_is_left_of_it_is_less_than_what_leaving_would_lose(now: Now) -> None:
    interrupt = Interrupt(now)
    assert not interrupt.worth_finishing("rollout", 5.0, 5.0)  # nobody knows how long it takes
    interrupt.observe({"rollout": 40.0, "score": 4.0, "save": 2.0})
    assert not interrupt.worth_finishing("rollout", 15.0, 15.0)
    assert interrupt.worth_finishing("rollout", 25.0, 25.0)
    assert not interrupt.worth_finishing("rollout", 25.0, 10.0)  # 15 s of an earlier round are safe
    assert not interrupt.worth_finishing("rollout", 41.0, 41.0)  # longer than ever: nobody knows how long it will take
    interrupt.limit(20.0, elapsed=0.0)
    assert not interrupt.worth_finishing("rollout", 25.0, 25.0)  # 15 s more, with caution, and a save: more than 20 s
    assert interrupt.worth_finishing("rollout", 34.0, 34.0)  # 1.5 × (6 + 2) + 3 s
    assert not interrupt.worth_finishing("rollout", 34.0, 34.0, "score")  # 1.5 × (6 + 4 + 2) + 3 s


def test_between_term_and_kill_only_what_fits_into_slurms_shortest_wait_is_finished(now: Now) -> None:
    interrupt = Interrupt(now)
    interrupt.observe({"rollout": 100.0, "save": 2.0})
    assert interrupt.worth_finishing("rollout", 60.0, 60.0)
    interrupt._caught(signal.SIGUSR1, None)  # a request, with whatever limit there is
    assert interrupt.worth_finishing("rollout", 60.0, 60.0)
    interrupt._caught(signal.SIGTERM, None)
    assert not interrupt.worth_finishing("rollout", 60.0, 60.0)
    assert interrupt.worth_finishing("rollout", 90.0, 90.0)  # 1.5 × (10 + 2) + 3 s of 30
    now.seconds += 15.0
    interrupt._caught(signal.SIGTERM, None)  # once more changes nothing
    assert not interrupt.worth_finishing("rollout", 90.0, 90.0)


def test_while_a_save_is_being_written_leaving_takes_two(now: Now) -> None:
    interrupt = Interrupt(now)
    interrupt.observe({"save": 10.0})
    assert interrupt.lead() == CAUTION * 10.0 + MARGIN_SECONDS
    interrupt.saves = 2
    assert interrupt.lead() == CAUTION * 20.0 + MARGIN_SECONDS


def test_what_a_start_measured_is_known_to_the_next_one_and_the_lead_is_that_of_the_longer_way(
    now: Now, tmp_path: Path
) -> None:
    interrupt = Interrupt(now)
    interrupt.observe({"reward": 9.0, "score": 4.0, "update": 5.0, "publish": 1.0, "save": 2.0})
    interrupt.save(tmp_path, AtOnce())
    assert (tmp_path / LEAD).read_text().splitlines()[0] == f"{CAUTION * 15.0 + MARGIN_SECONDS:.0f}"
    again = Interrupt(now)
    again.recall(tmp_path)
    for phases in (("reward", "score"), ("update", "publish")):
        assert again.lead(*phases) == interrupt.lead(*phases)
    for torn in ("", "12", "12\n", "12\n{", "12\n[1]", '12\n{"update": null}'):
        (tmp_path / LEAD).write_text(torn)
        untold = Interrupt(now)
        untold.recall(tmp_path)
        assert untold.lead("update") == MARGIN_SECONDS
