"""The grader pool: every failure of grading hits exactly one item, and nothing outlives its owner."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3po_megatron.errors import RequestError, RunFailed
from a3po_megatron.reward import math
from a3po_megatron.reward.pool import GraderPool
from tests.harness import misbehaving_graders as graders

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[1]
TIMEOUT = 2.0
MEMORY = 1 << 30


@pytest.fixture(scope="module")
def pool() -> Iterator[GraderPool]:
    with GraderPool(graders.obey, workers=2, timeout_seconds=TIMEOUT, memory_bytes=MEMORY) as pool:
        yield pool


def gone(pid: int, seconds: float = 5.0) -> bool:
    """True once the process has ended; a zombie that nobody reaps counts as ended."""
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.02)
    return False


def ordinary(count: int) -> list[tuple[str, str]]:
    return [(str(i), str(i if i % 3 else -1)) for i in range(count)]


def expected(count: int) -> list[str]:
    return ["correct" if i % 3 else "wrong" for i in range(count)]


def all_ready(pool: GraderPool) -> list[int]:
    """The pids of the pool's workers once each has graded something; after a failure one may still be starting."""
    for _ in range(100):
        pids = {int(v.reason) for v in pool.grade_all([("sleep 0.1", "")] * 4)}
        if len(pids) == 2:
            return sorted(pids)
    raise AssertionError("the second worker never came")


def test_verdicts_come_in_the_order_of_the_items(pool: GraderPool) -> None:
    assert [v.outcome for v in pool.grade_all(ordinary(1000))] == expected(1000)
    assert pool.grade_all([]) == []


@pytest.mark.parametrize(
    ("command", "outcome", "reason"),
    [
        ("kill", "invalid", "grader worker was killed (signal 9)"),
        ("exit 3", "invalid", "grader worker exited with code 3"),
        ("hang", "wrong", "it takes more than 2.0 s to grade (grader_pool.timeout_seconds)"),
        ("busy", "wrong", "it takes more than 2.0 s to grade (grader_pool.timeout_seconds)"),
        ("eat", "wrong", f"it takes more than {MEMORY} bytes to grade (grader_pool.memory_bytes)"),
        ("raise", "invalid", "grader raised KeyError: 'no such thing'"),
        ("garbage", "invalid", "grader returned str, not a Verdict"),
    ],
)
def test_a_failure_of_grading_is_invalid_and_what_is_too_costly_wrong_for_its_item_alone(
    pool: GraderPool, command: str, outcome: str, reason: str
) -> None:
    items = ordinary(200)
    items[17] = (command, "x")  # in the middle of a list that one worker was given at once
    begin = time.monotonic()
    verdicts = pool.grade_all(items)
    assert (verdicts[17].outcome, verdicts[17].reason) == (outcome, reason)
    assert [v.outcome for i, v in enumerate(verdicts) if i != 17] == [o for i, o in enumerate(expected(200)) if i != 17]
    assert time.monotonic() - begin < TIMEOUT + 5


def test_many_failures_in_one_call_are_each_attributed_and_the_pool_stays_usable(pool: GraderPool) -> None:
    items = ordinary(60)
    bad = {0: "kill", 1: "kill", 20: "exit 4", 41: "eat", 59: "kill"}
    for index, command in bad.items():
        items[index] = (command, "x")
    outcomes = [v.outcome for v in pool.grade_all(items)]
    failed = {index: "wrong" if command == "eat" else "invalid" for index, command in bad.items()}
    assert outcomes == [failed.get(index, outcome) for index, outcome in enumerate(expected(60))]
    assert [v.outcome for v in pool.grade_all(ordinary(60))] == expected(60)


def test_a_worker_killed_from_outside_is_noticed_at_once_and_costs_one_item(pool: GraderPool) -> None:
    pids = all_ready(pool)

    def shoot() -> None:
        time.sleep(0.4)
        for pid in pids:
            os.kill(pid, signal.SIGKILL)

    thread = threading.Thread(target=shoot)
    thread.start()
    begin = time.monotonic()
    verdicts = pool.grade_all([("sleep 1.5", ""), ("sleep 1.5", ""), ("a", "a"), ("b", "c")])
    thread.join()
    assert [v.outcome for v in verdicts] == ["invalid", "invalid", "correct", "wrong"]
    assert {v.reason for v in verdicts[:2]} == {"grader worker was killed (signal 9)"}
    assert time.monotonic() - begin < 1.4 + 4  # far from twice the time limit: nobody waited for it
    assert all(gone(pid) for pid in pids)


def test_a_worker_found_dead_between_calls_costs_no_item(pool: GraderPool) -> None:
    for pid in all_ready(pool):
        os.kill(pid, signal.SIGKILL)
    assert [v.outcome for v in pool.grade_all(ordinary(40))] == expected(40)


def test_a_stopped_worker_is_replaced_after_the_time_limit(pool: GraderPool) -> None:
    stopped = all_ready(pool)
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert [v.outcome for v in pool.grade_all(ordinary(40))] == expected(40)  # nothing was being graded
    assert all(gone(pid) for pid in stopped)


def test_signals_to_the_whole_job_do_not_end_grading(pool: GraderPool) -> None:
    assert [v.outcome for v in pool.grade_all([("signal", "signal"), ("a", "a")])] == ["correct", "correct"]


