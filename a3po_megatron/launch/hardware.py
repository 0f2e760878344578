"""What this machine computes with, found out without starting CUDA in this process."""

from __future__ import annotations

import os
import re
from dataclasses import replace

from ..config import Config
from ..errors import RequestError
from ..model.precision import Hardware
from ..preflight.gpus import Gpu, planned_gpu
from . import environment
from .doctor.probe import QUERY, installed, output, parse_gpus, torch_cuda


def find_hardware() -> Hardware:
    """Raises RequestError where there is a GPU whose driver does not answer."""
    if not environment.sees_gpu():
        return Hardware(None, None, None)
    _, gpus = parse_gpus(output("nvidia-smi", f"--query-gpu={','.join(QUERY)}", "--format=csv,noheader,nounits"))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and all(part.strip().isdecimal() for part in visible.split(",")):  # else by UUID: all
        gpus = tuple(gpu for gpu in gpus if gpu.index in {int(part) for part in visible.split(",")})
    if not gpus:
        raise RequestError("there is a GPU, but nvidia-smi names none that is visible: see a3po doctor")
    cuda = _version(torch_cuda())
    engine = _version(installed("transformer-engine"))
    memory = min(gpu.memory_mib for gpu in gpus) << 20
    return Hardware(min(gpu.capability for gpu in gpus), cuda and cuda[:2], engine, len(gpus), memory)


def gpu_here(config: Config) -> Gpu | None:
    """Returns the GPU that a run on this machine is planned with; None on a CPU."""
    memory = find_hardware().memory if config.cluster.device != "cpu" else 0
    if not memory:
        return None
    known = planned_gpu(config, memory)
    return known if config.cluster.gpu else replace(known, memory=memory)


def gpus_here() -> int:
    """Returns how many GPUs of this machine a run may take."""
    return find_hardware().gpus


def _version(text: str | None) -> tuple[int, ...] | None:
    return None if text is None else tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
