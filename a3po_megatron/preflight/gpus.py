"""GPUs by name, and what of their memory a program can have."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass

from ..config import Config
from ..config.slurm_forms import gpu_counts
from ..errors import RequestError
from .overhead import GIB

USUAL = "h200"


@dataclass(frozen=True)
class Gpu:
    name: str
    memory: int  # bytes that CUDA reports as total
    hopper: bool = True  # or newer


def _gpus(*rows: tuple[str, float, bool]) -> dict[str, Gpu]:
    return {name: Gpu(name, int(gib * GIB), hopper) for name, gib, hopper in rows}


# As torch reports them (torch.cuda.mem_get_info): 80 GB cards have 79.1 to 79.2 GiB, H200 139.8.
GPUS = _gpus(
    ("a100-40gb", 39.4, False),
    ("a100", 79.1, False),
    ("h800", 79.1, True),
    ("h100", 79.1, True),
    ("h20", 95.0, True),
    ("h100-96gb", 93.1, True),
    ("gh200", 94.5, True),
    ("h200", 139.8, True),
    ("b200", 178.3, True),
    ("b300", 267.6, True),
)


def planned_gpu(config: Config, here: int = 0) -> Gpu:
    """Returns the GPU that a run is planned for: the one it names, the one of `here` bytes that this machine has, the
    one whose type slurm.gpus_per_node asks for, else an H200. Raises RequestError for one that is not known."""
    if config.cluster.gpu:
        return gpu_of(config.cluster.gpu)
    if here:
        return min(GPUS.values(), key=lambda gpu: abs(gpu.memory - here))
    kind = next(iter(gpu_counts(str(config.slurm.gpus_per_node))), "")
    if not kind:
        return GPUS[USUAL]
    said = kind.lower().replace("_", "-")
    within = [name for name in GPUS if all(part in said for part in name.split("-"))]  # nvidia_h200 is one
    if not within:
        raise RequestError(
            f"slurm.gpus_per_node = {config.slurm.gpus_per_node}: how much memory a {kind} has is not known: say in "
            f"cluster.gpu, as 48G, or which of these it is: {', '.join(GPUS)}"
        )
    return GPUS[max(within, key=len)]


def gpu_of(name: str) -> Gpu:
    """Raises RequestError for a name that nobody gave a GPU."""
    known = name.lower().removeprefix("nvidia-")
    if re.fullmatch(r"\d+g", known):  # one that is not in the table, by its memory
        return Gpu(name, int(known[:-1]) * GIB)
    if known in GPUS:
        return GPUS[known]
    near = difflib.get_close_matches(known, GPUS, 1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise RequestError(f"no GPU is called {name!r}: {', '.join(GPUS)}, or its memory as 48G{hint}")