def test_the_time_limit_is_per_item_and_not_per_call(pool: GraderPool) -> None:
    all_ready(pool)
    verdicts = pool.grade_all([("sleep 0.8", "")] * 12)  # three to a list: 2.4 s
    assert [v.outcome for v in verdicts] == ["correct"] * 12
    assert len({v.reason for v in verdicts}) == 2  # both workers took part


def test_what_a_grader_started_dies_with_it(pool: GraderPool, tmp_path: Path) -> None:
    file = tmp_path / "pid"
    assert pool.grade_all([(f"spawn {file}", "")])[0].reason.startswith("it takes more than 2.0 s")
    assert gone(int(file.read_text()))


def test_responses_of_a_megabyte_and_lone_surrogates_pass(pool: GraderPool) -> None:
    texts = ["x" * 3_000_000, "\ud83d half a character", "\x00", "naïve ½ 数"]
    assert [v.outcome for v in pool.grade_all([(text, text) for text in texts])] == ["correct"] * len(texts)


def test_trivial_items_cost_less_than_a_millisecond_each(pool: GraderPool) -> None:
    pool.grade_all(ordinary(10))
    best = min(_seconds(pool, ordinary(4000)) for _ in range(3))
    print(f"{best / 4000 * 1000:.3f} ms an item")
    assert best / 4000 < 1e-3


def _seconds(pool: GraderPool, items: list[tuple[str, str]]) -> float:
    begin = time.perf_counter()
    pool.grade_all(items)
    return time.perf_counter() - begin


def test_workers_use_one_thread_see_no_gpu_and_load_nothing_heavy(pool: GraderPool) -> None:
    items = [("environment OMP_NUM_THREADS", ""), ("environment CUDA_VISIBLE_DEVICES", ""), ("modules", "")]
    assert [v.reason for v in pool.grade_all(items)] == ["1", "", ""]


def test_calls_from_several_threads_take_turns(pool: GraderPool) -> None:
    results: dict[int, list[str]] = {}

    def call(number: int) -> None:
        results[number] = [v.outcome for v in pool.grade_all(ordinary(50 + number))]

    threads = [threading.Thread(target=call, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {n: expected(50 + n) for n in range(4)}


def test_start_returns_at_once_and_close_ends_every_process() -> None:
    begin = time.monotonic()
    pool = GraderPool(functools.partial(graders.other, outcome="wrong"), 2, TIMEOUT, MEMORY)
    pool.start()
    assert time.monotonic() - begin < 0.5
    pids = [worker.process.pid for worker in pool._workers]
    assert len(pids) == 2
    assert pool.grade_all([("a", "a")])[0].outcome == "wrong"
    pool.close()
    pool.close()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)  # reaped, too
    with pytest.raises(RuntimeError, match="closed"):
        pool.grade_all([("a", "a")])


def test_workers_that_cannot_start_are_an_error_that_names_the_option() -> None:
    with (
        GraderPool(math.grade, 1, TIMEOUT, memory_bytes=32 << 20) as pool,  # sympy does not fit
        pytest.raises(RunFailed, match="grader_pool.memory_bytes"),
    ):
        pool.grade_all([("a", "a")])


def test_a_grader_that_workers_cannot_import_is_refused() -> None:
    with pytest.raises(RequestError, match="not importable"):
        GraderPool(lambda response, answer: graders.obey(response, answer), 1, TIMEOUT, MEMORY)


def run_script(folder: Path, body: str) -> subprocess.Popen[str]:
    script = folder / "script.py"
    script.write_text(textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


def test_workers_die_with_their_parent_even_while_they_grade(tmp_path: Path) -> None:
    script = run_script(
        tmp_path,
        """
        from a3po_megatron.reward.pool import GraderPool
        from tests.harness import misbehaving_graders as graders
        pool = GraderPool(graders.obey, 2, 60.0, 1 << 30)
        print(*{v.reason for v in pool.grade_all([("sleep 0.5", "")] * 2)}, flush=True)
        pool.grade_all([("busy", ""), ("hang", "")])
        """,
    )
    assert script.stdout is not None
    pids = [int(pid) for pid in script.stdout.readline().split()]
    assert pids
    time.sleep(0.5)
    script.kill()
    script.wait()
    script.stdout.close()
    assert all(gone(pid) for pid in pids)


def test_workers_do_not_run_the_main_script_again_and_refuse_its_functions(tmp_path: Path) -> None:
    script = run_script(
        tmp_path,
        """
        print("main runs", flush=True)  # no `if __name__` guard: multiprocessing's spawn would come back here
        from a3po_megatron.errors import RequestError
        from a3po_megatron.reward.pool import GraderPool
        from tests.harness import misbehaving_graders as graders
        with GraderPool(graders.obey, 1, 5.0, 1 << 30) as pool:
            print(pool.grade_all([("a", "a")])[0].outcome)
        def mine(response, answer): ...
        try:
            GraderPool(mine, 1, 5.0, 1 << 30)
        except RequestError as error:
            print("refused:", error)
        """,
    )
    out, _ = script.communicate(timeout=60)
    assert out.splitlines()[:2] == ["main runs", "correct"]
    assert out.splitlines()[2].startswith("refused:")
    assert len(out.splitlines()) == 3
