"""Curves of several runs as one PNG, for a README or a paper draft: one panel a metric, one colour a run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from a3po_megatron.errors import RequestError

from .charts import chart_of, moving_mean, smoothing_window
from .page import run_labels
from .read import read_run

# Okabe and Ito's colours, told apart with every common colour vision deficiency.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
INK, DIM, GRID = "#1b1f24", "#59636e", "#e4e8ec"


def curve_png(
    run_dirs: Sequence[Path], out_png: Path, metrics: Sequence[str] = ("reward/correct_rate", "policy/entropy")
) -> Path:
    """Draws `metrics` of the runs in `run_dirs` over their steps, 1000 px wide at twice the resolution.

    The thin line is the recorded value, the thick one its moving mean; undefined values are gaps. RequestError
    where a folder is no run folder, or no run has one of the metrics.
    """
    runs = [read_run(Path(folder)) for folder in run_dirs]
    if not runs or not metrics:
        raise RequestError("A figure needs at least one run folder and one metric.")
    for metric in metrics:
        if not any(run.values(metric) for run in runs):
            known = ", ".join(sorted(runs[0].metrics))
            raise RequestError(f"{metric}: no run has a value of this metric. {run_dirs[0]} has: {known}.")
    window = smoothing_window(max(len(run.steps) for run in runs))
    figure = Figure(figsize=(10, 3.7), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        chart = chart_of(metric)
        name = dict(chart.lines)[metric]
        title = chart.title if len(chart.lines) == 1 else f"{chart.title}: {name}"
        axis.set_title(title, loc="left", fontsize=12, color=INK, fontweight="bold")
        for i, (run, label) in enumerate(zip(runs, run_labels(runs), strict=True)):
            series = [None if value is None else value * chart.scale for value in run.metrics.get(metric, [])]
            if not run.values(metric):
                continue
            steps, colour = run.steps, COLOURS[i % len(COLOURS)]
            raw = [float("nan") if value is None else value for value in series]
            mean = [float("nan") if value is None else value for value in moving_mean(series, window)]
            axis.plot(steps, raw, color=colour, linewidth=0.8, alpha=0.35)
            axis.plot(steps, mean, color=colour, linewidth=2.2, label=label, solid_capstyle="round", marker="o", ms=1)
        axis.set_xlabel("step", color=DIM)
        axis.set_ylabel(chart.unit, color=DIM)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(color=GRID, linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(colors=DIM, length=0)
        axis.margins(x=0.01)
        if min(v for run in runs for v in run.values(metric)) >= 0:
            axis.set_ylim(bottom=0)
        for side, spine in axis.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(GRID)
    handles = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside upper center",
        ncols=min(len(handles), 3),
        frameon=False,
        labelcolor=INK,
    )
    out_png = Path(out_png)
    try:
        out_png.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out_png, dpi=200, facecolor="white")
    except OSError as error:
        raise RequestError(f"{out_png}: the figure cannot be written there ({error.strerror}).") from error
    return out_png
