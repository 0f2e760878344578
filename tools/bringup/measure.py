"""How things are measured: errors against a reference, seconds by device events, peak bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor


def relative(found: Tensor, wanted: Tensor) -> float:
    """‖found − wanted‖ / ‖wanted‖ in float64; NaN where one of them is not finite."""
    a, b = found.detach().double().cpu(), wanted.detach().double().cpu()
    return float((a - b).norm() / b.norm().clamp(min=1e-300))


def largest(found: Tensor, wanted: Tensor) -> float:
    """max |found − wanted|; NaN stays."""
    return float((found.detach().double().cpu() - wanted.detach().double().cpu()).abs().max())


def settle(device: torch.device) -> None:
    """Waits for everything that was asked of the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: torch.device, rounds: int = 10, warm: int = 3) -> float:
    """The median over `rounds`, after `warm` that do not count: compilation and handles are made in those."""
    for _ in range(warm):
        work()
    settle(device)
    found = []
    for _ in range(rounds):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            end.synchronize()
            found.append(start.elapsed_time(end) / 1e3)
        else:
            begin = time.perf_counter()
            work()
            found.append(time.perf_counter() - begin)
    return statistics.median(found)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """Device memory that the work held at its worst, beyond what was there before; None on a CPU."""
    if device.type != "cuda":
        return None
    settle(device)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    settle(device)
    return torch.cuda.max_memory_allocated() - before


def free_bytes() -> int:
    """Of the device, whoever has the rest: torch's pools, vLLM's, the driver's."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def copy_bandwidth(device: torch.device, size: int = 4 << 30) -> float:
    """Bytes read plus bytes written a second of a large copy within the device: the ceiling of whatever moves bytes."""
    source = torch.empty(size // 4, device=device).normal_()  # zeros would copy faster than data does
    target = torch.empty_like(source)
    return 2 * size / seconds(lambda: target.copy_(source), device)
