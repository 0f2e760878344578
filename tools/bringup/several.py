"""Experiment 9: engines on two GPUs. One over both (rollout.tensor 2), and two beside each other (2 × 1).

Start, sleep, reload with its receipt, and the same tokens on both ranks: those of one engine hold one result each, and
two engines with equal weights, requests and kernels compute alike.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path
from typing import Any

from a3po_megatron.config import ParallelOptions
from a3po_megatron.ranks.backend import CUDA, Backend

from .colocated import colocate, in_flight, logprobs_of, requests_of, stops_of
from .engine import BF16_RATIO, gap
from .rank import TINY, join, make_model
from .ranks import together
from .report import Report

CYCLES = 3


def engines_on(report: Report, backend: Backend, folder: Path, tensor: int, cycles: int = CYCLES) -> None:
    """`tensor`: of the engine and of the learner alike; the ranks that are left are data-parallel."""
    parallel = {"tensor": tensor, "data": 2 // tensor}
    cluster = join(backend, ParallelOptions(**parallel), tensor)
    stops = stops_of(TINY["vocab_size"])
    both = colocate(
        folder / "model", backend, stops=stops, cluster=cluster, sections={"parallel": parallel}, tensor=tensor
    )
    settings: Any = both.engine._llm.llm_engine.vllm_config.parallel_config
    report.number("disable_custom_all_reduce", bool(settings.disable_custom_all_reduce))
    requests, digests = requests_of(both.facts.vocab, 16), []
    for _ in range(cycles):
        with both.residency.publishing():
            receipt = both.publish()
        with both.residency.rollout():
            completions = both.sample(requests)
            report.claim("steps left in vLLM's queue", in_flight(both.engine), 0)
        tokens = b"|".join(c.tokens.tobytes() + c.logprobs.tobytes() for c in completions)
        digests.append(hashlib.blake2b(tokens).hexdigest())
        with both.residency.training():
            difference = gap(logprobs_of(completions), both.scores(requests, completions))
    by_rank = cluster.agree("tokens", digests, list)
    report.holds("tokens and log-probs are equal on both ranks, to the last bit", by_rank[0] == by_rank[1])
    report.holds(f"and after each of {cycles} reloads", len(set(digests)) == 1)
    report.holds(f"the receipt says `{backend.receipt_strength}`", receipt.strength == backend.receipt_strength)
    report.number("learner, engine", difference)
    report.claim("mean exp |Δ log-prob|", difference["exp_abs_mean"], BF16_RATIO)
    report.headline(f"{cycles} cycles, mean |Δ log-prob| {difference['abs_mean']:.4f}")


def _tensor(report: Report, folder: Path) -> None:
    engines_on(report, CUDA, folder, 2)


def _data(report: Report, folder: Path) -> None:
    engines_on(report, CUDA, folder, 1)


def start(report: Report, function: str, **options: Any) -> None:
    with tempfile.TemporaryDirectory() as place:
        make_model(folder=Path(place, "model"))
        together(report, function, 2, Path(place), 500, **options)


def tensor_engine(report: Report) -> None:
    start(report, "several:_tensor")


def two_engines(report: Report) -> None:
    start(report, "several:_data")


def tensor_engine_bound(report: Report) -> None:
    start(report, "several:_tensor", one_device=True)
