"""The experiments of tools/gpu_bringup.py for the tests of this folder: each runs once, in a process of its own."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from tools.bringup import machine
from tools.bringup.experiments import by_id
from tools.bringup.runner import run

NEEDS_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@functools.cache
def _lacks() -> dict[str, str]:
    return dict(machine.look()["lacks"])


@functools.cache
def _record(name: str) -> dict[str, Any]:
    return run(by_id(name), _lacks())


def shown(name: str) -> dict[str, Any]:
    """The numbers of an experiment all of whose claims hold; skips where something that it needs is not installed.

    Every claim's bound, and why it is that, stands beside it in tools/bringup.
    """
    record = _record(name)
    if record["status"] == "left out":
        pytest.skip(record["reason"])
    wrong = [claim for claim in record["claims"] if not claim["holds"]]
    assert record["status"] == "shown", (record["reason"], wrong, record["last_lines"])
    return dict(record["numbers"])
