"""Experiment 6: `a3po train configs/arithmetic.yaml` on one GPU, as a user would start it."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .report import Report
from .runner import ROOT

STEPS = 40
# The soak test's claim about the demo (tests/test_demo.py): correct at least so much more often after forty steps.
RISE = 0.15


def train(folder: Path, settings: Sequence[str], seconds: float) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl. Raises CalledProcessError with whatever the run said on its way out."""
    command = [sys.executable, "-m", "a3po_megatron", "train", "configs/arithmetic.yaml", "--run-dir", str(folder)]
    options = [word for setting in settings for word in ("--set", setting)]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=seconds)
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def judge(report: Report, rows: Sequence[dict[str, Any]], steps: int, rise: float | None = RISE) -> None:
    report.holds(f"{steps} steps recorded, in order", [row["step"] for row in rows] == list(range(steps)))

    def values(name: str) -> list[float]:
        return [float(row[name]) for row in rows if row.get(name) is not None]

    for name in ("learner/loss", "policy/grad_norm", "mismatch/logprob_abs_mean"):
        report.holds(f"{name}: finite", bool(values(name)) and all(math.isfinite(v) for v in values(name)))
    rates = values("reward/correct_rate")
    first, last = statistics.fmean(rates[:5]), statistics.fmean(rates[-5:])
    report.number("correct rate, mean of the first and of the last five steps", [first, last])
    if rise is not None:
        report.claim_above("the correct rate rises", last - first, rise)
    # bf16 on both sides, kernels of their own: NeMo-RL's healthy runs are below a mean |Δ| of 0.05 by far.
    report.claim("mean mismatch learner − engine", statistics.fmean(values("mismatch/logprob_abs_mean")), 0.05)
    # Scored and updated in other packs: bf16 noise of a log-prob, some 1e-2; a stale weight would be 1 and more.
    report.claim(
        "|ratio − 1| in the first mini-batch, largest of all steps", max(values("policy/ratio_first_max")), 0.5
    )
    for name in (
        "refit/seconds",
        "perf/tokens_per_second",
        "perf/seconds_rollout",
        "perf/seconds_update",
        "perf/seconds_publish",
    ):
        if values(name):
            report.number(f"{name}, median", statistics.median(values(name)))
    report.headline(f"{steps} steps, correct {first:.2f} → {last:.2f}")


def demo(report: Report) -> None:
    with tempfile.TemporaryDirectory() as place:
        settings = ("model.dtype=bfloat16", "parallel.tensor=1", f"trainer.steps={STEPS}", "cluster.device=cuda")
        rows = train(Path(place, "run"), settings, 840)
        judge(report, rows, STEPS)
