"""The run folder, made or made ready by the launcher before any rank starts, and held while the run lives."""

from __future__ import annotations

import datetime
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
from pathlib import Path
from typing import IO, Any

from ..config import Settings, unlike
from ..errors import Finished, RequestError
from ..files.lock import hold
from ..files.replace import PARTIAL, move, partials, write_whole
from ..files.run_folder import RunFolder, beat_files, step_files, step_folders, step_of
from ..run.folder import name_latest, newest_whole, put_aside, save_resolved
from ..run.manifest import FORMAT, inputs_of, other_format, read_manifest
from ..telemetry.timeline import cut_timeline
from ..telemetry.versions import installed


def default_folder(name: str) -> Path:
    """runs/<name>-<date>-<short id> in the current directory."""
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{date}-{secrets.token_hex(2)}"


LOCK_SECONDS = 2.0  # the ranks of a killed launcher die just after it
LEASE_SECONDS = 100.0  # in a job: a network file system keeps the lock of a node that died for its lease, 90 s of NFS's
LARGE_BYTES = 10e9  # of a checkpoint that takes a while to read


def make_folder(folder: Path, settings: Settings, command: list[str]) -> tuple[IO[str], list[str]]:
    """Makes and locks a run folder, or makes one ready to be resumed; also returns what there is to say about that.

    The run is live as long as the returned file is open anywhere: the lock belongs to processes, not to a file that
    they could leave behind, so a killed run's folder is free as soon as its last rank is gone. A run resumes from its
    newest whole checkpoint, and what was written after that is cut off. Raises RequestError for a folder that holds a
    live run, a finished one, one with another configuration, or checkpoints of which none is whole.
    """
    run = RunFolder(folder)
    try:
        for part in (run.rollouts, run.logs, run.checkpoints):
            part.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{folder}: cannot make the run folder: {error.strerror}") from error
    lock = hold(folder, LEASE_SECONDS if "SLURM_JOB_ID" in os.environ else LOCK_SECONDS)
    try:
        remarks = _resume(folder, settings)
        _save_identity(run.identity, settings)
        save_resolved(settings, run.config)
        _save_provenance(run.provenance, command)
    except OSError as error:
        raise RequestError(f"{error.filename or folder}: cannot make the folder ready: {error.strerror}") from error
    return lock, remarks


def prepare_folder(folder: Path, settings: Settings) -> IO[str]:
    """`make_folder`, and says what there is to say: what a launcher does first, and rank 0 of a run that something else
    started (srun, nemo-run), for which the others wait when they connect."""
    lock, remarks = make_folder(folder, settings, sys.argv)
    for remark in remarks:
        print(f"{folder}: {remark}", flush=True)
    return lock


