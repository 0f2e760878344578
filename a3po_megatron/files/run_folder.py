"""What lies where in a run folder, and how steps and ranks are written in names: said here, and nowhere else.

    config.yaml  provenance.json  identity.json  .lock     how the run was started, and whether it lives
    metrics.jsonl  timeline.jsonl                           one row a step: of the run, of its ranks
    tensorboard/  report.html  wandb/  wandb/id             what is drawn of them, and sent
    profile/step-00003.rank-0.trace.json                    chosen steps, looked at closely
    rollouts/step-00012.rank-0.parquet                      rejected/step-00012.mini-batch-1.rank-0.pt
    checkpoints/step-000012/  torn-step-000012/  latest     hf/step-000012/
    journal/step-00012.rank-0
    logs/rank-0.{log,stacks}  node-NAME.beat  stall  starts.json  attempt-3/rank-0.{log,words}
    evaluations/step-000012/                                of that checkpoint: a result each benchmark
    lead_seconds  witness/  job.sbatch                      sweep.json: in the folder above the runs of a sweep

A step has six digits where it names a folder and five where it names a file, more where it needs them; it is read as a
number, however many it has. Other names (step-best, notes.txt) are not ours, and are left alone.

Names only, which is why they stand in files/ and not in run/: telemetry and the report, which lie below run/, write and
read here too. Which checkpoint is whole is judged in run/folder.py.
"""

from __future__ import annotations

import re
from pathlib import Path

MANIFEST = "manifest.json"  # in a checkpoint's folder
LATEST = "latest"  # in checkpoints/: the newest one's name
LEAD = "lead_seconds"
STALL = "stall"  # in logs/
SCRIPT = "job.sbatch"
STEP, TORN = "step-", "torn-"  # of a checkpoint that was put aside, TORN stands before its name
_STEP = re.compile(rf"(?:{TORN})?{STEP}([0-9]+)(?:\..*)?")
_RANK = re.compile(r"(?:.*\.)?rank-([0-9]+)(?:\..*)?")
_ROLLOUTS = re.compile(rf"{STEP}[0-9]+\.rank-[0-9]+\.parquet")


class RunFolder:
    """The paths in a run folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config, self.provenance = path / "config.yaml", path / "provenance.json"
        self.identity = path / "identity.json"  # options and inputs of the run, from its first start on
        self.lock = path / ".lock"
        self.metrics, self.tensorboard, self.report = path / "metrics.jsonl", path / "tensorboard", path / "report.html"
        self.wandb_id = path / "wandb" / "id"  # of the run there; the folder is W&B's
        self.timeline = path / "timeline.jsonl"
        self.rollouts, self.rejected = path / "rollouts", path / "rejected"
        self.checkpoints, self.journal, self.hf = path / "checkpoints", path / "journal", path / "hf"
        self.profile = path / "profile"
        self.latest = self.checkpoints / LATEST
        self.evaluations = path / "evaluations"  # of its checkpoints, a folder each
        self.witness = path / "witness"  # while the weights are shown to transformers
        self.lead_seconds = path / LEAD
        self.logs = path / "logs"
        self.stall = self.logs / STALL  # what a run that stood still ended with
        self.starts = self.logs / "starts.json"  # how many starts in a row brought it no further
        self.script, self.sweep = path / SCRIPT, path / "sweep.json"  # what `a3po submit` makes


def step_of(path: Path) -> int:
    """Reads the step in the name of a folder or file. Raises ValueError where there is none."""
    return _number(_STEP, path, "step")


def rank_of(path: Path) -> int:
    """Reads the rank in a file's name. Raises ValueError where there is none."""
    return _number(_RANK, path, "rank")


def _number(pattern: re.Pattern[str], path: Path, what: str) -> int:
    if (match := pattern.fullmatch(path.name)) is None:
        raise ValueError(f"{path}: no {what} is in this name")
    return int(match[1])


# --- folders of steps: checkpoints/, hf/ ----------------------------------------------------------------------------


def step_folder(parent: Path, step: int) -> Path:
    """`checkpoints/step-000012`: the state after so many steps."""
    return parent / f"{STEP}{step:06d}"


def step_folders(parent: Path) -> list[Path]:
    """Lists the folders of steps, oldest first, whole or not."""
    return _folders(parent, STEP)


def torn_folder(folder: Path) -> Path:
    """Where a checkpoint is put aside."""
    return folder.with_name(f"{TORN}{folder.name}")


def torn_folders(checkpoints: Path) -> list[Path]:
    """Lists what was put aside, oldest first."""
    return _folders(checkpoints, f"{TORN}{STEP}")


def _folders(parent: Path, kind: str) -> list[Path]:
    paths = (path for path in parent.glob(f"{kind}*") if re.fullmatch(f"{kind}[0-9]+", path.name) and path.is_dir())
    return sorted(paths, key=step_of)


# --- files of steps: rollouts/, rejected/, journal/ -----------------------------------------------------------------


def rollout_file(rollouts: Path, step: int, rank: int) -> Path:
    """`rollouts/step-00012.rank-0.parquet`"""
    return rollouts / f"{STEP}{step:05d}.rank-{rank}.parquet"


def rejected_file(rejected: Path, step: int, mini_batch: int, rank: int) -> Path:
    """`rejected/step-00012.mini-batch-1.rank-0.pt`"""
    return rejected / f"{STEP}{step:05d}.mini-batch-{mini_batch}.rank-{rank}.pt"


def profile_file(profile: Path, step: int, rank: int, kind: str) -> Path:
    """`profile/step-00003.rank-0.trace.json`, or `….memory.pickle`"""
    ending = {"torch": "trace.json", "memory": "memory.pickle"}[kind]
    return profile / f"{STEP}{step:05d}.rank-{rank}.{ending}"


def journal_file(journal: Path, step: int, rank: int) -> Path:
    """`journal/step-00012.rank-0`"""
    return journal / f"{STEP}{step:05d}.rank-{rank}"


def step_files(parent: Path) -> list[Path]:
    """Lists the files that ranks wrote in their steps, by step and rank."""
    paths = (path for path in parent.glob(f"{STEP}*.*") if _STEP.fullmatch(path.name) and _RANK.fullmatch(path.name))
    return sorted(paths, key=lambda path: (step_of(path), rank_of(path)))


def rollout_files(folder: Path) -> dict[int, list[Path]]:
    """Per step of a run, ascending, its rollout files in rank order."""
    files: dict[int, list[Path]] = {}
    for path in step_files(RunFolder(folder).rollouts):
        if _ROLLOUTS.fullmatch(path.name):
            files.setdefault(step_of(path), []).append(path)
    return files


# --- files of ranks: logs/, logs/attempt-N/ -------------------------------------------------------------------------


def rank_file(folder: Path, rank: int, kind: str) -> Path:
    """`logs/rank-3.stacks`; kinds are log and stacks, and words in a folder of an attempt."""
    return folder / f"rank-{rank}.{kind}"


def beat_file(logs: Path, node: str) -> Path:
    """`logs/node-h200-07.beat`: what the ranks of a node say of themselves."""
    return logs / f"node-{re.sub(r'[^A-Za-z0-9_.-]', '_', node)}.beat"


def beat_files(logs: Path) -> list[Path]:
    """Lists those of all nodes."""
    return sorted(logs.glob("node-*.beat"))
