"""Prints what is installed, what is missing, what this machine can do. Starts nothing, changes nothing."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from . import tools
from .cases import size
from .judge import HERE, check, judge
from .probe import ROOT, Found, Installation, installation, installed, probe

LOCKS = ROOT / "constraints"


def examine(gpu: bool = False, quantized: bool = False) -> bool:
    """Prints the tables; True if a run can start on this machine; `quantized`: one whose rollouts are in FP8.

    The CUDA path is looked at where the installation is for it, or where it is asked for: a GPU alone does not stop the
    CPU path.
    """
    console = Console(highlight=False)
    here = installation(gpu)
    console.print(_packages(here))
    console.print(_machine())
    findings = judge(HERE, here)
    if here.cuda or gpu:
        facts = probe()
        console.print(_table("GPU", rows(facts)))
        findings += check(facts, quantized)
    problems = [finding for finding in findings if finding.fatal]
    warnings = [finding for finding in findings if not finding.fatal]
    for kind, some in (("warning", warnings), ("problem", problems)):
        for finding in some:
            console.print(f"{kind}: {finding.text}", markup=False, soft_wrap=True)
    if not problems:
        console.print("no problem found")
    return not problems


def _table(title: str, rows: list[tuple[str, str]]) -> Table:
    table = Table("what", "found", title=title)
    for row in rows:
        table.add_row(*row)
    return table


def _packages(here: Installation) -> Table:
    """Versions against the constraints: the few that matter, and every other one that differs."""
    lock = LOCKS / ("h200.txt" if here.cuda else "cpu.txt")
    table = Table("package", "installed", "pinned" if here.cuda else "tested with", title=lock.name)
    pinned = dict(re.findall(r"^([A-Za-z0-9._-]+)==(\S+)$", lock.read_text(), re.MULTILINE)) if lock.exists() else None
    for name, wanted in (dict.fromkeys(here.main, "?") if pinned is None else pinned).items():
        version = installed(name)
        # Of builds of one version (+cpu, +cu130) the constraints for CUDA name none.
        same = version == wanted or (here.cuda and version is not None and version.partition("+")[0] == wanted)
        if name in here.main or not same:
            table.add_row(name, version or "missing", wanted)
    return table


def _machine() -> Table:
    rows = [("python", platform.python_version()), ("platform", platform.platform())]
    rows.append(("cores", str(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())))
    if hasattr(os, "sysconf"):
        rows.append(("memory", f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"))
    return _table("this machine", [*rows, *tools.rows()])


def rows(found: Found) -> list[tuple[str, str]]:
    """What was found, for a table."""
    child = found.child
    steps: dict[str, str] = {name: facts.get("version", "") for name, facts in child.items() if "version" in facts}
    links = ", ".join(sorted(set(found.links.values()))) or ("one GPU" if len(found.gpus) == 1 else "unknown")
    reason, tools = child.get("fp8", {}).get("blockwise"), child.get("tools", {})
    return [
        ("driver", found.driver or "none"),
        *(
            (f"GPU {g.index}", f"{g.name}, sm{g.capability[0]}{g.capability[1]}, {g.memory_mib} MiB")
            for g in found.gpus
        ),
        ("links", links if found.gpus else "none"),
        ("CUDA toolkit", found.toolkit or "none"),
        ("torch for CUDA", found.torch_cuda or "no"),
        ("NCCL", steps.get("nccl", "unknown")),
        ("cuDNN, as TE sees it", steps.get("cudnn", "unknown")),
        ("Transformer Engine", found.packages.get("transformer-engine", "missing")),
        ("C compiler", found.compiler or "none"),
        *((name, tools.get(name) or ("none" if tools else "unknown")) for name in ("nvcc", "ninja")),
        ("FlashInfer, as vLLM sees it", _flashinfer_row(child.get("flashinfer", {}))),
        ("DeepGEMM", _there(child.get("deep_gemm", {}))),
        ("FP8 blockwise", "unknown" if reason is None else reason or "yes"),
        ("apex", "none" if "apex" not in found.packages else "NVIDIA's" if found.amp_c else "not NVIDIA's"),
        ("/dev/shm", "none" if found.shm_bytes is None else f"{size(found.shm_free_bytes or 0)} free"),
        ("locked memory", "unlimited" if found.memlock_bytes is None else size(found.memlock_bytes)),
    ]


def _there(facts: Mapping[str, Any]) -> str:
    return facts.get("error") or {True: "yes", False: "no", None: "unknown"}[facts.get("there")]


def _flashinfer_row(facts: Mapping[str, Any]) -> str:
    """What has_flashinfer() answers; why no run goes by it: ranks.backend.CUDA, environment.FLASHINFER."""
    return f"{_there(facts)}; no matter: sampling, all-reduce, FP8 products and autotuning by it are off in every run"
