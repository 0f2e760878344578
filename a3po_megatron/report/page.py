"""One HTML page that compares runs: header, curves, and a viewer that shows rollouts token by token.

The page is a single file that loads nothing. All data stands in it as one JSON object, written so that no text of a
model can end the script element (`<`, `>`, `&` and everything outside ASCII are escaped), and the script puts texts
into the page only as text nodes. Data are thinned to a size a browser likes; whatever is left out, the page says so.
"""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder, rollout_files

from ..telemetry.alerts import ALERT, ALERTS, stretches
from ..telemetry.catalogue import PARTS, SECONDS, STEP
from .charts import CHARTS, Chart, chart_of, short, smoothing_window
from .read import Record, Run, read_rollouts, read_run
from .timeline import VALUES, timeline_of

ROLLOUT_BYTES = 7_000_000  # of the page, for the rollouts of all runs together
METRIC_VALUES = 150_000  # embedded at most, of all runs together; about 10 bytes each
READ_BYTES = 300_000_000  # of compressed rollout files read per run: keeps a report on a long run quick
STEP_SHARE = 8  # one step takes at most this part of its run's bytes, so that at least that many steps fit
SHOWN_TOKENS = 4_096  # of one rollout
OF_SAMPLE = ("outcome", "reason", "reward", "advantage", "accepted", "carried", "finish", "step", "way")
OF_TOKENS = ("pieces", "old_logprobs", "entropy", "weights")
VIEWED = (*OF_SAMPLE, *OF_TOKENS, "prompt_index", "seed", "segments", "prompt", "answer")  # columns of rollouts
OPTIONS_NOT_COMPARED = ("name",)  # of the configuration: the name is the column's head


