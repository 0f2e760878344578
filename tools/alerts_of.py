"""Judges the metrics of runs that are there by the alerts as they are now: to try other thresholds on old runs.

    tools/alerts_of.py RUN_DIR… [--set alerts.clip_rate=0.1]…

Says for each run which alert would have been raised in which steps, and what it would have said first. A run of a
version that did not yet measure what an alert looks at never raises it. Exit code 1 where one was raised.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import yaml
from pydantic import ValidationError

from a3po_megatron.config import AlertsOptions
from a3po_megatron.errors import RequestError
from a3po_megatron.report.read import Run, read_run
from a3po_megatron.telemetry.alerts import Alerts, Scale, stretches


def raised_in(run: Run, changes: dict[str, object]) -> dict[str, list[tuple[int, str]]]:
    """Returns per alert that would have been raised its steps, each with what it says."""
    options = AlertsOptions.model_validate(run.option("alerts", {}) | changes)
    worth = run.option("reward.correct", 1.0) - run.option("reward.wrong", 0.0)
    scale = Scale(run.option("rollout.max_tokens"), worth, run.option("evaluation.every_steps", 0))
    alerts, raised = Alerts(options, scale), dict[str, list[tuple[int, str]]]()
    for number, step in enumerate(run.steps):
        row = {name: values[number] for name, values in run.metrics.items()}
        for name, words in alerts.judge(row).items():
            raised.setdefault(name, []).append((step, words))
    return raised


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN_DIR")
    parser.add_argument("--set", action="append", default=[], metavar="alerts.OPTION=VALUE", dest="changes")
    given = parser.parse_args()
    pairs = (change.removeprefix("alerts.").partition("=") for change in given.changes)
    changes = {name: yaml.safe_load(value) for name, _, value in pairs}
    any_raised = False
    for folder in given.runs:
        try:
            raised = raised_in(read_run(folder), changes)
        except (RequestError, ValidationError) as error:
            sys.exit(f"error: {error}")
        print(f"{folder}: {'' if raised else 'silent'}")
        for name, found in raised.items():
            print(f"  {name} in {stretches([step for step, _ in found])}\n    {found[0][1]}")
        any_raised |= bool(raised)
    sys.exit(int(any_raised))


if __name__ == "__main__":
    main()
