"""Two real ranks: they decide together or fail together, and each knows its place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import cases_cluster as cases
from tests.distributed.runner import run_ranks


@pytest.fixture(scope="module")
def seen() -> dict[str, list[Any]]:
    return run_ranks(
        2,
        cases.operations,
        cases.disagreements,
        cases.layouts,
        cases.data_follows_from_the_number_of_ranks,
        cases.absences,
    )


def test_every_rank_gets_the_same_decision_from_the_values_by_rank(seen: dict[str, list[Any]]) -> None:
    for found in seen["operations"]:
        for number, pair in enumerate(cases.VALUES):
            for operation in cases.OPERATIONS:
                assert found[f"{operation.__name__}/{number}"] == operation(list(pair)), (operation, pair)
        assert found["anything"] == [[[0, value], [1, value]] for value in cases.ANYTHING]
        assert found["same"] == list(cases.ANYTHING)
        assert found["own"] == {"reversed": [1, 0]}
        assert found["many rounds"] == [3 * n for n in range(200)]


def test_ranks_at_different_decisions_fail_together_and_are_named(seen: dict[str, list[Any]]) -> None:
    first, second = (found["tags"] for found in seen["disagreements"])
    assert first == second
    for words in ("rank 0", "'checkpoint'", "rank 1", "'publish'"):
        assert words in first


def test_values_that_must_be_the_same_and_are_not_fail_on_both_ranks(seen: dict[str, list[Any]]) -> None:
    first, second = (found["same"] for found in seen["disagreements"])
    assert first == second
    for words in ("'plan'", "digest-0", "rank 0", "digest-1", "rank 1"):
        assert words in first


def test_after_a_disagreement_the_ranks_are_still_in_step(seen: dict[str, list[Any]]) -> None:
    for found in seen["disagreements"]:
        assert (found["after tags"], found["after same"]) == (2, 2)


def test_a_rank_that_does_not_come_in_time_is_named(seen: dict[str, list[Any]]) -> None:
    first, second = (found["alone"] for found in seen["absences"])
    for words in ("rank 1", "'time is up'", "in time"):
        assert words in first
    for words in ("rank 0", "'time is up'", "in time"):
        assert words in second


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine_ranks", [1, 2])
def test_tensor_parallel_ranks_are_one_replica(seen: dict[str, list[Any]], rank: int, engine_ranks: int) -> None:
    found = seen["layouts"][rank]["tp2" if engine_ranks == 1 else "tp2, engine of 2"]
    assert found["rank, world"] == [rank, 2]
    assert found["tensor, pipeline, data"] == [rank, 0, 0]
    assert found["sizes"] == [2, 1, 1]
    assert found["groups"] == [2, 2, 1]
    assert found["replica"] == [["p0", [0]], ["p1", [0, 1]]], "everybody's value, by rank"
    assert found["sum over data"] == [1.0 + rank, 10.0], "there is one replica: nothing to add"


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("engine_ranks", [1, 2])
def test_data_parallel_ranks_are_two_replicas(seen: dict[str, list[Any]], rank: int, engine_ranks: int) -> None:
    found = seen["layouts"][rank]["dp2" if engine_ranks == 1 else "dp2, engine of 2"]
    assert found["rank, world"] == [rank, 2]
    assert found["tensor, pipeline, data"] == [0, 0, rank]
    assert found["sizes"] == [1, 1, 2]
    assert found["groups"] == [1, 1, 2]
    assert found["replica"] == [[f"p{rank}", list(range(rank + 1))]], "its own value alone"
    assert found["sum over data"] == [3.0, 20.0]


@pytest.mark.parametrize("layout", ["tp2", "dp2"])
def test_engines_are_neighbouring_ranks_whatever_the_learners_layout(seen: dict[str, list[Any]], layout: str) -> None:
    places = {
        name: [found[name]["engine, rank in it, engines"] for found in seen["layouts"]]
        for name in (layout, f"{layout}, engine of 2")
    }
    assert places[layout] == [[0, 0, 2], [1, 0, 2]]
    assert places[f"{layout}, engine of 2"] == [[0, 0, 1], [0, 1, 1]]


def test_the_number_of_replicas_follows_from_the_number_of_ranks(seen: dict[str, list[Any]]) -> None:
    assert seen["data_follows_from_the_number_of_ranks"] == [2, 2]
