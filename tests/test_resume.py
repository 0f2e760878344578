"""A run that is interrupted and started again ends bit for bit as one that nothing disturbed.

Twenty points: three layouts, every phase, polite signals (the run saves and exits 85) and kills. One of them:

    pytest tests/test_resume.py -m '' -k dp2-publish-of-step-3-SIGKILL-to-rank-1

An interrupted run and its resume take a minute. Two points are always tested, in ranks of the session: a signal and a
kill. By command tests/test_launch.py kills a rank, and tests/test_start_signals.py sends signals, in a start. All
twenty, by command: `make soak`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from a3po_megatron.files.run_folder import RunFolder
from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import EVERY, LAYOUTS, STEPS, Ended, Interrupt


def point(
    layout: str,
    phase: str,
    step: int,
    signal: str,
    to: str,
    *,
    always: bool = False,
    stop: Callable[..., object] = tools.interrupted,
    resume: Callable[..., Ended] = tools.trained,
    times: int = 1,
    **more: Any,
) -> Any:
    """One row of the table, as a case for pytest. `to`: "rank N", "launcher" or "all" (rank 0 then sends)."""
    where, _, rank = to.partition(" ")
    interrupt = Interrupt(phase, step, signal, where, rank=int(rank or 0), times=times, **more)
    name = f"{layout}-{phase}-of-step-{step}-{signal}-to-{to.replace(' ', '-')}"
    name += "-of-the-session" * (stop is tools.interrupted_here)
    return pytest.param(layout, interrupt, stop, resume, id=name, marks=() if always else pytest.mark.soak)


IN_SESSION: dict[str, Any] = {"always": True, "stop": tools.interrupted_here, "resume": tools.trained_here}
# Steps count from 0; saves are due after the steps 1, 3 and 5, and go on into the rollout of the step that follows.
POINTS = [
    #     layout  phase    step  signal     to
    # also tests/test_resume_faults.py's
    point("tp2", "rollout", 3, "SIGUSR1", "rank 1", **IN_SESSION),
    point("tp2", "rollout", 3, "SIGUSR1", "rank 1"),
    point("tp2", "save", 3, "SIGKILL", "all"),
    point("pp2", "update", 2, "SIGKILL", "rank 0"),
    point("pp2", "publish", 2, "SIGTERM", "launcher"),
    point("dp2", "reward", 2, "SIGKILL", "all"),
    point("dp2", "update", 2, "SIGKILL", "rank 0", **IN_SESSION),
    point("dp2", "score", 4, "SIGTERM", "rank 1"),
    #
    point("tp2", "rollout", 4, "SIGKILL", "rank 0", delay=0.02),  # the save after step 3 may still be going on
    point("tp2", "reward", 1, "SIGTERM", "launcher"),
    point("tp2", "score", 2, "SIGUSR1", "launcher", times=5),
    point("tp2", "update", 3, "SIGUSR1", "rank 0", times=5),
    point("tp2", "publish", 4, "SIGKILL", "all"),
    #
    point("pp2", "rollout", 2, "SIGKILL", "all", delay=0.02),
    point("pp2", "reward", 3, "SIGUSR1", "rank 0"),
    point("pp2", "score", 4, "SIGKILL", "rank 1"),
    point("pp2", "save", 1, "SIGTERM", "rank 1"),
    #
    point("dp2", "rollout", 1, "SIGINT", "all"),  # Ctrl-C in a terminal hits all of them
    point("dp2", "rollout", 0, "SIGKILL", "all", delay=0.05),  # before any save
    point("dp2", "update", 4, "SIGKILL", "all"),
    point("dp2", "publish", 3, "SIGKILL", "rank 1"),
    point("dp2", "save", 3, "SIGKILL", "rank 0", delay=0.015),
]


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The finished folder of a layout's undisturbed run."""

    def of(layout: str, *overrides: str) -> Path:
        return tools.uninterrupted(layout, tmp_path_factory, *overrides)

    return of


def least_saved(point: Interrupt) -> int:
    """How many steps must be safe after the interruption: all that were done, or what was saved before a kill."""
    if not point.kills:
        return point.step + (point.phase == "save")
    return (point.step - 1) // EVERY * EVERY if point.step else 0  # a save may take until the step after it has ended


def assert_finished_work_is_taken_over(folder: Path, point: Interrupt, saved: int) -> None:
    """Of the steps that were done again, every group that had been sampled came from the journal, and no other did."""
    sampled = tools.groups_sampled(folder)
    taken = {row["step"]: row["perf/recalled_groups"] for row in tools.rows_of(folder)}
    assert [taken[step] for step in range(saved)] == [0] * saved
    if point.delay or point.times > 1 or (point.to == "launcher" and not point.kills):
        return  # it may have come further than to this point
    for step in range(saved, STEPS):
        if step == point.step and point.kills and point.phase == "score":
            # The last verdicts may have waited for their writer; what it had not written was done again.
            assert 0 < taken[step] <= sampled[step], f"step {step}"
        elif step < point.step or (step == point.step and point.phase not in ("rollout", "reward")):
            assert taken[step] == sampled[step] > 0, f"step {step}: {taken[step]} of {sampled[step]} groups"
        elif step == point.step:  # the round that it was in may be the last one or not
            assert (point.phase == "reward") <= taken[step] <= sampled[step], f"step {step}"
        else:
            assert taken[step] == 0, f"step {step} had never begun"


