"""Names in a run folder: written with the digits that runs have on disk, read as numbers, and only where ours."""

from __future__ import annotations

from pathlib import Path

import pytest

from a3po_megatron.files.run_folder import (
    RunFolder,
    journal_file,
    rank_file,
    rank_of,
    rejected_file,
    rollout_file,
    rollout_files,
    step_files,
    step_folder,
    step_folders,
    step_of,
    torn_folder,
    torn_folders,
)

RUN = RunFolder(Path("run"))
ON_DISK = [  # (path, its step, its rank)
    (step_folder(RUN.checkpoints, 12), "checkpoints/step-000012", 12, None),
    (step_folder(RUN.hf, 1_000_000), "hf/step-1000000", 1_000_000, None),
    (torn_folder(step_folder(RUN.checkpoints, 12)), "checkpoints/torn-step-000012", 12, None),
    (journal_file(RUN.journal, 12, 34), "journal/step-00012.rank-34", 12, 34),
    (rollout_file(RUN.rollouts, 123_456, 0), "rollouts/step-123456.rank-0.parquet", 123_456, 0),
    (rejected_file(RUN.rejected, 3, 5, 7), "rejected/step-00003.mini-batch-5.rank-7.pt", 3, 7),
]


@pytest.mark.parametrize(("path", "name", "step", "rank"), ON_DISK, ids=[name for _, name, *_ in ON_DISK])
def test_a_name_is_as_runs_have_it_on_disk_and_says_its_step_and_rank(
    path: Path, name: str, step: int, rank: int | None
) -> None:
    assert path == Path("run", name)
    assert step_of(path) == step
    if rank is not None:
        assert rank_of(path) == rank


def test_a_rank_is_read_from_the_names_of_its_logs() -> None:
    assert [rank_of(rank_file(RUN.logs, 3, kind)) for kind in ("log", "stacks", "words")] == [3, 3, 3]


@pytest.mark.parametrize("name", ["step-best", "step-", "step-9th", "latest", "a-step-3", ".step-000004.partial"])
def test_a_name_that_is_not_ours_has_no_step(name: str) -> None:
    with pytest.raises(ValueError, match="no step is in this name"):
        step_of(Path(name))


def test_steps_are_listed_as_numbers_and_what_is_not_ours_is_left_out(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    for name in ("step-1000000", "step-999999", "torn-step-000007", "step-best", "step-3.old", ".step-4.partial"):
        (run.checkpoints / name).mkdir(parents=True)
    (run.checkpoints / "step-000005").touch()  # a file
    assert [step_of(path) for path in step_folders(run.checkpoints)] == [999_999, 1_000_000]
    assert [path.name for path in torn_folders(run.checkpoints)] == ["torn-step-000007"]
    assert step_folders(run.hf) == []  # there is no such folder yet


def test_files_of_steps_come_by_step_and_rank_and_rollouts_without_what_is_half_written(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.rollouts.mkdir()
    for step, rank in ((2, 0), (1, 10), (100_000, 0), (1, 9)):
        rollout_file(run.rollouts, step, rank).touch()
    for name in (
        "step-00001.txt",
        "notes.rank-0.txt",
        "step-best.rank-0.parquet",
        ".step-00009.rank-0.parquet.partial",
    ):
        (run.rollouts / name).touch()
    (run.rollouts / "step-00003.rank-0.jsonl.partial").touch()
    found = [(step_of(path), rank_of(path)) for path in step_files(run.rollouts)]
    assert found == [(1, 9), (1, 10), (2, 0), (3, 0), (100_000, 0)]
    assert {step: list(map(rank_of, files)) for step, files in rollout_files(tmp_path).items()} == {
        1: [9, 10],
        2: [0],
        100_000: [0],
    }
