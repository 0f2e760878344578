"""The demo, with and without shaping: docs/evidence/demo.json, and from it the README's table and figure.

    python tools/bench_demo.py runs/bench     trains what is not there yet, an hour and more, and writes all

Runs of the guesser as it is shipped: seeds 0–2, on which the starting share was chosen, and 3–7, on which it was not.
Then a smaller share of stepwise responses and a larger one, each with a guesser of its own (tools/make_tiny_model.py);
and the share 1, the model that always reasons: the second example, configs/arithmetic.yaml.

In the figure a thin line is a seed (moving mean), a thick one the mean of the seeds.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from blake3 import blake3
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from a3po_megatron.report.charts import moving_mean
from a3po_megatron.report.read import Run, read_run

ROOT = Path(__file__).resolve().parent.parent
EVIDENCE, FIGURE = ROOT / "docs/evidence/demo.json", ROOT / "docs/demo.png"
RUN_SECONDS = 1800
ARMS = {"A3PO": "", "DAPO": "-dapo"}  # what the names of their recipes end in
SEEDS, FURTHER_SEEDS, SHARE_SEEDS = (0, 1, 2), (3, 4, 5, 6, 7), (0,)
SHIPPED, OTHER_SHARES, ALL = 0.04, (0.01, 0.12), 1.0
# The README's.
TABLES = (
    *((SHIPPED, SEEDS), (SHIPPED, FURTHER_SEEDS)),
    *((share, SHARE_SEEDS) for share in OTHER_SHARES),
    (ALL, SHARE_SEEDS),
)
EVERY = 40  # steps between the values that the JSON and the tables hold
CORRECT, STEPWISE = 0.85, 0.9  # at least so much of A3PO at the last step …
MARGIN = 0.15  # … and the mean of DAPO at least so much below it
# Okabe and Ito's colours, told apart with every common colour vision deficiency.
COLOURS = {"A3PO": "#0072b2", "DAPO": "#d55e00"}
INK, DIM, GRID = "#1b1f24", "#59636e", "#e4e8ec"
WINDOW = 5  # steps of a moving mean


@dataclass(frozen=True)
class Case:
    share: float  # of stepwise responses at the start, as asked of tools/make_tiny_model.py; ALL: the second example
    arm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.share:g}-{self.arm.lower()}-{self.seed}"


def cases() -> list[Case]:
    seeds = {SHIPPED: (*SEEDS, *FURTHER_SEEDS), **dict.fromkeys((*OTHER_SHARES, ALL), SHARE_SEEDS)}
    return [Case(share, arm, seed) for share, of_share in seeds.items() for seed in of_share for arm in ARMS]


def guesser(folder: Path, share: float) -> Path:
    """The model that starts with this share of stepwise responses; made where it is not there yet."""
    recipe = blake3((ROOT / "tools/make_tiny_model.py").read_bytes()).hexdigest()[:8]
    model = folder.resolve() / f"guesser-{share:g}-{recipe}"
    if not (model / "README.md").exists():  # the last file that it writes
        command = [sys.executable, "tools/make_tiny_model.py", "--guesser", f"--stepwise={share}", f"--out={model}"]
        subprocess.run(command, cwd=ROOT, check=True, timeout=RUN_SECONDS, stdout=subprocess.DEVNULL)
    return model


def trained(folder: Path, case: Case) -> Run:
    """The run of a case, which is trained, resumed, or found done and configured so."""
    example = "arithmetic" if case.share == ALL else "demo"
    model = ROOT / f"configs/models/tiny-{'arithmetic' if case.share == ALL else 'guesser'}"
    settings = [f"trainer.seed={case.seed}"]
    if case.share in OTHER_SHARES:
        model = guesser(folder, case.share)
        settings.append(f"model.path={model}")
    weights = blake3((model / "model.safetensors").read_bytes()).hexdigest()[:8]
    place = folder.resolve() / f"{case.name}-{weights}"
    command = [sys.executable, "-m", "a3po_megatron", "train", f"configs/{example}{ARMS[case.arm]}.yaml"]
    command += ["--run-dir", str(place), *(word for setting in settings for word in ("--set", setting))]
    ended = subprocess.run(command, cwd=ROOT, timeout=RUN_SECONDS, capture_output=True, text=True)
    if ended.returncode and "has done its" not in ended.stderr:
        raise SystemExit(f"{case.name}: {ended.stderr.strip()}")
    run = read_run(place)
    print(f"{case.name}: correct {run.values('reward/correct_rate')[-1]:.3f}", flush=True)
    return run


def summary(case: Case, run: Run) -> dict[str, Any]:
    """What the tables need of a run; of series the values of every EVERY-th and of the last step."""
    metrics, steps = run.metrics, len(run.steps)
    at = [*range(0, steps, EVERY), *([steps - 1] if (steps - 1) % EVERY else [])]
    below = [step for step, rate in enumerate(metrics["task/stepwise_rate"]) if rate is not None and rate < 0.5]
    from_here = max(below, default=-1) + 1  # the first step after which most stay stepwise
    pairs = zip(metrics["rollout/tokens"], metrics["perf/tokens_per_second"], strict=True)
    seconds = run.values("startup/seconds")[0] + sum(tokens / speed for tokens, speed in pairs if tokens and speed)

    def of(metric: str) -> list[float | None]:
        return [None if (value := metrics[metric][step]) is None else round(value, 4) for step in at]

    return {
        **asdict(case),
        "steps": at,
        "correct_rate": of("reward/correct_rate"),
        "stepwise_rate": of("task/stepwise_rate"),
        "entropy": of("policy/entropy"),
        "length": of("rollout/length_mean"),
        "stepwise_from": from_here if from_here < steps else None,
        "seconds": round(seconds),
    }


def table(rows: list[dict[str, Any]], share: float, seeds: Iterable[int]) -> str:
    """Correct rates and stepwise shares of both arms, a cell holding one value a seed."""
    chosen = [row for row in rows if row["share"] == share and row["seed"] in set(seeds)]
    at = chosen[0]["steps"]
    shown = [i for i, step in enumerate(at) if step % (2 * EVERY) == 0 or step == at[-1]]
    heads = [f"correct, step {at[i]}" for i in shown]
    heads += ["stepwise at the end", "most are stepwise from step", "entropy at the end"]
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for arm in ARMS:
        of = [row for row in chosen if row["arm"] == arm]
        cells = [" / ".join(f"{row['correct_rate'][i]:.2f}" for row in of) for i in shown]
        cells.append(" / ".join(f"{row['stepwise_rate'][-1]:.2f}" for row in of))
        cells.append(" / ".join("never" if (step := row["stepwise_from"]) is None else str(step) for row in of))
        cells.append(" / ".join(f"{row['entropy'][-1]:.2f}" for row in of))
        named = f"seed{'s' * (len(of) > 1)} {' / '.join(str(row['seed']) for row in of)}"
        lines.append(f"| {arm}, {named} | {' | '.join(cells)} |")
    return "\n".join(lines)


def verdict(rows: list[dict[str, Any]], seeds: Iterable[int]) -> str:
    """Whether the shipped guesser's runs of these seeds meet the bar; the README says it in these words."""
    ends: dict[str, list[tuple[float, float]]] = {arm: [] for arm in ARMS}
    for row in rows:
        if row["share"] == SHIPPED and row["seed"] in set(seeds):
            ends[row["arm"]].append((row["correct_rate"][-1], row["stepwise_rate"][-1]))
    good = sum(correct >= CORRECT and stepwise >= STEPWISE for correct, stepwise in ends["A3PO"])
    shaped, plain = (mean(correct for correct, _ in ends[arm]) for arm in ARMS)
    missed = "" if shaped - plain >= MARGIN else f", less than {MARGIN:.2f} apart"
    return (
        f"Seeds {', '.join(map(str, seeds))}: with A3PO {good} of {len(ends['A3PO'])} end at least {CORRECT:.0%} "
        f"correct and {STEPWISE:.0%} stepwise; on average {shaped:.1%} are correct at the end, {plain:.1%} with "
        f"DAPO{missed}."
    )


