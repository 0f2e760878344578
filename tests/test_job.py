"""What a job makes of how its ranks ended, what reaches it and them in their first moments, and what is submitted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from a3po_megatron.config import load_config
from a3po_megatron.errors import Interrupted, RequestError, RunFailed
from a3po_megatron.files.run_folder import LEAD
from a3po_megatron.launch import job, slurm
from a3po_megatron.launch.blame import Here, InJob, failure
from a3po_megatron.launch.folder import make_folder
from a3po_megatron.launch.signals import KEPT, Signals
from a3po_megatron.launch.starts import idle_starts, reached
from a3po_megatron.run.manifest import Manifest, inputs_of
from tests.harness.ranks import ROOT
from tests.test_launch import catches

pytestmark = pytest.mark.alone

STALL = "rank 5 (phase update of step 3; no heartbeat) stood still"

SPEAKS = """
import sys, threading
from pathlib import Path
from a3po_megatron.launch.environment import last_words, report_failures

def main(folder):
    watchdog = threading.Thread(target=last_words, args=("interrupted", "rank 1 stood still"))
    watchdog.start()
    watchdog.join()
    raise RuntimeError("Connection closed by peer")  # another rank was the first to leave

report_failures(Path(sys.argv[1]), main)
"""


def test_the_first_words_of_a_rank_count_and_it_ends_with_their_code_not_with_what_broke_afterwards(
    tmp_path: Path,
) -> None:
    around = os.environ | {"A3PO_WORDS_DIR": str(tmp_path), "RANK": "3"}
    done = subprocess.run([sys.executable, "-c", SPEAKS, str(tmp_path)], cwd=ROOT, env=around, stderr=subprocess.PIPE)
    assert done.returncode == 85, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["rank-3.words"]
    assert json.loads((tmp_path / "rank-3.words").read_text()) == {
        "kind": "interrupted",
        "message": "rank 1 stood still",
    }

    # Words that cannot be written must not make a failed rank one that ended well.
    around["A3PO_WORDS_DIR"] = str(tmp_path / "nothing")
    done = subprocess.run([sys.executable, "-c", SPEAKS, str(tmp_path)], cwd=ROOT, env=around, stderr=subprocess.PIPE)
    assert done.returncode == 85, done.stderr


def test_a_stall_is_an_interruption_whatever_ranks_died_of_and_costs_only_the_blamed_node(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    nodes, crash = ["n0", "n1", "n2"], ("crash", "RuntimeError: Connection closed by peer")
    ended = InJob(1, {0: crash, 4: ("interrupted", STALL)}, "n0")
    assert isinstance(failure(InJob(1, {0: crash}, "n0"), tmp_path, False), RunFailed)
    assert InJob(1, {0: crash}, "n0").bad_nodes(tmp_path, nodes, 2) == {"n0"}

    (tmp_path / "logs/stall").write_text(STALL)
    error = failure(ended, tmp_path, False)
    assert isinstance(error, Interrupted)
    assert str(error) == STALL
    assert ended.bad_nodes(tmp_path, nodes, 2) == {"n2"}
    assert str(failure(Here([], set(), {}), tmp_path, False)) == STALL  # on one machine as in a job
    (tmp_path / "logs/stall").write_text("all 6 ranks (phase update of step 3; no progress for 99 s, limit 60 s) stood")
    assert ended.bad_nodes(tmp_path, nodes, 2) == set()


def test_srun_that_ends_of_a_signal_before_any_rank_could_speak_is_an_interruption_too(tmp_path: Path) -> None:
    assert isinstance(failure(InJob(1, {}, None), tmp_path, told=True), Interrupted)
    assert isinstance(failure(InJob(1, {}, None), tmp_path, told=False), RunFailed)
    assert isinstance(failure(InJob(1, {}, "n0"), tmp_path, told=True), RunFailed)
    assert isinstance(failure(InJob(85, {}, "n0"), tmp_path, told=False), Interrupted)  # a full disk


def test_a_rank_that_cannot_hear_signals_yet_does_not_die_of_them() -> None:
    script = (
        "import os, signal; [os.kill(os.getpid(), n) for n in (signal.SIGUSR1, signal.SIGTERM)]; print(*os.sys.argv)"
    )
    words = [*job.RANK, sys.executable, "-c", script, "run folder", "$HOME"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "-c run folder $HOME\n")


def test_a_job_hears_signals_before_the_imports_that_take_seconds(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-m", "a3po_megatron.launch.job", str(tmp_path)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 30
        while not catches(process.pid, signal.SIGUSR1) and time.monotonic() < deadline:
            time.sleep(0.002)
        assert "pydantic_core" not in Path(f"/proc/{process.pid}/maps").read_text()
    finally:
        process.kill()
        process.wait()


def test_a_job_of_an_array_that_fails_takes_back_those_after_it_and_one_that_is_interrupted_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """An alert that ends a run, say, would end it again and again, a step later each time."""
    config, ran = load_config(ROOT / "configs/demo.yaml", ["slurm.resume=array"]), list[list[str]]()
    (tmp_path / "logs").mkdir()
    monkeypatch.setenv("SLURM_JOB_ID", "8")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setattr(job, "load_resolved", lambda path: config)
    monkeypatch.setattr(subprocess, "run", lambda command, **options: ran.append(command))
    for outcome, code, expected in (
        (RunFailed("step 3: alert clipping"), 1, [["scancel", "--state=PENDING", "7"]]),
        (Interrupted("interrupted by SIGUSR1"), 85, []),
    ):
        ran.clear()
        monkeypatch.setattr(job, "_run", lambda *_, outcome=outcome: outcome)
        with pytest.raises(SystemExit) as caught:
            job.main(tmp_path, Signals())
        assert (caught.value.code, ran) == (code, expected)


def test_what_came_while_the_batch_script_set_up_is_kept_for_the_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config(ROOT / "configs/arithmetic.yaml", ["slurm.gpus_per_node=0", "slurm.setup=['kill -USR1 $$']"])
    script = slurm.render(config, Path("/runs/example"))
    before = script[: script.index("exec ")]
    shown = f'{before}printf %s "${KEPT}"; kill -USR1 $$; exec printf %s " lives"'
    done = subprocess.run(["bash", "-c", shown], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "SIGUSR1 lives"), done.stderr
    monkeypatch.setenv(KEPT, "SIGUSR1")
    signals = Signals()
    signals.restore()
    assert KEPT not in os.environ  # nobody else's
    with pytest.raises(Interrupted, match="interrupted by SIGUSR1 before it started"):
        signals.check(Path("/runs/example"))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["slurm.gpus_per_node=8"], "#SBATCH --mem=0\n"),
        (["slurm.gpus_per_node=8", "slurm.memory=500G"], "#SBATCH --mem=500G\n"),
        (["slurm.gpus_per_node=0", "slurm.tasks_per_node=2"], ""),
    ],
)
def test_a_job_on_gpus_asks_for_the_memory_of_the_whole_node_unless_told_otherwise(
    options: list[str], line: str
) -> None:
    """What the optimizer keeps on the host is more than a partition gives by default: the job is killed."""
    script = slurm.render(slurm.settled(load_config(ROOT / "configs/arithmetic.yaml", options)), Path("/runs/example"))
    assert (line in script) if line else ("--mem" not in script)


def planned(folder: Path, *overrides: str) -> slurm.Plan:
    options = ["slurm.gpus_per_node=0", "slurm.tasks_per_node=2", *overrides]
    return slurm.plan([slurm.settled(load_config(ROOT / "configs/arithmetic.yaml", options))], folder, sweep=False)


def test_submitting_into_a_live_run_or_one_configured_otherwise_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    slurm.write(planned(folder), [[]])
    names = ("config.yaml", slurm.SCRIPT)
    written = [(folder / name).read_bytes() for name in names]
    config = planned(folder).runs[0]

    lock, _ = make_folder(folder, config, ["a3po", "train"])
    with lock, pytest.raises(RequestError, match="a run is live in this folder"):
        slurm.write(planned(folder, "slurm.time='1:00:00'"), [[]])

    saved = folder / "checkpoints" / "step-000004"
    saved.mkdir()
    Manifest(4, 5, 2, config.model_dump(mode="json"), inputs_of(config), {}, 0, {}).save(saved)
    with pytest.raises(RequestError, match="configured otherwise.*optimizer.lr was .*, is 0.5"):
        slurm.write(planned(folder, "optimizer.lr=0.5"), [[]])
    assert [(folder / name).read_bytes() for name in names] == written
    slurm.write(planned(folder, "slurm.time='1:00:00'", "trainer.steps=77"), [[]])  # what may change under way
    assert "--time=1:00:00" in (folder / slurm.SCRIPT).read_text()


@pytest.mark.parametrize("torn", ["", "12.5.", "nan", "inf"])
def test_a_lead_that_was_not_written_whole_counts_as_none(tmp_path: Path, torn: str) -> None:
    (tmp_path / LEAD).write_text(torn)
    config = load_config(ROOT / "configs/arithmetic.yaml", [])
    assert slurm.lead_seconds(config, tmp_path) == slurm.FIRST_LEAD_SECONDS
    (tmp_path / LEAD).write_text("45\n")
    assert slurm.lead_seconds(config, tmp_path) == 45


def test_starts_that_bring_a_run_no_further_are_counted_until_one_does_or_it_is_submitted_anew(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    (tmp_path / "journal").mkdir()

    def start(group: bytes = b"", save: int | None = None, goes_on: bool = True) -> int:
        before = reached(tmp_path)
        with (tmp_path / f"journal/step-00007.rank-{len(group) % 2}").open("ab") as file:
            file.write(group)
        if save is not None:
            (tmp_path / f"checkpoints/step-{save:06d}").mkdir(parents=True)
        return idle_starts(tmp_path, before, goes_on)

    assert [start(goes_on=False), start()] == [1, 2]
    assert start(goes_on=False) == 1  # submitted again
    assert [start(b"a group"), start()] == [0, 1]
    assert [start(save=8), start()] == [0, 1]
    for path in (tmp_path / "journal").iterdir():  # what is before a checkpoint is dropped
        path.unlink()
    assert [start(save=9), start(b"one"), start(), start()] == [0, 0, 1, 2]
    (tmp_path / "logs/starts.json").write_text("{")  # killed while it was written
    assert start() == 1
