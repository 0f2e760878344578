"""The demo and the second example: same seed, same run; README's numbers; and, in `make soak`, what they show."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from types import ModuleType

import pytest

from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT

README = (ROOT / "README.md").read_text()


def train(folder: Path, config: str, *settings: str) -> str:
    """Trains to the end and returns what was printed."""
    command = [sys.executable, "-m", "a3po_megatron", "train", f"configs/{config}.yaml", "--run-dir", str(folder)]
    command += [word for setting in settings for word in ("--set", setting)]
    return subprocess.run(command, cwd=ROOT, check=True, timeout=1800, stdout=subprocess.PIPE, text=True).stdout


def values(folder: Path, metric: str) -> list[float]:
    return [json.loads(line)[metric] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.soak  # tests/test_resume.py shows as much of runs that were interrupted
def test_the_same_seed_gives_the_same_run_to_the_last_bit(tmp_path: Path) -> None:
    one, again, other = (tmp_path / name for name in ("one", "again", "other"))
    for folder in (one, again):
        train(folder, "demo", *tools.SMALL, "trainer.seed=5")
    tools.assert_same_run(again, one)
    train(other, "demo", *tools.SMALL, "trainer.seed=6", "trainer.steps=1")
    sampled = [[rollout["tokens"] for rollout in tools.rollouts_of(folder)[0]] for folder in (one, again, other)]
    assert sampled[0] == sampled[1] != sampled[2]


# ----- README


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_demo", ROOT / "tools/bench_demo.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_tables_of_the_readme_are_those_of_the_evidence(bench: ModuleType) -> None:
    rows = json.loads(bench.EVIDENCE.read_text())["runs"]
    for share, seeds in bench.TABLES:
        assert bench.table(rows, share, seeds) in README, (share, seeds)


def test_the_readme_says_of_the_bar_what_the_evidence_says(bench: ModuleType) -> None:
    rows, words = json.loads(bench.EVIDENCE.read_text())["runs"], " ".join(README.split())
    for seeds in (bench.SEEDS, bench.FURTHER_SEEDS):
        assert bench.verdict(rows, seeds) in words


def test_the_evidence_has_every_run_that_the_bench_makes(bench: ModuleType) -> None:
    rows = json.loads(bench.EVIDENCE.read_text())["runs"]
    assert [bench.Case(row["share"], row["arm"], row["seed"]) for row in rows] == bench.cases()


# ----- what they show


@pytest.mark.soak
def test_a3po_finds_reasoning_with_three_of_three_seeds_and_dapo_stays_far_below(tmp_path: Path) -> None:
    """The bar of the demo. Of 256 responses and more a step: a standard error of at most 0.03, at 0.9 of 0.02."""
    ends: dict[str, list[float]] = {"demo": [], "demo-dapo": []}
    for config, last in ends.items():
        for seed in (0, 1, 2):
            folder = tmp_path / f"{config}-{seed}"
            said = train(folder, config, f"trainer.seed={seed}")
            assert values(folder, "task/stepwise_rate")[0] < 0.08  # 0.04, standard error 0.01
            last.append(values(folder, "reward/correct_rate")[-1])
            if config == "demo":
                assert last[-1] >= 0.85, seed
                assert values(folder, "task/stepwise_rate")[-1] >= 0.9, seed
                assert said.count("more than half of the responses now write steps") == 1
    assert mean(ends["demo"]) - mean(ends["demo-dapo"]) >= 0.15


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_correct_rate_of_the_second_example_rises_by_at_least_0_15_within_forty_steps(
    seed: int, tmp_path: Path
) -> None:
    train(tmp_path / "run", "arithmetic", f"trainer.seed={seed}", "trainer.steps=40")
    rates = values(tmp_path / "run", "reward/correct_rate")
    assert len(rates) == 40
    # Means of five steps: about 2,000 rollouts each, a standard error of 0.011.
    assert 0.3 <= mean(rates[:5]) <= 0.5
    assert mean(rates[-5:]) - mean(rates[:5]) >= 0.15
