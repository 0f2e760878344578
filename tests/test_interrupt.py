"""When a rank leaves: a signal, the time limit with a lead from what phases took, what is worth finishing."""

from __future__ import annotations

import os
import signal
import time

import pytest

from a3po_megatron.checkpoint.interrupt import CAUTION, MARGIN_SECONDS, SIGNALS, Interrupt


class Now:
    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    return Now()


def test_a_signal_is_remembered_and_may_come_any_number_of_times(now: Now) -> None:
    before = {number: signal.getsignal(number) for number in SIGNALS}
    interrupt = Interrupt(now)
    try:
        interrupt.install()
        assert interrupt.due("score") is None
        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert interrupt.due("score") == "SIGUSR1"
        assert interrupt.due("score") == "SIGUSR1"
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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
    assert not interrupt.worth_finishing("rollout", 5.0)  # nobody knows how long it takes
    interrupt.observe({"rollout": 40.0, "save": 2.0})
    assert not interrupt.worth_finishing("rollout", 15.0)
    assert interrupt.worth_finishing("rollout", 25.0)
    assert not interrupt.worth_finishing("rollout", 41.0)  # longer than ever: nobody knows how long it will take
    interrupt.limit(20.0, elapsed=0.0)
    assert not interrupt.worth_finishing("rollout", 25.0)  # 15 s more, with caution, and a save do not fit into 20 s
    assert interrupt.worth_finishing("rollout", 39.0)
