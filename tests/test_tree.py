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

    def delete_key(self, key: str) -> None:
        self.asked[self.rank] += 1
        del self.kept[key]


def decided(store: CountingStore, world: int, missing: frozenset[int] = frozenset()) -> list[Any] | None:
    """One decision: ranks come from the last one on, as the tree has them wait for each other."""
    trees = {rank: Tree(store, rank, world, (Late,)) for rank in range(world) if rank not in missing}
    said = None
    for rank in sorted(trees, reverse=True):
        store.rank = rank
        said = trees[rank].up("1", ["tag", {"of": rank, "text": 'é, "]'}])
    store.rank = 0
    trees[0].answer("1", {"value": 7})
    for store.rank, tree in trees.items():
        assert tree.answered("1") == {"value": 7}
    store.rank = 0
    trees[0].forget(["1"])
    return said


@pytest.mark.parametrize("world", [1, 2, 3, 7, 8, 9, 64, 100, 256, 1024])
def test_rank_0_hears_all_by_rank_and_no_rank_asks_more_than_a_few_times_the_logarithm(world: int) -> None:
    store = CountingStore()
    assert decided(store, world) == [["tag", {"of": rank, "text": 'é, "]'}] for rank in range(world)]
    height = math.ceil(math.log2(world)) if world > 1 else 0
    # Of each rank below: wait, get, delete. Of its own: set, wait for the answer, get; on rank 0 answer, forget.
    assert store.asked[0] == 3 * height + 4 and max(store.asked.values()) == store.asked[0]
    assert not store.kept, "nothing stays behind"


@pytest.mark.parametrize("world", [2, 5, 16, 33])
def test_every_rank_hands_its_words_to_one_that_waits_for_it(world: int) -> None:
    for rank in range(world):
        assert all(above(other) == rank for other in below(rank, world))
    heard = [other for rank in range(world) for other in below(rank, world)]
    assert sorted(heard) == list(range(1, world))


@pytest.mark.parametrize("rank", [1, 2, 3, 4, 12, 15])
def test_the_rank_that_does_not_come_is_named_whoever_waits_for_it(rank: int) -> None:
    with pytest.raises(Missing) as missing:
        decided(CountingStore(), 16, frozenset([rank]))
    assert missing.value.rank == rank


def test_whoever_waits_for_one_that_waits_has_more_patience() -> None:
    store = CountingStore()
    decided(store, 16)
    for rank in range(1, 16):
        mine = store.waited[f"1/{rank}"]
        assert all(store.waited[f"1/{other}"] + GRACE <= mine for other in below(rank, 16))
    assert store.waited["1"] >= max(store.waited[f"1/{rank}"] for rank in range(1, 16)) + GRACE
