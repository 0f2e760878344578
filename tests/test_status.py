"""`a3po status` says where a run stands, whatever became of it, and leaves its folder as it was."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from a3po_megatron.config import Config, resolve
from a3po_megatron.errors import RequestError
from a3po_megatron.files.lock import hold, is_live
from a3po_megatron.launch.status import status
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.run.folder import save_resolved
from a3po_megatron.telemetry.beats import Beat
from a3po_megatron.telemetry.clock import place
from tests.harness.ranks import ROOT

SECONDS = {"rollout": 4.0, "reward": 0.5, "score": 1.0, "update": 3.0, "publish": 1.0, "checkpoint": 0.5}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run of 20 steps on three ranks that was made, and not started."""
    options = {"parallel": {"data": 3}, "trainer": {"steps": 20}, "model": {"path": "m"}, "name": "small"}
    (tmp_path / "run" / "logs").mkdir(parents=True)
    config = Config.model_validate(options | {"data": {"path": "builtin:arithmetic"}})
    save_resolved(resolve(config, SimpleNamespace(layers=2), CPU), tmp_path / "run/config.yaml")
    return tmp_path / "run"


def trained(folder: Path, steps: int) -> None:
    """Rows of so many steps, the last ten of 10 s each, and a checkpoint of every fifth."""
    for step in range(steps):
        seconds = {
            f"perf/seconds_{phase}": value * (1 if step >= steps - 10 else 9) for phase, value in SECONDS.items()
        }
        row = {"step": step, **seconds, "perf/tokens_per_second": 1000.0 + step}
        with (folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(row) + "\n")
    for step in range(5, steps + 1, 5):
        (folder / f"checkpoints/step-{step:06d}").mkdir(parents=True)
        (folder / f"checkpoints/step-{step:06d}/manifest.json").touch()


def say(folder: Path, rank: int, step: int, phase: str, changes: int, silent: float = 1.0) -> None:
    """What the watchdogs of a node write down, two ranks each."""
    beat = Beat(rank, 7, silent, 300.0, changes, place(step, phase))
    with (folder / f"logs/node-h{rank // 2}.beat").open("a") as file:
        file.write(f"{beat.line()}\n")


def rows(folder: Path) -> dict[str, str]:
    """What is said, and that nothing is changed by it."""
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")}
    said = status(folder)
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in folder.rglob("*")} == before
    return {name: "; ".join(text for key, text in said if key == name) for name, _ in said}


def test_a_run_that_never_started(folder: Path) -> None:
    assert rows(folder) == {"run": f"small ({folder})", "state": "never started", "step": "0 of 20"}
    assert not (folder / ".lock").exists()


def test_a_live_run_says_its_step_its_rate_and_which_rank_the_others_wait_for(folder: Path) -> None:
    trained(folder, 12)
    for rank, changes in ((0, 80), (1, 80), (2, 77)):
        say(folder, rank, 12, "update" if rank < 2 else "score", changes, silent=1.0 + 40 * rank)
    with hold(folder):
        said = rows(folder)
    assert said["state"] == "live"
    assert said["step"] == "12 of 20"
    assert said["rate"] == "10.0 s a step, 1,011 tokens/s, about 1 min left"
    assert said["checkpoint"].startswith("step-000010, ")
    assert said["now"] == "phase update of step 12: ranks 0–1; phase score of step 12: rank 2"
    assert said["waits for"] == "rank 2, 3 changes of phase behind"
    assert said["beat"].startswith("rank 2 is the quietest: silent 81.0 s of 300.0 s, written ")


def test_a_killed_run_says_where_it_was_and_what_was_said_last(folder: Path) -> None:
    trained(folder, 7)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "perf/sec')  # cut off
    say(folder, 0, 7, "rollout", 50)
    hold(folder).close()
    for attempt, message in ((1, "old"), (2, "grad norm is not finite"), (10, "out of memory")):
        (folder / f"logs/attempt-{attempt}").mkdir()
        words = json.dumps({"kind": "run", "message": message})
        (folder / f"logs/attempt-{attempt}/rank-1.words").write_text(words + "\n")
    (folder / "logs/slurm-41.out").write_text("error: rank 1: out of memory\n\n")
    said = rows(folder)
    assert said["state"] == "not running; the same command continues it"
    assert said["step"] == "7 of 20"
    assert said["was in"] == "phase rollout of step 7: rank 0"
    assert said["last words"] == "rank 1: run: out of memory"
    assert said["job said"] == "error: rank 1: out of memory (slurm-41.out)"
    assert "left" not in said["rate"]
    (folder / "logs/stall").write_text("rank 2 (phase update of step 7; no heartbeat) stood still\n")
    assert rows(folder)["stall"] == "rank 2 (phase update of step 7; no heartbeat) stood still"


