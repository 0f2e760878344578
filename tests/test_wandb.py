"""Weights & Biases: it gets the rows of metrics.jsonl and the settings, one id a run folder, and cannot end a run.

The real package writes, offline; what it wrote is read back from its file, whose form is LevelDB's log: blocks of
32 KiB, in them chunks with a header (checksum, length, kind) of which one or several hold a record.
"""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from a3po_megatron.config import TelemetryOptions
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.telemetry import wandb_run
from a3po_megatron.telemetry.metrics import MetricsWriter
from a3po_megatron.telemetry.wandb_run import WandbRun, run_id
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT

installed = pytest.mark.skipif(
    find_spec("wandb") is None, reason="skipped: wandb is not installed: pip install 'a3po-megatron[wandb]'"
)
OFFLINE = TelemetryOptions(wandb_project="rlvr", wandb_mode="offline")
BLOCK, HEADER, BEGIN = 1 << 15, 7, 7  # of a file, of a chunk, of a file's own header
FULL, LAST = 1, 4  # kinds of chunks that end a record


def records(path: Path) -> Iterator[Any]:
    from wandb.proto import wandb_internal_pb2

    data, at, whole = path.read_bytes(), BEGIN, b""
    assert data[:4] == b":W&B"
    while at + HEADER <= len(data):
        if (room := BLOCK - at % BLOCK) < HEADER:
            at += room
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def written(folder: Path) -> list[tuple[str, dict[str, Any], list[dict[str, Any]], list[tuple[str, str, str]]]]:
    """Of each start of a run, in order: its id, its settings, its rows, and what its charts are drawn over."""
    starts = []
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        kinds: dict[str, list[Any]] = {}
        for record in records(path):
            kinds.setdefault(record.WhichOneof("record_type"), []).append(record)
        (begun,) = (record.run for record in kinds["run"])
        settings = {item.key: json.loads(item.value_json) for item in begun.config.update}
        history = [record.history.item for record in kinds.get("history", [])]
        rows = [{"/".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items} for items in history]
        axes = [(m.metric.name, m.metric.glob_name, m.metric.step_metric) for m in kinds["metric"]]
        starts.append((begun.run_id, settings, rows, axes))
    return starts


def of_us(row: dict[str, Any]) -> dict[str, Any]:
    """What W&B did not add by itself."""
    return {name: value for name, value in row.items() if not name.startswith("_")}