def _resume(folder: Path, settings: Settings) -> list[str]:
    """Puts the folder into the state of its newest whole checkpoint, or into that of a new run."""
    from ..run.journal import check_format  # with numpy, which a submission does not wait for

    run = RunFolder(folder)
    check_format(run.journal)  # before anything in the folder is changed
    for newest in step_folders(run.checkpoints)[-1:]:
        size = sum(path.stat().st_size for path in newest.rglob("*"))
        if size > LARGE_BYTES:
            print(f"{folder}: reads all of {newest.name} to see whether it is whole ({size / 1e9:.0f} GB)", flush=True)
    checkpoint, wrong = newest_whole(run.checkpoints)
    remarks = [f"a checkpoint is not whole, so an older one is used: {problem}" for problem in wrong]
    step, metrics_bytes = 0, 0
    if checkpoint is not None:
        manifest = read_manifest(checkpoint)
        step, metrics_bytes = manifest.step, manifest.metrics_bytes
        check_same(folder, settings, manifest.config, manifest.inputs)
    elif (started := started_with(folder)) is not None:
        check_same(folder, settings, started["config"], started["inputs"])
    size = run.metrics.stat().st_size if run.metrics.exists() else 0
    if size < metrics_bytes:
        raise RequestError(
            f"{run.metrics}: it has {size} bytes, at the newest checkpoint it had {metrics_bytes}: rows are missing; "
            "put them back, or choose another --run-dir"
        )
    if checkpoint is not None:
        put_aside(run.checkpoints, after=step)
        if not run.latest.exists() or run.latest.read_bytes().strip() != checkpoint.name.encode():
            name_latest(run.checkpoints, checkpoint.name)
        if step >= settings.trainer.steps:
            raise Finished(
                f"{folder}: the run in this folder has done its {step} steps: raise trainer.steps, or choose another "
                "--run-dir"
            )
        remarks.append(f"goes on from {checkpoint.name}")
    if size:
        os.truncate(run.metrics, metrics_bytes)
    cut_timeline(run.timeline, step)
    for path in [*step_files(run.rollouts), *step_files(run.rejected), *step_files(run.profile)]:
        if step_of(path) >= step or path.suffix == PARTIAL:  # an older version wrote these in the open
            path.unlink()
    for path in step_folders(run.hf):
        if step_of(path) > step:
            shutil.rmtree(path)
    written = (folder, run.checkpoints, run.hf, run.rollouts, run.rejected, run.profile, run.logs)
    for path in (*(left for part in written for left in partials(part)), run.witness):
        if path.exists():  # what a killed run left half done
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for stale in beat_files(run.logs):
        stale.unlink()
    if run.stall.exists():
        move(run.stall, run.stall.with_suffix(".previous"))
    return remarks


def check_same(folder: Path, settings: Settings, before: dict[str, Any], files: dict[str, str]) -> None:
    """Raises RequestError with what is not as it was: an option, a file that the run reads."""
    now = inputs_of(settings)
    changed = unlike(before, settings) + [
        f"{name} was another file" for name in sorted(now.keys() | files.keys()) if now.get(name) != files.get(name)
    ]
    if changed:
        raise RequestError(
            f"{folder}: the run in this folder was configured otherwise, and a run cannot change under way: "
            f"{'; '.join(changed)}. Take that back, or choose another --run-dir"
        )


def started_with(folder: Path) -> dict[str, Any] | None:
    """What a run without a checkpoint was started with, if it has come far enough to have left anything."""
    run = RunFolder(folder)
    left = [run.metrics, *step_files(run.journal)]
    if not any(path.exists() and path.stat().st_size for path in left):
        return None
    try:
        started = json.loads(run.identity.read_bytes())
        if (form := started.get("format", 1)) != FORMAT:
            raise other_format(run.identity, form)
        return {"config": dict(started["config"]), "inputs": dict(started["inputs"])}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(
            f"{run.identity}: cannot tell what the run in this folder was started with: {error!r}; choose another "
            "--run-dir"
        ) from error


def _save_identity(path: Path, settings: Settings) -> None:
    known = {"format": FORMAT, "config": settings.model_dump(mode="json"), "inputs": inputs_of(settings)}
    write_whole(path, json.dumps(known) + "\n", synced=True)


def _save_provenance(path: Path, command: list[str]) -> None:
    """Where these results come from; every later start is added to the first one."""
    now = provenance(command)
    try:
        first = json.loads(path.read_text())
        now = first | {"continued": [*first.get("continued", []), now]}
    except (OSError, ValueError):
        pass  # a new run, or one that was killed while this file was written
    write_whole(path, json.dumps(now, indent=2) + "\n")


def provenance(command: list[str]) -> dict[str, object]:
    """Where these results come from: versions, source revision, host, command."""
    return {
        "command": command,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "host": platform.node(),
        "platform": platform.platform(),
        "python": sys.version.split()[0],
        "packages": installed(),
        "git": _git(),
    }


def _git() -> dict[str, object] | None:
    """The revision of the checkout that this package runs from; None where it is no checkout."""
    here = Path(__file__).resolve().parent

    def ask(*words: str) -> str | None:
        try:
            answer = subprocess.run(["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return answer.stdout.strip() if answer.returncode == 0 else None

    commit = ask("rev-parse", "HEAD")
    return None if commit is None else {"commit": commit, "dirty": bool(ask("status", "--porcelain", "-uno"))}