def test_a_finished_run(folder: Path) -> None:
    trained(folder, 20)
    hold(folder).close()
    said = rows(folder)
    assert (said["state"], said["step"]) == ("finished", "20 of 20")


def test_a_run_of_another_process_is_live_until_that_is_killed(folder: Path) -> None:
    code = "import time; from pathlib import Path; from a3po_megatron.files.lock import hold\n"
    code += f"lock = hold(Path({str(folder)!r})); print('held', flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    assert is_live(folder) is True
    process.kill()
    process.wait()
    assert is_live(folder) is False


def test_looking_does_not_keep_a_run_from_starting(folder: Path) -> None:
    hold(folder).close()
    assert is_live(folder) is False
    with hold(folder) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


@pytest.mark.parametrize(
    ("queue", "says"),
    [
        ("7|PENDING|Dependency|N/A||{}/job.sbatch\n8|RUNNING|None|x|rl0|/other/job.sbatch\n", "7 pending (Dependency)"),
        (
            "7|PENDING|Priority|2026-01-02T03:04:05||{}/job.sbatch\n",
            "7 pending (Priority) to start 2026-01-02T03:04:05",
        ),
        ("9_4|RUNNING|None|2026-01-02T03:04:05|rl[0-3,7]|{}/job.sbatch\n", "9_4 running on rl[0-3,7] (5 nodes)"),
        ("odd\n\n", "none in the queue"),
        (None, "squeue gives no answer: slurm_load_jobs error"),
    ],
)
def test_the_jobs_of_a_run_are_found_by_its_script(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, queue: str | None, says: str
) -> None:
    (folder / "job.sbatch").write_text("")
    program = tmp_path / "bin" / "squeue"
    program.parent.mkdir()
    (tmp_path / "queue").write_text((queue or "").format(folder))
    fails = "echo slurm_load_jobs error >&2; exit 1"
    program.write_text(f"#!/bin/sh\n{fails if queue is None else f'cat {tmp_path}/queue'}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    assert rows(folder)["job"] == says
    monkeypatch.setenv("PATH", str(tmp_path))
    assert rows(folder)["job"] == "squeue is not here: ask where the run was submitted"


def test_a_sweep_says_a_line_for_each_of_its_runs(folder: Path) -> None:
    (folder / "sweep.json").write_text("{}")
    (folder / "config.yaml").rename(folder / "one.yaml")
    for name in ("000", "001"):
        (folder / name / "logs").mkdir(parents=True)
        (folder / name / "config.yaml").write_text((folder / "one.yaml").read_text())
    trained(folder / "001", 20)
    assert status(folder) == [
        ("000", "never started; 0 of 20"),
        ("001", "finished; 20 of 20; 10.0 s a step, 1,019 tokens/s"),
    ]


@pytest.mark.parametrize("text", [None, "", "{", "name: x\n", "- 1\n", "\x00"])
def test_a_folder_that_is_no_run_is_refused(tmp_path: Path, text: str | None) -> None:
    with pytest.raises(RequestError, match="is no run folder"):
        status(tmp_path / "nowhere")
    if text is not None:
        (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(RequestError, match="no run folder|not the configuration of a run") as caught:
        status(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_checkpoint_that_was_never_finished_is_none_and_where_all_are_such_that_is_said(folder: Path) -> None:
    trained(folder, 10)
    (folder / "checkpoints/step-000010/manifest.json").unlink()
    assert rows(folder)["checkpoint"].startswith("step-000005, ")
    (folder / "checkpoints/step-000005/manifest.json").unlink()
    assert "no checkpoint is whole" in rows(folder)["checkpoint"]
    assert rows(folder)["step"].startswith("10 of")


def test_how_long_ago_is_told_in_words_of_its_size(folder: Path) -> None:
    trained(folder, 5)
    for seconds, words in ((5, "5 s ago"), (150, "2 min ago"), (7500, "2 h 5 min ago"), (200_000, "2 days 7 h ago")):
        then = time.time() - seconds
        os.utime(folder / "checkpoints/step-000005", (then, then))
        assert rows(folder)["checkpoint"] == f"step-000005, {words}"
