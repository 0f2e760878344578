"""The demo, with and without shaping, for three seeds: the README's table and figure.

    python tools/bench_demo.py runs/seeds          trains what is not there yet (six runs of two minutes)
    python tools/bench_demo.py runs/seeds --figure docs/demo.png --json docs/evidence/demo.json

In the figure a thin line is a seed (moving mean), a thick one the mean of the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a3po_megatron.report.charts import moving_mean
from a3po_megatron.report.read import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = {"A3PO": "configs/demo.yaml", "DAPO": "configs/demo-dapo.yaml"}
SEEDS = (0, 1, 2)
WINDOWS = ((0, 5), (35, 40), (55, 60))  # of steps, the correct rate's means in the table
WINDOW = 5  # steps of a moving mean
# Okabe and Ito's colours, told apart with every common colour vision deficiency.
COLOURS = {"A3PO": "#0072b2", "DAPO": "#d55e00"}
INK, DIM, GRID = "#1b1f24", "#59636e", "#e4e8ec"

Runs = dict[str, list[Run]]


def trained(folder: Path) -> Runs:
    """The runs of every recipe, by seed; trains those that are not in the folder."""
    runs: Runs = {}
    for recipe, config in CONFIGS.items():
        for seed in SEEDS:
            place = folder / f"{recipe.lower()}-{seed}"
            if not (place / "report.html").exists():  # the last thing that a run does
                command = [sys.executable, "-m", "a3po_megatron", "train", config, "--run-dir", str(place)]
                subprocess.run([*command, "--set", f"trainer.seed={seed}"], cwd=ROOT, check=True, timeout=1800)
            runs.setdefault(recipe, []).append(read_run(place))
    return runs


def summary(runs: Runs) -> dict[str, Any]:
    """Correct rate in each window and entropy in the last one, of every seed."""
    last = slice(*WINDOWS[-1])
    return {
        recipe: {
            "correct_rate": {
                f"{first}–{end - 1}": [mean(run.values("reward/correct_rate")[first:end]) for run in of]
                for first, end in WINDOWS
            },
            "entropy": [mean(run.values("policy/entropy")[last]) for run in of],
            "startup_seconds": [run.values("startup/seconds")[0] for run in of],
        }
        for recipe, of in runs.items()
    }


def table(found: dict[str, Any]) -> str:
    def cell(values: list[float]) -> str:
        return " / ".join(f"{value:.2f}" for value in values)

    windows = [f"steps {first}–{end - 1}" for first, end in WINDOWS]
    lines = [
        f"| correct rate ({WINDOW}-step means) | {' | '.join(windows)} | entropy, {windows[-1]} |",
        "|---" * (len(WINDOWS) + 2) + "|",
    ]
    for recipe, values in found.items():
        cells = [*map(cell, values["correct_rate"].values()), cell(values["entropy"])]
        lines.append(f"| {recipe}, seeds {' / '.join(map(str, SEEDS))} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _draw(axis: Axes, runs: Runs, metric: str, title: str, unit: str, scale: float) -> None:
    for recipe, of in runs.items():
        seeds = [[value * scale for value in run.values(metric)] for run in of]
        for values in seeds:
            axis.plot(moving_mean(values, WINDOW), color=COLOURS[recipe], linewidth=0.9, alpha=0.45)
        together = moving_mean([mean(step) for step in zip(*seeds, strict=True)], WINDOW)
        axis.plot(together, color=COLOURS[recipe], linewidth=2.4, label=recipe)
        end = together[-1]
        axis.annotate(
            recipe, (len(together) - 1, end), (5, 0), textcoords="offset points", color=COLOURS[recipe], va="center"
        )
    axis.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold")
    axis.set_xlabel("step", color=DIM)
    axis.set_ylabel(unit, color=DIM)
    axis.set_ylim(bottom=0)
    axis.margins(x=0.01)
    axis.grid(color=GRID, linewidth=0.8)
    axis.tick_params(colors=DIM, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def draw(runs: Runs, path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, runs, "reward/correct_rate", "Correct rate", "%", 100.0)
    _draw(right, runs, "policy/entropy", "Entropy", "nats", 1.0)
    figure.savefig(path, dpi=200, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    runs = trained(options.runs)
    found = summary(runs)
    print(table(found))
    if options.figure:
        draw(runs, options.figure)
    if options.json:
        options.json.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