@installed
def test_wandb_gets_every_row_of_a_run_and_of_its_resume_under_one_id_with_the_settings_and_no_text(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    options = (*tools.LAYOUTS["dp2"], "telemetry.wandb_project=rlvr", "telemetry.wandb_mode=offline")
    tools.trained_here(folder, *options, "trainer.steps=2")
    tools.trained_here(folder, *options, "trainer.steps=3")
    (first, settings, rows, axes), (again, later, more, _) = written(folder)
    assert first == again == run_id(folder)
    wanted = [json.loads(line) for line in RunFolder(folder).metrics.read_text().splitlines()]
    wanted = [{name: value for name, value in row.items() if value is not None} for row in wanted]
    assert [of_us(row) for row in (*rows, *more)] == wanted and [row["step"] for row in wanted] == [0, 1, 2]
    assert axes == [("step", "", ""), ("", "*", "step")]
    assert of_us(later) == yaml.safe_load(RunFolder(folder).config.read_text())
    assert (settings["trainer"]["steps"], later["trainer"]["steps"]) == (2, 3)
    saved = [
        rollout for path in RunFolder(folder).rollouts.iterdir() for rollout in read_rollouts(path, with_pieces=True)
    ]
    texts = {rollout[name].strip() for rollout in saved for name in ("prompt", "text")}
    texts = {text for text in texts if len(text) > 6}
    assert len(texts) > 5
    sent = b"".join(path.read_bytes() for path in (folder / "wandb").rglob("*") if path.is_file())
    assert not [text for text in texts if text.encode() in sent]


@installed
def test_steps_that_are_done_again_are_written_again_over_the_same_axis(tmp_path: Path) -> None:
    for steps in ((0, 1, 2), (1, 2, 3)):
        begun = int(time.time())
        run = WandbRun(tmp_path, OFFLINE, {}, pytest.fail)
        metrics = MetricsWriter(tmp_path, False, AtOnce(), wandb=run)
        for step in steps:
            metrics.write(step, {"reward/mean": step / 4})
        metrics.close()
        while int(time.time()) == begun:  # W&B names what it writes by the second of its start
            time.sleep(0.05)
    (first, _, rows, _), (again, _, more, _) = written(tmp_path)
    assert first == again
    assert [(row["step"], row["reward/mean"]) for row in more] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert of_us(rows[1]) == of_us(more[0])


HITS_WANDB = """
import signal
import sys
from pathlib import Path
import psutil
from tests.test_wandb import OFFLINE, AtOnce, MetricsWriter, WandbRun

folder, hit, rows = Path(sys.argv[1]), signal.Signals[sys.argv[2]], int(sys.argv[3])
metrics = MetricsWriter(folder, False, AtOnce(), wandb=WandbRun(folder, OFFLINE, {}, lambda text: print("said:", text)))
metrics.write(0, {})
helpers = [each for each in psutil.Process().children(recursive=True) if each.name().startswith("wandb-")]
assert helpers
for helper in helpers:
    helper.send_signal(hit)
psutil.wait_procs(helpers, timeout=10 if hit == signal.SIGKILL else 0)
for step in range(1, rows):
    metrics.write(step, {})
metrics.close()
for helper in helpers:
    if helper.is_running():
        helper.kill()
"""


# Of a process that answers no more the pipe takes some hundred rows.
@installed
@pytest.mark.parametrize(("hit", "rows"), [("SIGKILL", 3), ("SIGSTOP", 3000)])
def test_a_wandb_that_dies_or_hangs_is_named_once_and_the_rows_are_written_all_the_same(
    hit: str, rows: int, tmp_path: Path
) -> None:
    # In a process of its own: W&B's helpers are one for all that a process begins there.
    command = [sys.executable, "-c", HITS_WANDB, str(tmp_path), hit, str(rows)]
    around = {name: value for name, value in os.environ.items() if name != "WANDB_SERVICE"}
    ended = subprocess.run(command, cwd=ROOT, env=around, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("said:") == ended.stdout.count("nothing more is sent") == 1
    assert len(RunFolder(tmp_path).metrics.read_text().splitlines()) == rows


@installed
def test_a_wandb_that_lets_nobody_in_is_a_wrong_request(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"BASE_URL": "http://127.0.0.1:9", "ERROR_REPORTING": "false"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    with pytest.raises(
        RequestError, match=r"telemetry\.wandb_project = rlvr: .*WANDB_API_KEY, or telemetry\.wandb_mode"
    ):
        WandbRun(tmp_path, TelemetryOptions(wandb_project="rlvr"), {}, pytest.fail)


def test_a_run_that_asks_for_wandb_where_it_is_not_installed_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wandb_run, "find_spec", lambda name: None)
    ended = tools.launched_here(tmp_path / "run", *tools.LAYOUTS["dp2"], "telemetry.wandb_project=rlvr")
    assert ended.code == 2, ended.all
    assert "telemetry.wandb_project" in ended.err and 'pip install "a3po-megatron[wandb]"' in " ".join(
        ended.err.split()
    )
    assert not (tmp_path / "run").exists()


def test_a_folders_id_is_its_own_and_stays(tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    assert run_id(folders[0]) == run_id(folders[0]) != run_id(folders[1])
    folders[0].rename(tmp_path / "moved")
    assert run_id(tmp_path / "moved") == (tmp_path / "moved/wandb/id").read_text().strip()
