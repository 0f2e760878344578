"""Runs that go on from a journal, or in another layout than they began in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from a3po_megatron.files.run_folder import step_files
from a3po_megatron.run.journal import read_frames, write_frame
from a3po_megatron.run.manifest import read_manifest
from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import LAYOUTS, STEPS, VOLATILE, Interrupt

pytestmark = [pytest.mark.soak, pytest.mark.alone]

TP2 = LAYOUTS["tp2"]
ONE_ENGINE = ("rollout.tensor=2",)
# Small groups have spread less often: more rounds, and most steps end with groups to spare.
CARRYING = ("trainer.rollouts_per_prompt=2", "trainer.prompts_per_step=6", "rollout.max_batches=4")


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The finished folder of a TP 2 run that nothing disturbed."""

    def of(*overrides: str) -> Path:
        return tools.uninterrupted("tp2", tmp_path_factory, *overrides)

    return of


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in row.items() if not name.startswith(VOLATILE)} for row in rows]


# --- the journal's scores --------------------------------------------------------------------------------------------


def shift_scores(path: Path, by: float) -> int:
    """Writes a file of a journal anew with other old log-probs in it; returns how many frames were changed."""
    frames = [(frame.header, frame.payload()) for frame in read_frames(path)]
    changed = 0
    with path.open("wb") as file:
        for header, payload in frames:
            assert payload is not None
            values = np.frombuffer(payload, np.uint8)
            if header["kind"] == "scores":
                scores = np.frombuffer(payload, "<f4").reshape(2, -1).copy()
                scores[0] += by
                values, changed = scores.view(np.uint8), changed + 1
            write_frame(file, {k: v for k, v in header.items() if k not in ("bytes", "blake3")}, values)
    return changed


def test_a_batch_that_was_scored_before_a_kill_is_not_scored_again(whole: Callable[..., Path], tmp_path: Path) -> None:
    """The scores in the journal are changed: whoever computes them anew does not see that."""
    folder, by = tmp_path / "run", -0.125
    tools.interrupted(folder, Interrupt("update", 3, "SIGKILL", "all"), *TP2)
    assert tools.saved_steps(folder) == 2  # the steps 2 and 3 are done again
    files = [path for path in step_files(folder / "journal") if path.name.startswith("step-00003.")]
    assert sum(shift_scores(path, by) for path in files) == 1  # one replica
    tools.trained(folder, *TP2)
    rows, wanted = tools.rows_of(folder), tools.rows_of(whole())
    assert lasting(rows[:3]) == lasting(wanted[:3])
    shift = rows[3]["policy/old_logprob_mean"] - wanted[3]["policy/old_logprob_mean"]
    assert shift == pytest.approx(by, abs=1e-5)
    sampled = tools.groups_sampled(folder)
    assert [row["perf/recalled_groups"] for row in rows] == [0, 0, sampled[2], sampled[3], 0, 0]


# --- another layout --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def carrying(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run that left before an update, with carried-over groups in its checkpoint and finished ones in its journal,
    and how many steps it had done. Not to be written to: copy it."""
    folder = tmp_path_factory.mktemp("carrying") / "run"
    tools.interrupted(folder, Interrupt("score", 4, "SIGUSR1", "rank", rank=1), *TP2, *CARRYING)
    newest = tools.newest_checkpoint(folder)
    assert newest is not None
    manifest = read_manifest(newest)
    assert manifest.step == 4
    assert manifest.state["collector"]["surplus"], "nothing is carried over: nothing would be tested"
    kinds = Counter(f.header["kind"] for path in step_files(folder / "journal") for f in read_frames(path))
    assert kinds["group"] and kinds["scores"]
    return folder, manifest.step


def assert_every_prompt_counts_once(folder: Path) -> None:
    """No group is sampled twice, trained on twice or lost: what has spread is accepted in the order of the prompts."""
    rows, sampled, accepted, spread = tools.rows_of(folder), [], [], set()
    for step, records in sorted(tools.rollouts_of(folder).items()):
        groups: dict[int, list[dict[str, Any]]] = {}
        for record in records:
            groups.setdefault(record["prompt_index"], []).append(record)
        assert {len(group) for group in groups.values()} == {2}, f"step {step}: a group is there twice, or half of it"
        mine = sorted(index for index, group in groups.items() if group[0]["accepted"])
        carried = [index for index in mine if groups[index][0]["carried"]]
        assert len(mine) == rows[step]["rollout/kept_groups"], f"step {step}"
        assert len(carried) == rows[step]["rollout/carried_groups"], f"step {step}"
        accepted += mine
        sampled += [index for index, group in groups.items() if not group[0]["carried"]]
        spread |= {i for i, group in groups.items() if {r["outcome"] for r in group} == {"correct", "wrong"}}
    assert sorted(sampled) == list(range(len(sampled)))
    assert accepted == sorted(spread)[: len(accepted)]


@pytest.mark.parametrize(
    "layout", [LAYOUTS["pp2"], LAYOUTS["dp2"], (*TP2, *ONE_ENGINE)], ids=["pipeline 2", "data 2", "one engine"]
)
def test_an_interrupted_run_goes_on_in_another_layout_and_every_prompt_counts_once(
    layout: tuple[str, ...], carrying: tuple[Path, int], whole: Callable[..., Path], tmp_path: Path
) -> None:
    (stopped, done), wanted = carrying, tools.rows_of(whole(*CARRYING))
    folder = tools.copy_run(stopped, tmp_path / "run")
    before = (folder / "metrics.jsonl").read_text()
    again = tools.trained(folder, *layout, *CARRYING)
    assert tools.steps_shown(again) == list(range(done + 1, STEPS + 1))
    assert (folder / "metrics.jsonl").read_text().startswith(before)
    rows = tools.rows_of(folder)
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert_every_prompt_counts_once(folder)
    assert rows[done]["perf/recalled_groups"] == tools.groups_sampled(folder)[done] > 0
    assert rows[done]["rollout/carried_groups"] == wanted[done]["rollout/carried_groups"] > 0
    for row, other in zip(rows, wanted, strict=True):
        assert row["policy/ratio_first_max"] < 1e-4
        assert row["learner/loss"] == pytest.approx(other["learner/loss"], abs=1e-3)
        assert row["rollout/kept_groups"] == other["rollout/kept_groups"]
        assert row["reward/mean"] == pytest.approx(other["reward/mean"], abs=0.1)


# --- an engine that spans ranks --------------------------------------------------------------------------------------


def test_two_ranks_of_one_engine_leave_a_rollout_together_and_the_run_ends_as_if_undisturbed(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted, folder = whole(*ONE_ENGINE), tmp_path / "run"
    began = time.monotonic()
    # Soon after its beginning: a rollout that is half done is worth finishing.
    tools.interrupted(folder, Interrupt("rollout", 3, "SIGUSR1", "rank", rank=1, delay=0.01), *TP2, *ONE_ENGINE)
    assert time.monotonic() - began < tools.RUN_SECONDS / 2, "one of them waited for the other"
    assert tools.saved_steps(folder) == 3
    for rank in (0, 1):  # where each was when it left, from its traceback
        assert "rollout/intake.py" in (folder / "logs" / f"rank-{rank}.log").read_text(), rank
    tools.trained(folder, *TP2, *ONE_ENGINE)
    tools.assert_same_run(folder, wanted)
    assert tools.rows_of(folder)[3]["perf/recalled_groups"] < tools.groups_sampled(folder)[3]
