"""Experiment 5h: device bytes in use while the engine sleeps, by what holds them.

context → communicators → engine asleep → awake → asleep again, each the device's bytes in use after the step before;
with CUDA graphs and without, in processes of their own: the difference is the graphs'.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.rollout.vllm_engine import VllmEngine

from .colocated import LENGTHS
from .measure import free_bytes
from .rank import HALF_BILLION, alone, config, make_model
from .ranks import together
from .report import Report

# vllm issue 28714's log says 1.2 GiB of a 4B model's engine; a weight or the cache that stays would be far beyond.
HELD_BYTES = 2 << 30
GROWN_BYTES = 64 << 20  # as of 5a's cycles


def holders_on(report: Report, backend: Backend, folder: Path, name: str, **rollout: Any) -> None:
    cuda = backend.device == "cuda"

    def used() -> int:
        if cuda:
            free_bytes()  # hands back what torch keeps in reserve
        return backend.used_bytes()

    cluster = alone(backend)
    ones = torch.ones(1, device=backend.local())
    rows = {"context": used()}
    dist.all_reduce(ones)
    rows["communicators"] = used()
    options = config(folder / "model", backend, rollout=LENGTHS | rollout).rollout
    engine = VllmEngine(folder / "model", read_facts(folder / "model"), (), options, torch.bfloat16, cluster.backend)
    rows["engine asleep"] = used()
    engine.wake()
    engine.forget()
    rows["engine awake"] = used()
    engine.sleep()
    rows["asleep again"] = used()
    steps = list(rows)
    held = {b: rows[b] - rows[a] for a, b in itertools.pairwise(steps)}
    report.number(f"{name}: device bytes in use after", rows)
    report.number(f"{name}: what each step added", held)
    if cuda:
        report.number(f"{name}: of torch's own pools", torch.cuda.memory_reserved())
        report.claim(f"{name}: bytes that a sleeping engine holds", held["engine asleep"], HELD_BYTES)
        report.claim(
            f"{name}: bytes more after a second sleep", rows["asleep again"] - rows["engine asleep"], GROWN_BYTES
        )
    (folder / f"{name}.json").write_text(json.dumps(held))
    report.headline(f"{held['engine asleep'] / 2**30:.2f} GiB held asleep")


def _graphs(report: Report, folder: Path) -> None:
    holders_on(report, CUDA, folder, "graphs")


def _eager(report: Report, folder: Path) -> None:
    holders_on(report, CUDA, folder, "eager", engine_args={"enforce_eager": True})


def holders(report: Report) -> None:
    with tempfile.TemporaryDirectory() as place:
        make_model(HALF_BILLION, folder=Path(place, "model"))
        for function in ("asleep:_eager", "asleep:_graphs"):
            together(report, function, 1, Path(place), 250)
        eager, graphs = (json.loads(Path(place, f"{name}.json").read_text()) for name in ("eager", "graphs"))
        report.number("bytes of the graphs", graphs["engine asleep"] - eager["engine asleep"])