def write_report(run_dirs: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the page that compares the runs in `run_dirs` and returns its path (default: in the first run folder).

    RequestError where a folder is no run folder or holds damaged files, or the page cannot be written.
    """
    if not run_dirs:
        raise RequestError("No run folder was given to report on.")
    runs = [read_run(Path(folder)) for folder in run_dirs]
    out = Path(out) if out else RunFolder(runs[0].folder).report
    page = render(runs)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise RequestError(f"{out}: the report cannot be written there ({error.strerror}).") from error
    return out


def render(runs: Sequence[Run]) -> str:
    """The page as text."""
    labels = run_labels(runs)
    values = sum(len(run.steps) * len(run.metrics) for run in runs)
    stride = -(-values // METRIC_VALUES)
    data_runs: list[Record] = []
    notes: list[tuple[str, str]] = []
    for run, label in zip(runs, labels, strict=True):
        rollouts, said = _rollouts(run, ROLLOUT_BYTES // len(runs))
        if stride > 1:
            said.append(f"Curves show every {stride}th of {len(run.steps)} recorded steps, to keep the page small.")
        metrics = {
            name: [short(value, 6) for value in series[::stride]]
            for name, series in run.metrics.items()
            if any(value is not None for value in series) and not name.startswith(ALERT)
        }
        timeline, gaps = timeline_of(run.timeline, VALUES // len(runs))
        begins, alerts = _alerts(run)
        steps = run.steps[::stride]
        curves = {"label": label, "steps": steps, "metrics": metrics, "alerts": begins}
        data_runs.append({**curves, "timeline": timeline, "rollouts": rollouts})
        notes += [(label, note) for note in dict.fromkeys([*alerts, *run.notes, *said, *gaps])]
    window = smoothing_window(max(len(run["steps"]) for run in data_runs))
    data = {
        "runs": data_runs,
        "charts": [{**chart._asdict(), "lines": chart.lines, "alerts": _alerts_on(chart)} for chart in _charts(runs)],
        "phases": _phases(runs),
        "phasePrefix": SECONDS,
        "parts": PARTS,
        "window": window,
        "open": _opening(data_runs),
    }
    source = resources.files(__package__).joinpath("template.html.j2").read_text("utf-8")
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source).render(
        data=_script_json(data),
        summaries=[_summary(run, label) for run, label in zip(runs, labels, strict=True)],
        differences=_differences(runs),
        labels=labels,
        notes=notes,
        window=window,
        sources=[
            (label, _pretty(run.config), _pretty(run.provenance)) for run, label in zip(runs, labels, strict=True)
        ],
    )


def run_labels(runs: Sequence[Run]) -> list[str]:
    """Names that tell the runs apart: the configured name, with the folder or a number where names repeat."""
    labels = [run.name for run in runs]
    repeated = Counter(labels)
    labels = [f"{run.name} ({run.folder.name})" if repeated[run.name] > 1 else run.name for run in runs]
    repeated = Counter(labels)
    return [f"{label} #{i + 1}" if repeated[label] > 1 else label for i, label in enumerate(labels)]


def _charts(runs: Sequence[Run]) -> list[Chart]:
    """The charts for which at least one run has a value; then one for every metric that stands in none of them."""
    present = dict.fromkeys(name for run in runs for name in run.metrics if run.values(name))
    known = [chart for chart in CHARTS if any(metric in present for metric, _ in chart.lines)]
    shown = {metric for chart in CHARTS for metric, _ in chart.lines}
    other = [chart_of(name) for name in present if name not in shown and not name.startswith((SECONDS, ALERT))]
    return known + other


def _alerts(run: Run) -> tuple[list[tuple[int, str]], list[str]]:
    """Where alerts begin, for marks: (step, name); and what the page says of each of them."""
    begins: list[tuple[int, str]] = []
    notes = []
    for alert in ALERTS:
        pairs = zip(run.steps, run.metrics.get(f"{ALERT}{alert.name}", []), strict=False)
        steps = [step for step, value in pairs if value]
        begins += [(step, alert.name) for step in steps if step - 1 not in set(steps)]
        if steps:
            notes.append(f"Alert {alert.name} in {stretches(steps)}: {alert.meaning}. What to look at: {alert.advice}.")
    return begins, notes


def _alerts_on(chart: Chart) -> list[str]:
    """The alerts whose beginnings are marked in a chart: those that look at one of its metrics."""
    drawn = {metric for metric, _ in chart.lines}
    return [alert.name for alert in ALERTS if drawn.intersection(alert.metrics)]


def _phases(runs: Sequence[Run]) -> list[str]:
    phases = {name.removeprefix(SECONDS) for run in runs for name in run.metrics if name.startswith(SECONDS)}
    return [phase for phase in STEP if phase in phases] + sorted(phases - set(STEP))


def _summary(run: Run, label: str) -> Record:
    """The run's column in the table at the head of the page; None is shown as a dash."""
    rates, speeds = run.values("reward/correct_rate"), run.values("perf/tokens_per_second")
    return {
        "Run": label,
        "Folder": str(run.folder),
        "Model": run.option("model.path"),
        "Steps done": f"{len(run.steps)} of {run.option('trainer.steps', '?')}",
        "Correct rate, first step": f"{rates[0]:.1%}" if rates else None,
        "Correct rate, last step": f"{rates[-1]:.1%}" if rates else None,
        "Correct rate, mean of last 5": f"{statistics.mean(rates[-5:]):.1%}" if rates else None,
        "Seed": run.option("trainer.seed"),
        "Tokens per second, median": f"{statistics.median(speeds):,.0f}" if speeds else None,
    }


def _differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """The options in which the runs differ, each with its value per run."""
    flat = [dict(_flatten(run.config)) for run in runs]
    options = dict.fromkeys(option for settings in flat for option in settings)
    table = [(option, [settings.get(option, "not set") for settings in flat]) for option in options]
    return [(option, row) for option, row in table if len(set(row)) > 1 and option not in OPTIONS_NOT_COMPARED]


def _flatten(section: Record, prefix: str = "") -> Iterable[tuple[str, str]]:
    for key, value in section.items():
        if isinstance(value, dict) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", json.dumps(value, default=str, ensure_ascii=False)


def _rollouts(run: Run, budget: int) -> tuple[list[Record], list[str]]:
    """The rollouts to embed, step by step, and what to say about those left out.

    Steps are taken in rounds, each twice as dense as the one before (the last step always); a round that does not fit
    is dropped as a whole, so that what is shown is evenly spaced.
    """
    files = rollout_files(run.folder)
    steps = list(files)
    notes: list[str] = []
    if not steps:
        return [], ["No rollouts are saved (telemetry.rollouts); the viewer has nothing to show for this run."]
    chosen: dict[int, Record] = {}
    used = read = 0
    stride = 1 << (len(steps) - 1).bit_length()
    while stride:
        round_: dict[int, Record] = {}
        for step in dict.fromkeys([*steps[::stride], steps[-1]]):
            if step in chosen:
                continue
            groups, size, opened = _step_rollouts(files[step], budget // STEP_SHARE, notes)
            round_[step] = {"step": step, "groups": groups}
            used, read = used + size, read + opened
            if chosen and (used > budget or read > READ_BYTES):
                notes.append(
                    f"The viewer holds {len(chosen)} of {len(steps)} steps with saved rollouts, evenly spaced, to keep "
                    "the page small and quick to make."
                )
                return [chosen[step] for step in sorted(chosen)], notes
        chosen |= round_
        stride //= 2
    with_groups = [chosen[step] for step in sorted(chosen) if chosen[step]["groups"]]
    if not with_groups:
        notes.append("No rollout is saved with its texts (telemetry.texts_per_step); the viewer has nothing to show.")
    return with_groups, notes


LEFT_OUT = "Of a step with many or long saved rollouts the viewer holds only the first ones, to keep the page small."
CUT = f"Of a response longer than {SHOWN_TOKENS} tokens the viewer shows that many."


def _step_rollouts(paths: list[Path], budget: int, notes: list[str]) -> tuple[list[Record], int, int]:
    """Prompts of one step with their samples, their size in bytes, and how many file bytes were opened for them."""
    groups: list[Record] = []
    used = opened = 0
    full = False
    for path in paths:
        opened += path.stat().st_size
        records = read_rollouts(path, VIEWED, with_pieces=True)
        for (index, prompt_id), members in groupby(records, lambda r: (r.get("prompt_index"), r["prompt_id"])):
            key = str(prompt_id)
            if any(group["key"] == key for group in groups):  # the same question twice in one step
                key = f"{key}@{index}"
            group: Record = {"key": key, "prompt": None, "answer": None, "samples": []}
            for record in _verdicts_first(list(members)):
                group["prompt"], group["answer"] = record.get("prompt"), record.get("answer")
                sample = _sample(record, notes)
                size = len(_script_json(sample))
                full = used + size > budget and bool(groups or group["samples"])
                if full:
                    notes.append(LEFT_OUT)
                    break
                group["samples"].append(sample)
                used += size
            group["samples"].sort(key=lambda sample: sample["n"])
            if group["samples"]:
                groups.append(group)
                used += len(_script_json([group["key"], group["prompt"], group["answer"]]))
            if full:
                return groups, used, opened
    return groups, used, opened


def _verdicts_first(members: list[Record]) -> list[Record]:
    """One rollout of each verdict first: where only some of a group fit, both sides can be read."""
    first = {record["outcome"]: record for record in reversed(members)}
    return [*first.values(), *(record for record in members if first[record["outcome"]] is not record)]


def _sample(record: Record, notes: list[str]) -> Record:
    """What the viewer shows of one rollout; arrays are per shown token.

    Of the two engines' log-probs, `old` (training engine) and `gap` (training minus sampling) are kept: their
    difference is many digits smaller than they are, and would drown in the rounding of both.
    """
    end = SHOWN_TOKENS
    if len(record["tokens"]) > end:
        notes.append(CUT)
    segments = record.get("segments") or []
    sampled, old = record["logprobs"][:end], (record.get("old_logprobs") or [])[:end]
    return {
        **{key: short(record.get(key)) for key in OF_SAMPLE},
        "n": record["sample"],
        "seed": str(record.get("seed")),  # a 64-bit hash: more than a JavaScript number holds
        "versions": sorted({version for _, version, _ in segments}),
        "length": len(record["tokens"]),
        "untrained": sum(length for length, _, trained in segments if not trained),
        "pieces": record["pieces"][:end],
        "ids": record["tokens"][:end],
        "sampled": None if old else [short(value) for value in sampled],
        "old": [short(value) for value in old] or None,
        "gap": [_gap(a, b) for a, b in zip(old, sampled, strict=True)] if old else None,
        "entropy": [short(value) for value in (record.get("entropy") or [])[:end]] or None,
        "weights": [short(value) for value in (record.get("weights") or [])[:end]] or None,
    }


def _opening(runs: list[Record]) -> Record | None:
    """Which rollout the viewer opens on, where rollouts have ways of answering: one of the way that is rarer where the
    runs begin. Best a correct one whose shaping can be seen, and of those the first. None: it opens on the last step.
    """
    places = [
        (number, step["step"], group["key"], sample)
        for number, run in enumerate(runs)
        for step in run["rollouts"]
        for group in step["groups"]
        for sample in group["samples"]
        if sample["way"]
    ]
    if not places:
        return None
    first, last = min(step for _, step, _, _ in places), max(step for run in runs for step in run["steps"])
    shares = Counter({way: 0 for way in sorted({sample["way"] for *_, sample in places})})
    shares.update(sample["way"] for _, step, _, sample in places if step <= first + (last - first) / 20)
    rarer = min(shares, key=shares.__getitem__)

    def merit(place: tuple[int, int, str, Record]) -> tuple[bool, bool]:
        sample = place[3]
        return any(weight not in (1, None) for weight in sample["weights"] or ()), sample["outcome"] == "correct"

    run, step, prompt, sample = max((place for place in places if place[3]["way"] == rarer), key=merit)
    return {"run": run, "step": step, "prompt": prompt, "sample": sample["n"]}


def _gap(old: float | None, sampled: float | None) -> float | None:
    return None if old is None or sampled is None else short(old - sampled, 2)


def _script_json(data: Any) -> Markup:
    """JSON that is inert inside a script element, whatever texts it holds: pure ASCII, without `<`, `>` and `&`."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)


def _pretty(record: Record) -> str:
    return json.dumps(record, indent=2, default=str, ensure_ascii=False)
