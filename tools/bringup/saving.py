"""Experiment 8: a checkpoint that is written while rollouts run, a kill, and the same run from the checkpoint.

The first process updates, publishes, saves from where the optimizer then lies (on CUDA the host) in a thread while the
engine samples, updates again, and is killed. The second reads the checkpoint and takes that update: weights, masters
and moments must be the first's, bit for bit.
"""

from __future__ import annotations

import os
import signal
import tempfile
import threading
import time
from pathlib import Path

import torch
from torch import Tensor

from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.run.store import Saving, Share

from .colocated import Colocated, colocate, requests_of
from .rank import CLIPPED, LENGTHS, alone, batch_of, config, draw_sequences, make_model
from .ranks import together
from .report import Report

SECTIONS = {"optimizer": {"lr": 1e-4}}


def tensors(learner: Learner) -> list[Tensor]:
    """Weights, masters and moments, on the host."""
    held = [*learner.parameters().values(), *learner.arena._optimizer_tensors()]
    return [tensor.detach().cpu().clone() for tensor in held]


def update(learner: Learner, seed: int) -> None:
    """On rollouts that follow from the seed; their old log-probs are this learner's."""
    sequences = draw_sequences(learner.facts.vocab, LENGTHS, seed)
    old = torch.cat(learner.logprobs(sequences))
    learner.update(batch_of(sequences, old, torch.linspace(-1, 1, len(sequences))), CLIPPED)


def first_on(report: Report, folder: Path, both: Colocated) -> None:
    """Ends with this process killed."""
    learner, requests = both.learner, requests_of(both.facts.vocab, 32)
    with both.residency.publishing():
        both.publish()
    with both.residency.rollout():
        plain = both.sample(requests)
    with both.residency.training():
        update(learner, 1)
    with both.residency.publishing():
        both.publish()
    torch.save(learner.state(), folder / "state.pt")
    shares: list[Share] = []
    ended: list[float] = []
    (folder / "checkpoint").mkdir()
    with both.residency.rollout():
        saving = Saving(learner.sharded_state(), folder / "checkpoint")

        def write() -> None:
            shares.append(saving.write())
            ended.append(time.perf_counter())

        thread = threading.Thread(target=write)
        began = time.perf_counter()
        thread.start()
        sampled = both.sample(requests)
        rollouts = time.perf_counter() - began
        thread.join()
    saving.complete(shares)
    report.number("seconds of rollouts, of writing beside them", [rollouts, ended[0] - began])
    report.number("bytes written", saving.bytes)
    report.holds("rollouts came while it was written", len(sampled) == len(plain) and bool(shares))
    with both.residency.training():
        update(learner, 2)
    torch.save({"schedule": learner.state(), "tensors": tensors(learner)}, folder / "first.pt")
    os.kill(os.getpid(), signal.SIGKILL)


def second_on(report: Report, backend: Backend, folder: Path) -> None:
    cluster, model = alone(backend), folder / "model"
    learner = Learner(cluster, read_facts(model), config(model, backend, **SECTIONS), folder / "checkpoint")
    learner.restore(torch.load(folder / "state.pt"))
    before = tensors(learner)
    update(learner, 2)
    wanted = torch.load(folder / "first.pt")
    found = tensors(learner)
    report.number("tensors", len(found))
    equal = [torch.equal(a, b) for a, b in zip(found, wanted["tensors"], strict=True)]
    report.holds("weights, masters and moments after the next update, to the last bit", all(equal))
    report.holds("the update changed them", not all(torch.equal(a, b) for a, b in zip(before, found, strict=True)))
    report.holds("the schedule is where it was", learner.state() == wanted["schedule"])
    report.headline(f"{sum(equal)} of {len(equal)} tensors equal to the last bit after kill and resume")


def _first(report: Report, folder: Path) -> None:
    first_on(report, folder, colocate(folder / "model", CUDA, sections=SECTIONS))


def _second(report: Report, folder: Path) -> None:
    second_on(report, CUDA, folder)


def saving(report: Report, first: str = "saving:_first", second: str = "saving:_second") -> None:
    with tempfile.TemporaryDirectory() as place:
        make_model(folder=Path(place, "model"))
        together(report, first, 1, Path(place), 300, killed=True)
        together(report, second, 1, Path(place), 250)
