"""The cases of judge.py's rows that take more than a look: each function returns those in which something would fail,
as far as no cause that has a row of its own explains it."""

from __future__ import annotations

import re

from ...model.precision import FP32_SCALES, TE_WINDOW
from .. import environment
from .probe import Found

SHM_BYTES = 1 << 30  # what NVIDIA's containers are to be started with


def size(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 1 << 30 else f"{count / 2**20:.0f} MiB"


def version(text: str) -> tuple[int, ...]:
    """2.13.0+cu130 → (2, 13, 0)"""
    return tuple(int(part) for part in re.findall(r"\d+", text.partition("+")[0]))


def peers(found: Found) -> list[str]:
    blind = [tuple(pair) for pair in found.step("peers").get("without", [])] if found.driver is not None else []
    return [", ".join(f"{a}–{b} ({found.links.get((a, b), '?')})" for a, b in blind)] if blind else []


def unseen(found: Found) -> list[int]:
    """Of how many GPUs torch sees only some."""
    some = 0 < found.step("device").get("count", 0) < len(found.gpus)
    chosen = "CUDA_VISIBLE_DEVICES" in found.environment
    return [len(found.gpus)] if found.torch_loads and some and not chosen else []


def toolkit(found: Found) -> list[int]:
    """The CUDA that the toolkit should be of."""
    wanted = version(found.torch_cuda)[0] if found.torch_cuda else None
    return [wanted] if wanted and found.toolkit and version(found.toolkit)[0] != wanted else []


def other_nccl(found: Found) -> bool:
    runs, installed = found.step("nccl").get("version", ""), found.packages.get("nvidia-nccl-cu13", "")
    return bool(runs and installed) and version(runs) != version(installed)


def two_cudnns(found: Found) -> list[str]:
    paths = found.step("cudnn").get("paths", [])
    return [", ".join(paths)] if len(paths) > 1 else []


def other_cudnn(found: Found) -> list[str]:
    """From where, if not the one installed beside torch."""
    runs, installed = found.step("cudnn").get("version"), found.packages.get("nvidia-cudnn-cu13")
    paths = found.step("cudnn").get("paths", [])
    if len(paths) > 1 or not (runs and installed) or version(runs)[:3] == version(installed)[:3]:
        return []
    return [f" from {path}" for path in paths] or [""]


def engine_window(found: Found) -> bool:
    whole = found.packages.get("transformer-engine")
    return whole is not None and not TE_WINDOW[0] <= version(whole)[:2] < TE_WINDOW[1]


def engine_parts(found: Found) -> list[str]:
    whole = found.packages.get("transformer-engine")
    parts = {name: found.packages.get(name) for name in ("transformer-engine-torch", "transformer-engine-cu13")}
    unlike = {name: part for name, part in parts.items() if whole is not None and part != whole}
    return [f"{name} {'is missing' if part is None else f'is {part}'}" for name, part in unlike.items()]


def symbols(found: Found) -> list[str | None]:
    """The torch beside which it was not compiled."""
    missing = "undefined symbol" in found.step("engine").get("error", "")
    return [found.packages.get("torch")] if missing and "transformer-engine" in found.packages else []


def engine_import(found: Found) -> bool:
    if "transformer-engine" not in found.packages or not found.failed("engine") or symbols(found):
        return False
    no_driver = found.driver is None and "libcuda" in found.step("engine")["error"]
    return not (engine_parts(found) or found.failed("torch") or no_driver)


def scales(found: Found) -> list[str]:
    scales = found.environment.get(FP32_SCALES)
    return [scales or "not set"] if scales != "1" and "transformer-engine" in found.packages else []


def allocator(found: Found) -> list[str]:
    both, read = found.environment.get("PYTORCH_ALLOC_CONF"), found.environment.get("PYTORCH_CUDA_ALLOC_CONF")
    return [read or "not set"] if both is not None and read != both else []


def flashinfer(found: Found) -> list[str]:
    """Runs do without it whether it is there or not, as long as nobody turns it on: what it does would follow PATH."""
    values = {name: found.environment.get(name, "0") for name in environment.FLASHINFER if "vllm" in found.packages}
    return [f"{name} is {value}" for name, value in values.items() if value != "0"]


def deep_gemm(found: Found) -> bool:
    """vLLM chooses it for FP8 because it is installed, and ends at loading where it cannot be imported."""
    off = found.environment.get("VLLM_USE_DEEP_GEMM", "1") == "0"
    return found.failed("deep_gemm") and found.kernels_run and not off


def small_shm(found: Found) -> list[str]:
    return [size(found.shm_bytes)] if found.shm_bytes is not None and found.shm_bytes < SHM_BYTES else []


def full_shm(found: Found) -> list[str]:
    free = found.shm_free_bytes
    return [size(free)] if free is not None and free < SHM_BYTES and not small_shm(found) else []


def memlock(found: Found) -> list[str]:
    return [size(found.memlock_bytes)] if found.memlock_bytes is not None and found.gpus else []
