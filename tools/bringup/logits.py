"""Experiment 5g: the engine's output layer in float32, as CUDA.engine_args asks for, against bf16.

bf16 rounds a logit between 16 and 32 by up to 0.06, and vLLM samples and reports log-probs from what it rounded. Each
arm is a process of its own: vLLM's sleep allocator serves one engine.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
import time
from pathlib import Path

from a3po_megatron.ranks.backend import CUDA, Backend

from .colocated import colocate, logprobs_of, requests_of
from .engine import gap
from .measure import settle
from .rank import HALF_BILLION, make_model
from .ranks import together
from .report import Report

LOGITS = 8.0  # their scale: the largest of 32,000 is then some 32, as those of trained models
# Against a bf16 rounding that is half of the mismatch, no rounding leaves the other half at most as large.
BETTER = 1.05


def arm_on(report: Report, backend: Backend, folder: Path, head: str) -> None:
    arguments = {name: value for name, value in backend.engine_args.items() if name != "hf_overrides"}
    if head == "float32":
        arguments["hf_overrides"] = {"head_dtype": "float32"}
    both = colocate(folder / "model", dataclasses.replace(backend, engine_args=arguments))
    requests = requests_of(both.facts.vocab, 64)
    with both.residency.publishing():
        both.publish()
    with both.residency.rollout():
        both.sample(requests)  # what is compiled at first use
        settle(backend.local())
        began = time.perf_counter()
        completions = both.sample(requests)
        spent = time.perf_counter() - began
    with both.residency.training():
        found = gap(logprobs_of(completions), both.scores(requests, completions))
    found |= {"tokens_per_second": sum(len(c.tokens) for c in completions) / spent}
    report.number(f"output layer in {head}", found)
    (folder / f"{head}.json").write_text(json.dumps(found))


def compare(report: Report, folder: Path) -> None:
    wide, narrow = (json.loads((folder / f"{head}.json").read_text()) for head in ("float32", "bf16"))
    report.claim("mean |Δ log-prob|, float32 over bf16", wide["abs_mean"] / narrow["abs_mean"], BETTER)
    price = narrow["tokens_per_second"] / wide["tokens_per_second"]
    report.number("tokens/s, bf16 over float32", price)
    report.headline(
        f"mean |Δ log-prob| {wide['abs_mean']:.4f}, in bf16 {narrow['abs_mean']:.4f}; {price:.2f}× the time"
    )


def _float32(report: Report, folder: Path) -> None:
    arm_on(report, CUDA, folder, "float32")


def _bf16(report: Report, folder: Path) -> None:
    arm_on(report, CUDA, folder, "bf16")


def heads(report: Report) -> None:
    with tempfile.TemporaryDirectory() as place:
        make_model(HALF_BILLION, folder=Path(place, "model"), logits=LOGITS)
        for function in ("logits:_float32", "logits:_bf16"):
            together(report, function, 1, Path(place), 250)
        compare(report, Path(place))
