"""Runs that leave because time is up, or are killed while they start; both go on as if nothing had been."""

from __future__ import annotations

import contextlib
import json
import signal
import time
from pathlib import Path

import psutil
import pytest

from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import INTERRUPTED, LAYOUTS, STEPS, Ended, Interrupt, Launched

pytestmark = [pytest.mark.soak, pytest.mark.alone]

TP2 = LAYOUTS["tp2"]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.uninterrupted("tp2", tmp_path_factory)


@pytest.fixture
def limit(whole: Path) -> float:
    """Seconds that a start surely takes less than, on this machine as it is now; a few more than it took before."""
    return 15.0 + 2.0 * max(row["startup/seconds"] for row in tools.rows_of(whole))


def holding_still_until_shortly_before(end: float, folder: Path, *overrides: str) -> Ended:
    """A run whose rank 0 stands still from the scoring of step 3 on until two seconds before `end` (time.monotonic).

    That is later than any rank may begin an update, and early enough to be no accident of what follows the limit.
    """
    launched = Launched(folder, *TP2, *overrides, interrupt=Interrupt("score", 3, "SIGSTOP", "rank"))
    deadline = time.monotonic() + tools.RUN_SECONDS
    while not launched.marker.exists() and launched.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    if launched.marker.exists():
        (stopped,) = json.loads(launched.marker.read_text())["targets"]
        assert time.monotonic() < end - 2.0, "the start took longer than the limit allows for"
        time.sleep(end - 2.0 - time.monotonic())
        psutil.Process(stopped).send_signal(signal.SIGCONT)
    ended = launched.finish()
    assert launched.marker.exists(), f"the run never came to step 3\n{ended.all}"
    return ended


def assert_left(ended: Ended, folder: Path, step: int) -> None:
    assert (ended.code, ended.err.count("\n")) == (INTERRUPTED, 1), ended.all
    assert f"interrupted by the time limit in step {step} of {STEPS}" in ended.err
    assert tools.saved_steps(folder) == step
    assert not tools.left_over(folder)


def test_before_its_time_limit_a_run_saves_the_last_finished_step_and_goes_on_bit_for_bit(
    limit: float, whole: Path, tmp_path: Path
) -> None:
    folder, option = tmp_path / "run", f"checkpoint.time_limit_seconds={limit}"
    assert_left(holding_still_until_shortly_before(time.monotonic() + limit, folder, option), folder, 3)
    again = tools.trained(folder, *TP2, option)  # of one start: the limit begins anew
    assert tools.steps_shown(again) == [4, 5, 6]
    tools.assert_same_run(folder, whole)


def test_before_the_end_of_its_slurm_job_a_run_saves_the_last_finished_step_and_goes_on_bit_for_bit(
    limit: float, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, end = tmp_path / "run", int(time.time() + limit)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    left = time.monotonic() + end - time.time()
    assert_left(holding_still_until_shortly_before(left, folder), folder, 3)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(time.time() + tools.RUN_SECONDS)))
    tools.trained(folder, *TP2)
    tools.assert_same_run(folder, whole)


@pytest.mark.parametrize("done", [0, 3])
def test_a_run_whose_time_is_over_at_its_start_leaves_with_what_there_was_and_goes_on_bit_for_bit(
    done: int, whole: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    if done:
        tools.interrupted(folder, Interrupt("score", done, "SIGUSR1", "rank"), *TP2)
    kept = sorted((folder / "checkpoints").glob("*"))
    assert_left(tools.launch(folder, *TP2, "checkpoint.time_limit_seconds=1"), folder, done)
    assert sorted((folder / "checkpoints").glob("*")) == kept
    tools.trained(folder, *TP2)
    tools.assert_same_run(folder, whole)


def test_a_run_that_is_killed_while_the_witness_of_its_start_is_asked_trains_when_it_is_started_again(
    whole: Path, tmp_path: Path
) -> None:
    folder, option = tmp_path / "run", "publish.witness_at_start=true"
    launched, witness = Launched(folder, *TP2, option), folder / "witness"  # the export that it reads, when it is whole
    deadline = time.monotonic() + tools.RUN_SECONDS
    while not witness.exists() and launched.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    ranks = tools.ranks_of(folder)
    launched.process.kill()
    for rank in ranks:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    ended = launched.finish()
    assert (ended.code, len(ranks)) == (-signal.SIGKILL, 2), ended.all
    assert not tools.left_over(folder)
    assert witness.exists(), "the witness had been asked already: nothing was tested"
    again = tools.trained(folder, *TP2, option)
    assert "learner and transformers agree" in again.out
    assert not witness.exists()
    rows, wanted = tools.rows_of(folder), tools.rows_of(whole)
    assert len(rows) == STEPS
    for row, other in zip(rows, wanted, strict=True):
        for name in row:
            if not name.startswith((*tools.VOLATILE, "refit/witness")):
                assert row[name] == other[name], (row["step"], name)
