"""A closer look at chosen steps: what is written, that it changes nothing, and what cannot be looked at is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.telemetry.catalogue import Phase
from tests.harness import interrupted_runs as tools

CHANGING = ("perf/", "startup/", "memory/", "refit/seconds")


def test_a_traced_step_names_its_phases_and_the_run_is_as_without(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plain = tools.uninterrupted("dp2", tmp_path_factory)  # of more steps, which begins as one of two does
    tools.trained_here(tmp_path / "run", *tools.LAYOUTS["dp2"], "trainer.steps=2", "telemetry.profile_steps=[1]")
    rows = [
        [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()[:2]]
        for folder in (plain, tmp_path / "run")
    ]
    kept = [[{k: v for k, v in row.items() if not k.startswith(CHANGING)} for row in each] for each in rows]
    assert kept[0] == kept[1] and len(kept[0]) == 2
    assert not RunFolder(plain).profile.exists()
    (trace,) = RunFolder(tmp_path / "run").profile.iterdir()
    assert trace.name == "step-00001.rank-0.trace.json"
    events = json.loads(trace.read_bytes())["traceEvents"]
    names = {event["name"] for event in events}
    assert {Phase.ROLLOUT, Phase.REWARD, Phase.SCORE, Phase.UPDATE, Phase.PUBLISH} <= names
    assert "aten::mm" in names, "operations stand within them"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["telemetry.profile_steps=[0]", "telemetry.profile_kind=memory"], "looks at a GPU, and this run is on CPUs"),
        (["telemetry.profile_steps=[0]", "telemetry.profile_kind=nsys"], "telemetry.profile_kind: nsys looks at a GPU"),
        (["telemetry.profile_steps=[1,99]"], "telemetry.profile_steps: 99 is none of the run's steps, 0 to"),
        (["telemetry.profile_steps=[-1]"], "telemetry.profile_steps"),
    ],
)
def test_what_cannot_be_looked_at_is_refused_before_a_run(options: list[str], says: str, tmp_path: Path) -> None:
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], *options)
    assert ended.code == 2 and says in ended.err, ended.all