@pytest.mark.interruption
@pytest.mark.parametrize(("layout", "interrupt", "stop", "resume"), POINTS)
def test_an_interrupted_run_started_again_ends_bit_for_bit_as_an_undisturbed_one(
    layout: str,
    interrupt: Interrupt,
    stop: Callable[..., object],
    resume: Callable[..., Ended],
    whole: Callable[..., Path],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    wanted = whole(layout)
    folder = tools.copy_run(tools.stopped(layout, interrupt, tmp_path_factory, stop), tmp_path / "run")
    saved = tools.saved_steps(folder)
    assert least_saved(interrupt) <= saved < STEPS
    again = resume(folder, *LAYOUTS[layout])
    shown = tools.steps_shown(again)  # what lies in the newest checkpoint is not done again
    assert saved + 1 <= shown[0] and shown == list(range(shown[0], STEPS + 1)), again.all
    tools.assert_same_run(folder, wanted)
    timeline = RunFolder(folder).timeline.read_text().splitlines()
    assert [json.loads(line)["step"] for line in timeline] == list(range(STEPS))
    assert_finished_work_is_taken_over(folder, interrupt, saved)


@pytest.mark.soak
def test_a_run_interrupted_time_and_again_ends_bit_for_bit_as_an_undisturbed_one(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted, folder = whole("dp2"), tmp_path / "run"
    for interrupt in (
        Interrupt("update", 1, "SIGINT", "launcher"),
        Interrupt("rollout", 2, "SIGKILL", "rank", rank=1),
        Interrupt("rollout", 2, "SIGKILL", "all", delay=0.02),
        Interrupt("score", 3, "SIGTERM", "rank", rank=0),
    ):
        tools.interrupted(folder, interrupt, *LAYOUTS["dp2"])
    tools.trained(folder, *LAYOUTS["dp2"])
    tools.assert_same_run(folder, wanted)


@pytest.mark.soak  # tests/test_arena.py shows it of a learner by itself
def test_a_learner_that_leaves_memory_while_the_engine_samples_trains_and_resumes_bit_for_bit_the_same(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    # Leaving in a rollout, it is saved while neither weights nor optimizer are there.
    asked = "learner.offload=all"
    tools.interrupted(tmp_path / "run", Interrupt("rollout", 3, "SIGUSR1", "rank", rank=1), *LAYOUTS["dp2"], asked)
    tools.trained(tmp_path / "run", *LAYOUTS["dp2"], asked)
    tools.assert_same_run(tmp_path / "run", whole("dp2"))


@pytest.mark.soak
def test_a_run_killed_in_its_last_save_ends_bit_for_bit_as_an_undisturbed_one(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted, folder = whole("tp2"), tmp_path / "run"
    tools.interrupted(folder, Interrupt("save", STEPS - 1, "SIGKILL", "all"), *LAYOUTS["tp2"])
    tools.trained(folder, *LAYOUTS["tp2"])
    tools.assert_same_run(folder, wanted)


IN_PLACE = [  # what rank 0 does to put a checkpoint in place and remove the one before, in the background
    ("before", "rename", "step-000004"),
    ("after", "rename", "step-000004"),
    ("after", "replace", "checkpoints/latest"),
    ("after", "unlink", "step-000002/manifest.json"),
]


@pytest.mark.soak
@pytest.mark.parametrize("file", IN_PLACE, ids=lambda file: f"{file[0]}-{file[1]}-{file[2].replace('/', '-')}")
def test_a_run_killed_while_a_checkpoint_is_put_in_place_ends_bit_for_bit_as_an_undisturbed_one(
    file: tuple[str, str, str], whole: Callable[..., Path], tmp_path: Path
) -> None:
    folder, asked = tmp_path / "run", "checkpoint.keep_last=1"
    tools.interrupted(folder, Interrupt("save", 3, "SIGKILL", "all", file=file), *LAYOUTS["tp2"], asked)
    again = tools.trained(folder, *LAYOUTS["tp2"], asked)
    # `latest` was replaced first for the checkpoint after step 2; the other kills are at the one after step 4.
    renamed = 4 if file != IN_PLACE[0] and file != IN_PLACE[2] else 2
    assert tools.steps_shown(again)[0] == renamed + 1, again.all
    assert not list((folder / "checkpoints").glob(".step-*"))
    tools.assert_same_run(folder, whole("tp2"))


@pytest.mark.soak
@pytest.mark.parametrize("phase", ["engine", "model", "publish"])
def test_a_start_that_goes_on_may_be_killed_too(phase: str, whole: Callable[..., Path], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tools.interrupted(folder, Interrupt("update", 3, "SIGKILL", "all"), *LAYOUTS["tp2"])
    saved = tools.saved_steps(folder)
    tools.interrupted(folder, Interrupt(phase, -1, "SIGKILL", "all"), *LAYOUTS["tp2"])
    assert tools.saved_steps(folder) == saved
    tools.trained(folder, *LAYOUTS["tp2"])
    tools.assert_same_run(folder, whole("tp2"))


def test_a_finished_run_is_refused_and_nothing_in_its_folder_changes(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tools.copy_run(whole("tp2"), tmp_path / "run")
    before = tools.snapshot(folder)
    ended = tools.launched_here(folder, *LAYOUTS["tp2"])
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.all
    assert f"has done its {STEPS} steps" in ended.err
    assert tools.snapshot(folder) == before


@pytest.mark.soak
def test_a_finished_run_with_more_steps_to_do_ends_bit_for_bit_as_the_longer_run(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tools.copy_run(whole("tp2"), tmp_path / "run")
    more = f"trainer.steps={STEPS + 2}"
    again = tools.trained(folder, *LAYOUTS["tp2"], more)
    assert tools.steps_shown(again) == [STEPS + 1, STEPS + 2]
    tools.assert_same_run(folder, whole("tp2", more), STEPS + 2)


# What the comparison is worth: it must see everything that a wrong resume can change.


@pytest.mark.soak
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_undisturbed_runs_are_the_same_bit_for_bit(layout: str, whole: Callable[..., Path], tmp_path: Path) -> None:
    wanted, folder = whole(layout), tmp_path / "run"
    tools.trained(folder, *LAYOUTS[layout])
    tools.assert_same_run(folder, wanted)


@pytest.mark.soak
def test_a_run_of_another_seed_differs_in_metrics_rollouts_and_weights(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted, folder = whole("tp2"), tmp_path / "run"
    tools.trained(folder, *LAYOUTS["tp2"], "trainer.seed=1")
    with pytest.raises(AssertionError) as found:
        tools.assert_same_run(folder, wanted)
    for words in ("step 0: metric reward/", "rollouts/step-00000", ".weight at [0"):
        assert words in str(found.value)


def test_one_changed_bit_of_a_metric_a_rollout_or_a_weight_is_seen_and_named(
    whole: Callable[..., Path], tmp_path: Path
) -> None:
    wanted = whole("tp2")
    folder = tools.copy_run(wanted, tmp_path / "run")
    tools.assert_same_run(folder, wanted)

    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    entropy = rows[3]["policy/entropy"]
    rows[3] |= {"policy/entropy": entropy * (1 + 2**-52), "perf/seconds_rollout": 99.0, "startup/seconds": 1.0}
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    with pytest.raises(AssertionError) as found:
        tools.assert_same_run(folder, wanted)
    assert len(str(found.value).splitlines()) == 2
    assert "step 3: metric policy/entropy is " in str(found.value)
    assert f"not {entropy!r}" in str(found.value)

    (folder / "rollouts" / "step-00002.rank-1.parquet").unlink()
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in [*rows[:5], rows[4]]))
    tools.flip_a_bit_of_a_weight(folder / "checkpoints" / f"step-{STEPS:06d}")
    with pytest.raises(AssertionError) as found:
        tools.assert_same_run(folder, wanted)
    for words in ("the steps are [0, 1, 2, 3, 4, 4]", "rollouts of step 2: prompt ", " is only in ", "1 of "):
        assert words in str(found.value)


@pytest.mark.parametrize("layout", ["tp2", "dp2", pytest.param("pp2", marks=pytest.mark.soak)])
def test_the_last_checkpoint_holds_weights_and_both_moments_of_the_optimiser(
    layout: str, whole: Callable[..., Path]
) -> None:
    found = tools.read_chunks(whole(layout) / "checkpoints" / f"step-{STEPS:06d}")
    for kind in (r"linear_qkv\.weight", "exp_avg(?!_sq)", "exp_avg_sq"):
        held = [v for k, v in found.items() if re.search(kind, k) and isinstance(v, torch.Tensor)]
        assert any(v.count_nonzero() for v in held), f"{layout}: no {kind} in {sorted(found)}"


def test_values_are_compared_to_the_bit() -> None:
    def differ(one: Any, other: Any) -> bool:
        return bool(list(tools.objects_differ(one, other, "value")))

    nan = float("nan")
    same = [0.1, nan, None, "a", {"a": [1, (2.0, nan)]}, torch.tensor([nan, 1.0]), torch.tensor(3), torch.empty(0)]
    for value in same:
        assert not differ(value, value)
    assert not differ(torch.ones(2, 3).t(), torch.ones(3, 2))
    for one, other in [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ([1], [1, 2]),
        ({"a": 1}, {"b": 1}),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.bfloat16)),
        (torch.zeros(2), torch.zeros(2, 1)),
        (torch.tensor(1), torch.tensor(2)),
        ({"a": [torch.zeros(3)]}, {"a": [torch.tensor([0.0, 0.0, 1e-45])]}),
    ]:
        assert differ(one, other), (one, other)
