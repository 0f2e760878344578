"""`a3po submit` up to the cluster: what is refused before anything is made, and what stands in the script."""

from __future__ import annotations

import json
import os
import re
import subprocess
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


# --- slurm.setup ---------------------------------------------------------------------------------------------------


def ran(folder: Path, *setup: str) -> subprocess.CompletedProcess[str]:
    """What becomes of the script of a run with these lines, up to where the job's program would start."""
    folder.mkdir(exist_ok=True)
    script = planned(folder / "run", f"slurm.setup={json.dumps(setup)}").script
    before, _, rest = script.partition("\nexec ")
    assert rest.count("\n") == 1
    after = 'echo "strict: $-"; echo "value ${GREETING-none}"; (false | true) && echo pipes; echo ${UNSET_OF_ALL}; echo no'
    around = {"PATH": os.environ["PATH"]}
    return subprocess.run(["bash", "-c", f"{before}\n{after}"], env=around, cwd=folder, capture_output=True, text=True)


ACTIVATES = [
    # conda's activate.d and modules' init: unset variables, commands that fail on the way, pipes that break.
    'export OLD="$CONDA_BACKUP_CXX"; export LD_LIBRARY_PATH="/opt/x/lib:$LD_LIBRARY_PATH"\nexport GREETING=hello\n',
    "grep -q nothing /dev/null\nfalse\n[ -n \"$NOTHING\" ] && echo never\nexport GREETING=hello\n",
    "yes | head -1 >/dev/null\nexport GREETING=hello\n",
    'deactivate() { [ -n "$_OLD" ] && export PATH="$_OLD"; }\ndeactivate\nexport GREETING=hello\n',
]


@pytest.mark.parametrize("text", ACTIVATES)
def test_a_script_that_setup_sources_may_read_unset_variables_and_have_failing_commands(
    tmp_path: Path, text: str
) -> None:
    (tmp_path / "activate.sh").write_text(text)
    done = ran(tmp_path, "source activate.sh")
    assert "value hello" in done.stdout, done.stderr
    flags = re.findall(r"strict: (\w+)", done.stdout)[0]
    assert {"e", "u"} <= set(flags)  # strict again
    assert "pipes" not in done.stdout
    assert "no\n" not in done.stdout
    assert "UNSET_OF_ALL: unbound variable" in done.stderr


def test_a_setup_line_that_fails_ends_the_job_and_is_named(tmp_path: Path) -> None:
    done = ran(tmp_path, "true", "source nowhere.sh", "export GREETING=hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: slurm.setup: ended with 1: source nowhere.sh (if that is no failure: … || true)" in done.stderr
    assert "value hello" in ran(tmp_path, "source nowhere.sh || true", "export GREETING=hello").stdout


def test_lines_of_setup_that_are_one_command_together_stay_one(tmp_path: Path) -> None:
    lines = ["# choose", "", 'if [ -n "$NOWHERE" ]', "then", "  false", "else", "  GREETING=he \\", "true", "fi"]
    lines += ["greet() {", '  export GREETING="$(cat <<EOF', "hello", "EOF", ')"; }', "greet"]
    done = ran(tmp_path, *lines)
    assert "value hello" in done.stdout, done.stderr
    with pytest.raises(RequestError, match=r"slurm.setup: bash cannot read 'if true; then': .*syntax error"):
        ran(tmp_path, "true", "if true; then", "echo")


def test_setup_of_one_line_is_taken_as_a_list_of_one_and_what_is_no_list_is_named(tmp_path: Path) -> None:
    lines = planned(tmp_path, "slurm.setup=module load cuda").configs[0].slurm.setup
    assert lines == ("module load cuda",)
    assert planned(tmp_path, "slurm.extra=--exclusive").configs[0].slurm.extra == ("--exclusive",)
    with pytest.raises(RequestError, match="--set slurm.mounts: slurm.mounts: Input should be a list") as caught:
        planned(tmp_path, "slurm.mounts={a: b}")
    assert "tuple" not in str(caught.value)
