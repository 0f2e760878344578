"""`a3po submit` up to the cluster: what is refused before anything is made, and what stands in the script."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from a3po_megatron.checkpoint.interrupt import LEAD
from a3po_megatron.config import load_config
from a3po_megatron.errors import RequestError
from a3po_megatron.launch import slurm
from tests.distributed.runner import ROOT


def planned(folder: Path, *overrides: str) -> slurm.Plan:
    options = ["slurm.gpus_per_node=0", "slurm.tasks_per_node=2", *overrides]
    return slurm.plan([load_config(ROOT / "configs/arithmetic.yaml", options)], folder, sweep=False)


# --- the time limit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("time", "options", "lead"),
    [
        ("6", [], "300 s"),  # 300 + 60 s are needed: this is as much
        ("5:30", [], "300 s"),
        ("0-0:2", ["slurm.lead_seconds=100"], "100 s"),
        ("12:00:00", ["slurm.lead_seconds=86400"], "86400 s"),
    ],
)
def test_a_time_limit_that_leaves_no_time_for_a_step_is_refused_naming_both_options(
    tmp_path: Path, time: str, options: list[str], lead: str
) -> None:
    with pytest.raises(RequestError) as caught:
        planned(tmp_path / "run", f"slurm.time='{time}'", *options)
    for words in ("slurm.time", time, "slurm.lead_seconds", lead, "60 s"):
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("time", "options"), [("7", []), ("0-1", []), ("UNLIMITED", []), ("2", ["slurm.lead_seconds=30"])]
)
def test_a_time_limit_with_room_for_a_step_is_taken(tmp_path: Path, time: str, options: list[str]) -> None:
    assert f"#SBATCH --time={time}\n" in planned(tmp_path / "run", f"slurm.time='{time}'", *options).script


def test_what_the_run_in_the_folder_measured_decides_what_time_limit_can_work(tmp_path: Path) -> None:
    (tmp_path / LEAD).write_text("3600\n{}\n")
    with pytest.raises(RequestError, match="3600 s before the end"):
        planned(tmp_path, "slurm.time='1:00:00'")
    planned(tmp_path, "slurm.time='1:02:00'")
    rows = [{"step": n, "startup/seconds": seconds} for n, seconds in enumerate((10.0, 900.5))]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RequestError, match="a start takes about 901 s"):
        planned(tmp_path, "slurm.time='1:15:00'")
    planned(tmp_path, "slurm.time='1:16:00'")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "startup/sec')  # cut off
    assert slurm.start_up_seconds(tmp_path) == slurm.START_UP_SECONDS
