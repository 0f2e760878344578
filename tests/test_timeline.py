"""The timeline: where each rank's seconds of a step went. Its rows are whole, small, and cut back with the run."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest

from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.telemetry import clock
from a3po_megatron.telemetry.catalogue import PARTS, Phase
from a3po_megatron.telemetry.timeline import LIMIT, TimelineWriter, cut_timeline, parts_of, timeline_row
from tests.harness import interrupted_runs as tools


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in RunFolder(folder).timeline.read_text().splitlines()]


def test_the_parts_of_a_step_add_up_to_its_seconds_by_another_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    watched = clock.Clock()
    watched.begin(0)
    with watched.phase(Phase.CHECKPOINT):
        now += 2.0
    watched.begin(1)
    began = now
    now += 0.25  # in no phase
    with watched.phase(Phase.EVALUATE):
        now += 3.0
    with watched.phase(Phase.ROLLOUT):
        now += 4.0
        watched.idle += 1.5
        with watched.phase(Phase.REWARD):
            now += 1.0
    with watched.phase(Phase.UPDATE):
        now += 5.0
    now += 0.5
    parts = parts_of(watched.spent())
    assert parts == {
        "evaluate": 3.0,
        "rollout": 2.5,
        "waiting": 1.5,
        "reward": 1.0,
        "score": 0.0,
        "update": 5.0,
        "publish": 0.0,
        "checkpoint": 2.0,
        "rest": 0.75,
    }
    assert list(parts) == list(PARTS)
    assert sum(parts.values()) == (now - began) + 2.0


def spent(seconds: float, idle: float = 0.0) -> dict[str, float]:
    return {"rollout": seconds + idle, "idle": idle, "elapsed": seconds + idle + 1.0}


def test_a_row_of_many_ranks_has_the_slowest_the_fastest_and_others_evenly_spread() -> None:
    by_rank = [spent(5.0, 2.0)] * 1024
    by_rank[333], by_rank[777] = spent(6.5, 0.5), spent(1.0, 6.0)
    row = timeline_row(7, by_rank)
    assert (row["step"], row["world"], row["slowest"], row["fastest"], row["seconds"]) == (7, 1024, 333, 777, 8.0)
    ranks = row["ranks"]
    assert len(ranks) == LIMIT and {0, 333, 777, 1023} < set(ranks) and ranks == sorted(ranks)
    spread = [rank for rank in ranks if rank not in (333, 777)]
    gaps = {after - before for before, after in itertools.pairwise(spread)}
    assert gaps <= {16, 17}, "1023 / 61 ranks apart"
    assert [row["rollout"][ranks.index(rank)] for rank in (333, 777, 0)] == [6.5, 1.0, 5.0]
    assert len(json.dumps(row)) < 8_000
    assert timeline_row(0, by_rank[:LIMIT])["ranks"] == list(range(LIMIT))


def test_a_timeline_is_cut_back_to_the_step_at_which_a_run_resumes_however_often(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).timeline
    cut_timeline(path, 3)  # there is none yet
    assert not path.exists()
    writer = TimelineWriter(path, AtOnce())
    for step in range(5):
        writer.write(step, [spent(1.0)])
    writer.close()
    whole = path.read_text().splitlines(keepends=True)
    for _ in range(2):
        cut_timeline(path, 3)
        assert path.read_text() == "".join(whole[:3])
    path.write_text("".join(whole[:2]) + whole[2][:-20])  # killed within a row
    cut_timeline(path, 3)
    assert path.read_text() == "".join(whole[:2])
    path.write_text("".join(whole[:1]) + "no row\n" + "".join(whole[2:]))
    cut_timeline(path, 3)
    assert path.read_text() == whole[0]
    cut_timeline(path, 0)
    assert path.read_text() == ""


def test_the_timeline_of_two_ranks_says_what_their_row_of_metrics_says_of_the_slower_one(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tools.uninterrupted("dp2", tmp_path_factory)
    rows, metrics = rows_of(folder), tools.rows_of(folder)
    assert [row["step"] for row in rows] == [row["step"] for row in metrics] == list(range(tools.STEPS))
    for row, known in zip(rows, metrics, strict=True):
        assert (row["world"], row["ranks"]) == (2, [0, 1])
        parts = {name: row[name] for name in PARTS}
        assert min(min(values) for values in parts.values()) >= 0
        sampling = [sum(pair) for pair in zip(parts.pop("rollout"), parts["waiting"], strict=True)]
        assert max(sampling) == pytest.approx(known["perf/seconds_rollout"], abs=2e-4)
        for name in set(parts) - {"waiting", "rest"}:
            assert max(parts[name]) == pytest.approx(known[f"perf/seconds_{name}"], abs=1e-4)
        elapsed = known["rollout/tokens"] / known["perf/tokens_per_second"]
        sums = [sum(row[name][rank] for name in PARTS) for rank in (0, 1)]
        assert max(sums) == pytest.approx(row["seconds"], abs=1e-3)
        own = max(total - checkpoint for total, checkpoint in zip(sums, row["checkpoint"], strict=True))
        assert own == pytest.approx(elapsed, abs=1e-3)
        assert row["update"][0] > 0 and row["rollout"][0] > 0
