"""The demo learns: `make soak` trains it for three seeds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

import pytest

from tests.distributed.runner import ROOT


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_correct_rate_of_the_demo_rises_by_at_least_0_15_within_forty_steps(seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "a3po_megatron", "train", "configs/arithmetic.yaml", "--run-dir", str(folder)]
    options = ["--set", f"trainer.seed={seed}", "--set", "trainer.steps=40"]
    subprocess.run([*command, *options], cwd=ROOT, check=True, timeout=900)
    rates = [json.loads(line)["reward/correct_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert len(rates) == 40
    # Means of five steps: about 2,000 rollouts each, a standard error of 0.011.
    assert 0.3 <= mean(rates[:5]) <= 0.5
    assert mean(rates[-5:]) - mean(rates[:5]) >= 0.15
