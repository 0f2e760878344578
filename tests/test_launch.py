"""`a3po train` as a user runs it: ranks that die, launchers that die, folders in use, and what a run leaves behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from a3po_megatron.config import load_config
from a3po_megatron.files.run_folder import rollout_files
from a3po_megatron.launch.folder import make_folder
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.telemetry.catalogue import METRICS
from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import phase_of
from tests.harness.ranks import ROOT
from tests.harness.tiny_models import resolved

# Small steps: what is trained is not the subject.
SMALL = ["trainer.prompts_per_step=4", "trainer.rollouts_per_prompt=4", "telemetry.texts_per_step=1"]
SMALL += ["publish.witness_at_start=false", "publish.canary_tokens=4"]


def words(folder: Path, *overrides: str) -> list[str]:
    options = [word for override in (*SMALL, *overrides) for word in ("--set", override)]
    return ["train", "configs/arithmetic.yaml", "--run-dir", str(folder), *options]


def start(folder: Path, *overrides: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "a3po_megatron", *words(folder, *overrides)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_phase(folder: Path, rank: int, phases: tuple[str, ...], seconds: float = 120) -> str:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := phase_of(folder, rank)).partition(" ")[2] in phases:
            return found
        time.sleep(0.1)  # to look takes a few milliseconds, of a core that the ranks need
    raise AssertionError(f"rank {rank} did not come to {phases}: {found or 'it is not there'}")


def rank_processes(launcher: subprocess.Popen[str]) -> dict[int, psutil.Process]:
    found = {}
    for process in psutil.Process(launcher.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # also a zombie's: a helper that ended while we looked
            if "a3po_megatron.train" in process.cmdline():
                found[int(process.environ()["RANK"])] = process
    return found


def all_gone(processes: list[psutil.Process], seconds: float) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=seconds)
    return not [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]


@pytest.fixture
def ended() -> Iterator[list[subprocess.Popen[str]]]:
    """Launchers to be ended with the test, whatever became of it."""
    launchers: list[subprocess.Popen[str]] = []
    yield launchers
    for launcher in launchers:
        if launcher.poll() is None:
            launcher.kill()
        launcher.wait()


def test_a_rank_that_dies_takes_the_others_down_and_is_named_with_its_phase(
    tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "run"
    launcher = start(folder, "trainer.steps=500")
    ended.append(launcher)
    wait_for_phase(folder, 1, ("publish", "rollout"))
    second = tools.launched_here(folder)
    assert second.code == 2 and "a run is live in this folder" in second.err, second.all

    deadline = time.monotonic() + 30
    while len(family := psutil.Process(launcher.pid).children(recursive=True)) < 4 and time.monotonic() < deadline:
        time.sleep(0.05)  # two ranks, each with its grader's worker
    assert len(family) >= 4
    victim = rank_processes(launcher)[1]
    wait_for_phase(folder, 1, ("rollout", "update"))
    victim.send_signal(signal.SIGKILL)
    died = time.monotonic()
    assert launcher.wait(30) == 1
    assert time.monotonic() - died < 30
    message = launcher.stderr.read()
    assert "rank 1 (phase " in message
    assert "of step" in message
    assert "SIGKILL" in message
    assert "Traceback" not in message
    assert all_gone(family, 10)


def test_a_killed_launcher_leaves_no_rank_and_no_stale_lock_and_the_folder_trains(
    tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    """It trains in ranks of this session; that a start has ranks that train, and an end, is shown above and by
    tests/test_evaluate.py."""
    folder = tmp_path / "run"
    launcher = start(folder, "trainer.steps=500")
    ended.append(launcher)
    deadline = time.monotonic() + 60
    while len(rank_processes(launcher)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    family = psutil.Process(launcher.pid).children(recursive=True)
    assert len(family) >= 2
    launcher.kill()
    assert all_gone(family, 10)

    again = tools.launched_in_session(words(folder, "trainer.steps=2"))
    assert again.code == 0, again.all
    assert f"run folder: {folder}" in again.out
    assert f"report:     {folder / 'report.html'}" in again.out
    assert "step    2/2" in (folder / "logs/rank-0.log").read_text()  # plain lines where there is no terminal
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    for row in rows:
        assert list(row) == ["step", *METRICS]
    for name in ("config.yaml", "provenance.json", "report.html", "tensorboard"):
        assert (folder / name).exists()
    records = [r for files in rollout_files(folder).values() for file in files for r in read_rollouts(file)]
    assert {version for record in records for _, version, _ in record["segments"]} >= {1, 2}
    trained = [record for record in records if record["accepted"] and record["outcome"] != "invalid"]
    assert trained
    for record in trained:
        assert len(record["tokens"]) == len(record["old_logprobs"]) == len(record["weights"])
    assert any("pieces" in record for record in records)

    assert not list(Path("/dev/shm").glob("a3po-*cpushm*"))


def catches(process: int, number: signal.Signals) -> bool:
    """Whether a process has a handler of its own for a signal."""
    words = dict(line.split(":\t") for line in Path(f"/proc/{process}/status").read_text().splitlines())
    return bool(int(words["SigCgt"], 16) >> (number - 1) & 1)


def test_a_signal_before_any_rank_exists_ends_the_launcher_with_85_and_the_folder_trains(
    tmp_path: Path, ended: list[subprocess.Popen[str]]
) -> None:
    folder = tmp_path / "run"
    launcher = start(folder)
    ended.append(launcher)
    deadline = time.monotonic() + 30
    while not catches(launcher.pid, signal.SIGTERM) and time.monotonic() < deadline:
        time.sleep(0.005)
    # What comes before that ends it without a word, so it must be before the imports, which take seconds.
    assert "libtorch" not in Path(f"/proc/{launcher.pid}/maps").read_text()
    launcher.send_signal(signal.SIGTERM)
    out, err = launcher.communicate(timeout=60)
    assert (launcher.returncode, err.count("\n")) == (85, 1), out + err
    assert f"{folder}: interrupted by SIGTERM before it started" in err
    assert not list((folder / "logs").glob("rank-*"))
    options = [*SMALL, "trainer.steps=2"]
    settings = resolved(load_config(ROOT / "configs" / "arithmetic.yaml", options))
    lock, remarks = make_folder(folder, settings, ["a3po", "train"])
    lock.close()
    assert remarks == []
