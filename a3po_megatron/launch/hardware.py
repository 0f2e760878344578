"""What this machine computes with, found out without starting CUDA in this process."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess

from ..errors import RequestError
from ..model.precision import Hardware
from . import environment


def find_hardware() -> Hardware:
    """Raises RequestError where there is a GPU whose driver does not answer."""
    if not environment.sees_gpu():
        return Hardware(None, None, None)
    import torch

    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=60, check=True).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RequestError(f"there is a GPU, but nvidia-smi does not answer: {error}; see a3po doctor") from error
    found = [(int(major), int(minor)) for major, minor in re.findall(r"^(\d+)\.(\d+)$", answer, re.MULTILINE)]
    try:
        engine = _version(importlib.metadata.version("transformer-engine"))
    except importlib.metadata.PackageNotFoundError:
        engine = None
    cuda = _version(torch.version.cuda) if torch.version.cuda else None
    return Hardware(min(found, default=None), cuda[:2] if cuda else None, engine)  # type: ignore[arg-type]


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", text.partition("+")[0])[:3])
