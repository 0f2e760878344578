"""Ranks that stay for a session are worth what new ones are: whatever fails is told, whatever is left is taken away."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases_worlds as cases
from tests.harness.ranks import run_ranks
from tests.harness.worlds import end_worlds


def processes() -> list[int]:
    return [seen["process"] for seen in run_ranks(2, cases.seen)["seen"]]


def test_cases_find_the_same_processes_as_new_ones_whatever_was_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    end_worlds()
    new = run_ranks(2, cases.seen)["seen"]
    end_worlds()
    before = run_ranks(2, cases.seen)["seen"]
    run_ranks(2, cases.leaves_everything_behind, cases.adds_up)
    after = run_ranks(2, cases.seen)["seen"]
    assert after == before
    assert len({seen["process"] for seen in after + new}) == 4
    own = ("process", "environment", "python")  # a world has a port of its own, and a process a stream of its own
    for ours, theirs in zip(after, new, strict=True):
        assert {k: v for k, v in ours.items() if k not in own} == {k: v for k, v in theirs.items() if k not in own}
        assert ours["environment"] | {"MASTER_PORT": ""} == theirs["environment"] | {"MASTER_PORT": ""}
        assert ours["groups"] == 1 and not ours["megatron"] and not ours["said before"]
    monkeypatch.setenv("A3PO_OF_A_TEST", "1")
    assert all(seen["environment"]["A3PO_OF_A_TEST"] == "1" for seen in run_ranks(2, cases.seen)["seen"])


@pytest.mark.parametrize(
    ("case", "words"),
    [
        (cases.fails_on_rank_1, ["on rank 1 of 2", "fails_on_rank_1 failed:\nTraceback", "ValueError: what it was"]),
        (cases.dies_on_rank_1, ["rank 1 died", "last words"]),
        (cases.hangs_on_rank_1, ["died", "Thread 0x"]),
        (cases.returns_no_json, [" of 2, ", "not JSON serializable"]),  # on both: whichever is heard first
    ],
    ids=["raises", "dies", "hangs", "no JSON"],
)
def test_a_case_that_fails_is_told_and_takes_its_ranks_down_and_the_next_ones_get_others(
    case: Callable[..., Any], words: list[str], tmp_path: Path
) -> None:
    before = processes()
    with pytest.raises(AssertionError) as caught:
        run_ranks(2, case, folder=tmp_path, timeout=8)
    for word in words:
        assert word in str(caught.value)
    if case is cases.hangs_on_rank_1:  # of the one that waits for it, too
        assert "waits_for_ever" in (tmp_path / "rank-1.log").read_text()
        assert "hangs_on_rank_1" in (tmp_path / "rank-0.log").read_text()
    assert not any(Path(f"/proc/{process}").exists() for process in before if process != os.getpid())
    assert run_ranks(2, cases.adds_up)["adds_up"] == [6.0, 6.0]
    assert not set(processes()) & set(before)
