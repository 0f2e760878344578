"""The tree by which all ranks decide: who hears whom, how often the busiest rank asks, and who is named when one is
missing."""

from __future__ import annotations

import math
from collections import Counter
from datetime import timedelta
from typing import Any

import pytest

from a3po_megatron.ranks.tree import GRACE, Missing, Tree, above, below


class Late(Exception):
    """What the fake store raises when the time is up."""


class CountingStore:
    """A store in memory that counts what each rank asks of it. A fake of a thousand ranks: real stores are
    tests/test_cluster.py's. Nobody waits: whoever is to come has come."""

    timeout = timedelta(seconds=10)

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.asked: Counter[int] = Counter()
        self.waited: dict[str, timedelta] = {}
        self.rank = 0

    def set(self, key: str, value: str) -> None:
        self.asked[self.rank] += 1
        self.kept[key] = value.encode()

    def get(self, key: str) -> bytes:
        self.asked[self.rank] += 1
        return self.kept[key]

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        self.asked[self.rank] += 1
        self.waited[keys[0]] = timeout
        if not all(key in self.kept for key in keys):
            raise Late

    def check(self, keys: list[str]) -> bool:
        return all(key in self.kept for key in keys)

    def delete_key(self, key: str) -> None:
        self.asked[self.rank] += 1
        del self.kept[key]


def trees_of(store: CountingStore, world: int, missing: frozenset[int] = frozenset()) -> dict[int, Tree]:
    return {rank: Tree(store, rank, world, (Late,)) for rank in range(world) if rank not in missing}


def decided(store: CountingStore, trees: dict[int, Tree], name: str = "1") -> list[Any] | None:
    """One decision: ranks come from the last one on, as the tree has them wait for each other."""
    said = None
    for rank in sorted(trees, reverse=True):
        store.rank = rank
        said = trees[rank].up(name, ["tag", {"of": rank, "text": 'é, "]'}])
    store.rank = 0
    trees[0].answer(name, {"value": 7})
    for store.rank, tree in trees.items():
        assert tree.answered(name) == {"value": 7}
    store.rank = 0
    trees[0].forget([name])
    return said


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 9, 64, 100, 256, 1024])
def test_rank_0_hears_all_by_rank_and_no_rank_asks_more_than_a_few_times_the_logarithm(world: int) -> None:
    store = CountingStore()
    trees = trees_of(store, world)
    for name in ("1", "2"):
        store.asked.clear()
        assert decided(store, trees, name) == [["tag", {"of": rank, "text": 'é, "]'}] for rank in range(world)]
    height = math.ceil(math.log2(world)) if world > 1 else 0
    # Of each rank below: wait, get, delete. Of its own: a mark, that of before away, its words or the answer, wait for
    # the answer, get; on rank 0 forget.
    assert store.asked[0] == 3 * height + 6 and max(store.asked.values()) == store.asked[0]
    assert sorted(store.kept) == sorted(f"2/here/{rank}" for rank in range(world)), "nothing else stays behind"


@pytest.mark.parametrize("world", [2, 5, 16, 33])
def test_every_rank_hands_its_words_to_one_that_waits_for_it(world: int) -> None:
    for rank in range(world):
        assert all(above(other) == rank for other in below(rank, world))
    heard = [other for rank in range(world) for other in below(rank, world)]
    assert sorted(heard) == list(range(1, world))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 12, 15])
def test_the_rank_that_does_not_come_is_named_whoever_waits_for_it(rank: int) -> None:
    store = CountingStore()
    with pytest.raises(Missing) as missing:
        decided(store, trees_of(store, 16, frozenset([rank])))
    assert missing.value.rank == rank


@pytest.mark.parametrize(("waiting", "absent"), [(6, 7), (4, 6), (8, 15)])
def test_a_rank_that_waits_in_vain_is_not_blamed_for_the_one_it_waits_for(waiting: int, absent: int) -> None:
    """It came late, and would wait longer than the one that waits for it."""
    store = CountingStore()
    store.set(f"1/here/{waiting}", "")
    with pytest.raises(Missing) as missing:
        decided(store, trees_of(store, 16, frozenset([waiting, absent])))
    assert missing.value.rank == absent


def test_whoever_waits_for_one_that_waits_has_more_patience() -> None:
    store = CountingStore()
    decided(store, trees_of(store, 16))
    soon = GRACE / 2  # what has passed by then is taken off
    for rank in range(1, 16):
        mine = store.waited[f"1/{rank}"]
        assert all(store.waited[f"1/{other}"] + soon <= mine for other in below(rank, 16))
    assert store.waited["1"] >= max(store.waited[f"1/{rank}"] for rank in range(1, 16)) + soon