def _draw(axis: Axes, runs: dict[str, list[Run]], metric: str, title: str) -> None:
    for arm, of in runs.items():
        seeds = [[100 * value for value in run.values(metric)] for run in of]
        for values in seeds:
            axis.plot(moving_mean(values, WINDOW), color=COLOURS[arm], linewidth=0.9, alpha=0.45)
        together = moving_mean([mean(step) for step in zip(*seeds, strict=True)], WINDOW)
        axis.plot(together, color=COLOURS[arm], linewidth=2.4, label=arm)
        place = (len(together) - 1, together[-1])
        axis.annotate(arm, place, (5, 0), textcoords="offset points", color=COLOURS[arm], va="center")
    axis.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold")
    axis.set_xlabel("step", color=DIM)
    axis.set_ylabel("%", color=DIM)
    axis.set_ylim(0, 102)
    axis.margins(x=0.01)
    axis.grid(color=GRID, linewidth=0.8)
    axis.tick_params(colors=DIM, length=0)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRID)


def draw(runs: dict[str, list[Run]], path: Path) -> None:
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _draw(left, runs, "reward/correct_rate", "Correct answers")
    _draw(right, runs, "task/stepwise_rate", "Responses that reason in steps")
    figure.savefig(path, dpi=200, facecolor="white")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder of the run folders")
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    todo = cases()
    runs = [trained(options.runs, case) for case in todo]
    rows = [summary(case, run) for case, run in zip(todo, runs, strict=True)]
    EVIDENCE.parent.mkdir(exist_ok=True)
    EVIDENCE.write_text(json.dumps({"runs": rows}, ensure_ascii=False).replace('{"share"', '\n {"share"') + "\n")
    by_arm: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for case, run in zip(todo, runs, strict=True):
        if case.share == SHIPPED and case.seed in SEEDS:
            by_arm[case.arm].append(run)
    draw(by_arm, FIGURE)
    for share, seeds in TABLES:
        print(f"\nstarting share {share:.1%}\n{table(rows, share, seeds)}")
    print(f"\n{verdict(rows, SEEDS)}\n{verdict(rows, FURTHER_SEEDS)}")


if __name__ == "__main__":
    main()
