"""Real ranks: they decide together or fail together, and each knows its place."""

from __future__ import annotations

from typing import Any

import pytest

from tests.distributed import cases_cluster as cases
from tests.harness.ranks import run_ranks


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


LAYOUTS = [
    pytest.param(world, tensor, engine_ranks, id=f"{world} ranks, tensor {tensor}, engines of {engine_ranks}")
    for world in (2, 4)
    for tensor in (1, 2, 4)
    for engine_ranks in (1, 2)
    if world % tensor == 0
]


@pytest.fixture(scope="module")
def of_four() -> dict[str, list[Any]]:
    return run_ranks(4, cases.layouts, cases.groups_held, cases.coordinates_told, cases.connections)


def test_a_group_of_all_ranks_connects_none_until_they_talk_and_then_neighbours(of_four: dict[str, list[Any]]) -> None:
    """Each with all others from the start would be three connections a rank, and 1,023 of 1,024 ranks."""
    for unused, used in of_four["connections"]:
        assert (unused, used) == (1, 3)  # one listens


@pytest.fixture(scope="module")
def places(seen: dict[str, list[Any]], of_four: dict[str, list[Any]]) -> dict[int, list[dict[str, Any]]]:
    """What every rank of two and of four sees of each layout."""
    return {2: seen["layouts"], 4: of_four["layouts"]}


def test_the_groups_that_ranks_hold_and_their_places_are_those_of_the_topology(of_four: dict[str, list[Any]]) -> None:
    for rank, by_layout in enumerate(of_four["groups_held"]):
        for layout, by_kind in zip(cases.HELD, by_layout, strict=True):
            for kind, (held, named) in by_kind.items():
                assert sorted(held) == named and rank in held, (layout, kind, rank)
                if kind in ("batch", "replica"):
                    assert held == named  # stage after stage
    for by_layout in of_four["coordinates_told"]:
        for layout, (told, named) in zip(cases.HELD, by_layout, strict=True):
            assert told == named, layout


@pytest.mark.parametrize(("world", "tensor", "engine_ranks"), LAYOUTS)
def test_every_rank_knows_its_place_its_replica_and_its_engine(
    places: dict[int, list[dict[str, Any]]], world: int, tensor: int, engine_ranks: int
) -> None:
    data = world // tensor
    for rank, layouts in enumerate(places[world]):
        found = layouts[f"{tensor}/{data}/{engine_ranks}"]
        assert found["rank, world"] == [rank, world]
        # rank = tensor + TP * (data + DP * pipeline): tensor parallel fastest
        assert found["tensor, pipeline, data"] == [rank % tensor, 0, rank // tensor]
        assert found["sizes"] == [tensor, 1, data]
        assert found["groups"] == [tensor, tensor, data]
        # A replica is the run of ranks that hold one copy of the model; everybody's value comes by rank.
        first = rank // tensor * tensor
        assert found["replica"] == [[f"p{n}", list(range(n + 1))] for n in range(first, first + tensor)]
        # An engine is a run of neighbouring ranks, whatever the learner's layout.
        assert found["engine, rank in it, engines"] == [
            rank // engine_ranks,
            rank % engine_ranks,
            world // engine_ranks,
        ]
        assert found["sum over data"] == [sum(range(1, data + 1)), 10.0 * data]


def test_the_number_of_replicas_follows_from_the_number_of_ranks(seen: dict[str, list[Any]]) -> None:
    assert seen["data_follows_from_the_number_of_ranks"] == [2, 2]
