"""Runs experiments, each in a process of its own with a time limit, and says of each what came of it.

    shown      it ran to its end, and every claim it made holds
    failed     it crashed, hung, ran out of memory, or a claim does not hold: the record says which
    refused    device, library or package decline what it is about
    left out   something it needs is not here

An experiment is a function of a Report. A hang is ended with its whole process group; its last words are every thread's
stack. What it had said until then stays in the record.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import faulthandler
import importlib
import os
import re
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .report import Refused, Report, read_lines, summary

ROOT = Path(__file__).resolve().parents[2]
LAST_LINES = 12  # of a failed experiment's output
GRACE = 5.0  # seconds before the limit at which every thread's stack is written down
STATUSES = ("shown", "failed", "refused", "left out")
MODEL = "A3PO_BRINGUP_MODEL"  # an HF folder of the user's own, for experiments that take one
_REFUSED = 3  # exit code
_LIBC = ctypes.CDLL(None)


@dataclass(frozen=True)
class Experiment:
    id: str  # 1a: part a of experiment 1
    title: str
    function: str  # module:function; the module is found from ROOT or below this package
    needs: tuple[str, ...] = ("cuda",)  # keys of Machine.lacks
    seconds: float = 300  # the limit
    environment: Mapping[str, str] = field(default_factory=dict)  # set before anything is imported
    expected: float = 60  # seconds, a guess until a GPU has measured it
    decides: str = ""  # the claim


def run_all(
    experiments: Sequence[Experiment],
    lacks: Mapping[str, str],
    limit: float | None = None,
    logs: Path | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, dict[str, Any]]:
    """Id → record, in order. `lacks`: what is not here → why; `limit`: seconds for each, in place of its own."""
    records = {}
    for experiment in experiments:
        record = run(experiment, lacks, limit, logs)
        records[experiment.id] = record
        tell(f"{experiment.id:4}{record['status']:10}{record['seconds']:7.1f} s  {record['headline']}")
    return records


def run(
    experiment: Experiment, lacks: Mapping[str, str], limit: float | None = None, logs: Path | None = None
) -> dict[str, Any]:
    """One experiment's record."""
    began = time.perf_counter()
    missing = [lacks[need] for need in experiment.needs if need in lacks]
    if missing:
        return _record(experiment, "left out", missing[0], [], 0.0)
    limit = limit or experiment.seconds
    with tempfile.TemporaryDirectory(prefix=f"bringup-{experiment.id}-") as place:
        said, log = Path(place, "said"), (logs or Path(place)) / f"{experiment.id}.log"
        command = [sys.executable, "-m", "tools.bringup.runner", experiment.function, str(said), str(limit)]
        command += ["megatron"] * ("megatron" in experiment.needs)
        path = os.pathsep.join(
            [str(ROOT), *filter(None, [experiment.environment.get("PYTHONPATH"), os.environ.get("PYTHONPATH")])]
        )
        settings = {**os.environ, **experiment.environment, "PYTHONPATH": path, "TMPDIR": place}
        with log.open("w") as output:
            process = subprocess.Popen(
                command, cwd=ROOT, env=settings, stdout=output, stderr=output, start_new_session=True, preexec_fn=_die
            )
            try:
                code: int | None = process.wait(limit)
            except subprocess.TimeoutExpired:
                code = None
            finally:
                _end(process)
        lines, words = read_lines(said), _tail(log)
    status, reason = _verdict(code, lines, words, limit)
    return _record(experiment, status, reason, lines, time.perf_counter() - began, words, code is None)


def _verdict(code: int | None, lines: list[dict[str, Any]], words: list[str], limit: float) -> tuple[str, str]:
    """Status and, unless it was shown, why."""
    if code is None:
        return "failed", f"it did not end within {limit:g} s"
    last = words[-1] if words else "without a word"
    if code == _REFUSED:
        return "refused", last
    if code < 0:
        return "failed", f"killed by {signal.Signals(-code).name}"
    if code > 0:
        return "failed", last
    if not any("ended" in line for line in lines):
        return "failed", "the process ended before the experiment did"
    wrong = [line["claim"] for line in lines if "claim" in line and not line["holds"]]
    return (
        ("failed", f"not so: {wrong[0]}" + f" (and {len(wrong) - 1} more)" * (len(wrong) > 1))
        if wrong
        else (
            "shown",
            "",
        )
    )


def _record(
    experiment: Experiment,
    status: str,
    reason: str,
    lines: list[dict[str, Any]],
    seconds: float,
    words: Sequence[str] = (),
    cut: bool = False,  # it reached its limit
) -> dict[str, Any]:
    found = summary(lines)
    return {
        "title": experiment.title,
        "status": status,
        "reason": reason,
        "seconds": round(seconds, 1),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        **found,
        "headline": found["headline"] if status == "shown" else reason,
        "cut": cut,
        "environment": dict(experiment.environment),
        "last_lines": [] if status in ("shown", "left out") else list(words),
    }


def _die() -> None:
    """The kernel ends this process when its parent ends."""
    if sys.platform == "linux":
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def _end(process: subprocess.Popen[bytes]) -> None:
    """The experiment and whatever it started: the session is its own, so the group holds nobody else."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _tail(log: Path) -> list[str]:
    lines = [clean(line) for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-LAST_LINES:]


def clean(line: str) -> str:
    """Without what is this machine's alone: where the code, the packages and the temporary files lie."""
    line = re.sub(r"/\S*/bringup-[^/\s]+", "$TMPDIR", line.rstrip())
    for path, name in (
        (str(ROOT) + os.sep, ""),
        (sysconfig.get_path("purelib"), "site-packages"),
        (sysconfig.get_path("stdlib"), "python"),
        (sys.prefix, "$VENV"),
        (str(Path.home()), "~"),
    ):
        line = line.replace(path, name) if len(path) > 1 else line
    return line[:400]


def _load(function: str) -> Callable[[Report], None]:
    module, _, name = function.partition(":")
    package = "tools.bringup." if (Path(__file__).parent / f"{module}.py").exists() else ""
    return getattr(importlib.import_module(package + module), name)  # type: ignore[no-any-return]


def _main(function: str, said: Path, limit: float, megatron: bool) -> None:
    """The experiment's own process. It ends with os._exit: a GPU library that crashes while it is unloaded has shown
    nothing about the experiment."""
    faulthandler.enable()
    if limit > 2 * GRACE:
        faulthandler.dump_traceback_later(limit - GRACE)
    code, report = 0, Report(said)
    try:
        from a3po_megatron.launch import environment

        environment.prepare()
        if megatron:
            from a3po_megatron import compat

            compat.prepare()
        _load(function)(report)
        report.ended()
    except Refused as error:
        print(f"refused: {error}", file=sys.stderr)
        code = _REFUSED
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]), "megatron" in sys.argv[4:])
