"""`a3po status RUN_DIR`: how far a run is, whether it lives, and what it waits for. Reads only, and without torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import Settings, load_resolved
from ..config.slurm_forms import node_names
from ..errors import RequestError
from ..files.lock import is_live
from ..files.run_folder import RunFolder, step_of
from ..run.folder import newest_whole
from ..run.manifest import check_saved
from ..telemetry.beats import read_beats
from ..telemetry.catalogue import SECONDS, STEP
from ..telemetry.watchdog import stalled
from .tables import runs

ASK_SECONDS = 20
RECENT = 10  # steps that a rate is taken over
Row = tuple[str, str]


def status(folder: Path) -> list[Row]:
    """What there is to say of a run, or of every run of a sweep. Raises RequestError for a folder that is neither."""
    if RunFolder(folder).sweep.exists():
        names = sorted(path.name for path in folder.iterdir() if RunFolder(path).config.exists())
        return [(name, "; ".join(text for _, text in status(folder / name)[1:4])) for name in names]
    settings = _settings(folder)
    live = is_live(folder)
    said = [("run", f"{settings.name} ({folder})"), *_progress(folder, settings, live), *_ranks(folder, live)]
    return [*said, *_jobs(folder), *([] if live else _last_words(folder))]


def _settings(folder: Path) -> Settings:
    path = RunFolder(folder).config
    if not path.is_file():
        raise RequestError(f"{folder}: this is no run folder: there is no config.yaml in it")
    return load_resolved(path)


def _progress(folder: Path, settings: Settings, live: bool | None) -> Iterator[Row]:
    run = RunFolder(folder)
    steps, rows = settings.trainer.steps, _rows(run.metrics)
    try:
        saved, wrong = newest_whole(run.checkpoints, check_saved)[0], None
    except RequestError as error:  # to be said, and no reason to say nothing else
        saved, wrong = None, str(error)
    done = rows[-1]["step"] + 1 if rows else 0
    begun = bool(done or saved or wrong or list(run.logs.glob("rank-*")))
    if live:
        state = "live"
    elif saved and step_of(saved) >= steps:
        state = "finished"
    else:
        state = "not running; the same command continues it" if begun else "never started"
    yield "state", state if live is not None else f"{state} (its file system has no locks: it may be live all the same)"
    yield "step", f"{done} of {steps}"
    recent = rows[-RECENT:]
    if seconds := sum(row.get(f"{SECONDS}{phase}") or 0.0 for row in recent for phase in STEP):
        seconds /= len(recent)
        tokens = recent[-1].get("perf/tokens_per_second")
        rate = f"{seconds:.1f} s a step" + (f", {tokens:,.0f} tokens/s" if tokens else "")
        left = seconds * (steps - done)
        yield "rate", rate + (f", about {_duration(left)} left" if live and left > 0 else "")
    if saved:
        yield "checkpoint", f"{saved.name}, {_ago(saved)}"
    elif wrong:
        yield "checkpoint", wrong
    elif begun:
        yield "checkpoint", "none yet"


def _rows(metrics: Path) -> list[dict[str, Any]]:
    """The steps that are recorded, without a line that is cut off or being written."""
    rows = []
    for line in (_text(metrics) or "").splitlines():
        try:
            row = json.loads(line)
            rows += [row] if isinstance(row["step"], int) else []
        except (ValueError, KeyError, TypeError):
            continue
    return rows


def _ranks(folder: Path, live: bool | None) -> Iterator[Row]:
    found = read_beats(RunFolder(folder).logs)
    beats = {rank: beat for rank, (beat, _) in found.items()}
    if not beats:
        return
    places: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        places.setdefault(beat.place, []).append(rank)
    for place, there in places.items():
        yield ("now" if live else "was in"), f"{place}: rank{'s' * (len(there) > 1)} {runs(there)}"
    least, most = (extreme(beat.changes for beat in beats.values()) for extreme in (min, max))
    if live and least < most:
        behind = [rank for rank, beat in beats.items() if beat.changes == least]
        yield "waits for", f"rank{'s' * (len(behind) > 1)} {runs(behind)}, {most - least} changes of phase behind"
    quietest = max(beats.values(), key=lambda beat: beat.silence)
    words = f"silent {quietest.silence:.1f} s of {quietest.limit:.1f} s"
    yield "beat", f"rank {quietest.rank} is the quietest: {words}, written {_ago(found[quietest.rank][1])}"


def _jobs(folder: Path) -> Iterator[Row]:
    """Of a run that was submitted: its jobs that are not over yet, as squeue has them."""
    script = RunFolder(folder.resolve()).script
    if not script.exists():
        return
    if shutil.which("squeue") is None:
        yield "job", "squeue is not here: ask where the run was submitted"
        return
    words = ("squeue", "--me", "-h", "-o", "%i|%T|%r|%S|%N|%o")
    try:
        done = subprocess.run(words, capture_output=True, encoding="utf-8", errors="replace", timeout=ASK_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        yield "job", f"squeue gives no answer: {error}"
        return
    if done.returncode:
        yield "job", f"squeue gives no answer: {' '.join(done.stderr.split())[:200]}"
        return
    mine = [line.split("|", 5) for line in done.stdout.splitlines() if line.endswith(f"|{script}")]
    if not mine:
        yield "job", "none in the queue"
    for number, state, reason, start, nodes, _ in mine:
        facts = [_on(nodes) if nodes else "", f"({reason})" if reason not in ("", "None") else ""]
        facts += [f"to start {start}" if state == "PENDING" and start not in ("", "N/A") else ""]
        yield "job", " ".join([number, state.lower(), *filter(None, facts)])


def _on(nodes: str) -> str:
    """on rl[0-3,7] (5 nodes)"""
    try:
        count = len(node_names(nodes))
    except ValueError:  # an odd answer is shown as it is
        return f"on {nodes}"
    return f"on {nodes} ({count} nodes)" if count > 1 else f"on {nodes}"


def _last_words(folder: Path) -> Iterator[Row]:
    """What ended the run the last time, as far as something said so."""
    logs = RunFolder(folder).logs
    if (stall := stalled(logs)) is not None:
        yield "stall", stall.strip()
    attempts = [path for path in logs.glob("attempt-*") if path.name.partition("-")[2].isdecimal()]
    attempts.sort(key=lambda path: int(path.name.partition("-")[2]))
    for path in sorted(attempts[-1].glob("rank-*.words"))[:3] if attempts else []:
        try:
            said = json.loads((_text(path) or "").partition("\n")[0])
            yield "last words", f"{path.stem.replace('-', ' ')}: {said['kind']}: {said['message']}"
        except (ValueError, KeyError, TypeError):
            continue  # cut off
    outputs = sorted(logs.glob("slurm-*.out"), key=lambda path: path.stat().st_mtime)
    lines = [line for line in (_text(outputs[-1]) or "").splitlines() if line.strip()] if outputs else []
    if lines:
        yield "job said", f"{lines[-1].strip()[:300]} ({outputs[-1].name})"


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None


def _ago(path: Path) -> str:
    try:
        return f"{_duration(max(0.0, time.time() - path.stat().st_mtime))} ago"
    except OSError:
        return "just removed"


def _duration(seconds: float) -> str:
    """75 → 1 min; 7,500 → 2 h 5 min"""
    hours, days = seconds / 3600, seconds / 86400
    if seconds < 60:
        return f"{seconds:.0f} s"
    if hours < 1:
        return f"{int(seconds / 60)} min"
    return f"{int(hours)} h {int(seconds / 60) % 60} min" if days < 2 else f"{int(days)} days {int(hours) % 24} h"
