"""What all ranks say, on its way to rank 0 and back, through a store: no rank does more than O(log n) of it.

A binomial tree. With low(r) the lowest bit that is set in r, rank r hands what it heard to rank r - low(r), and hears
before that what the ranks r + 1, r + 2, r + 4, … up to r + low(r) hand it: of ranks in a row, whose words come in their
order. Rank 0 hears of all so. Its answer is one key that everyone reads.

Words travel as JSON that only rank 0 reads. The higher a rank stands in the tree, the longer it waits. Every rank says
that it is there before it waits for others: whoever waits in vain names the first of those below that never came, and
not one that waits in vain itself.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

GRACE = timedelta(seconds=2)  # longer that a rank waits than those below it
SHORTEST = timedelta(milliseconds=10)  # that it waits in any case: 0 would be for ever
_MISSING = "!"  # before the name of a rank that did not come


class Store(Protocol):
    """What is used of torch's stores. `wait` raises torch's DistStoreError when the time is up."""

    @property
    def timeout(self) -> timedelta: ...
    def set(self, key: str, value: str, /) -> Any: ...
    def get(self, key: str, /) -> bytes: ...
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def check(self, keys: list[str], /) -> bool: ...
    def delete_key(self, key: str, /) -> Any: ...


class Missing(Exception):
    """A rank that did not come in time."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank)
        self.rank = rank


def below(rank: int, world: int) -> list[int]:
    """Returns the ranks that hand their words to this one, in ascending order."""
    ranks, step = [], 1
    while rank + step < world and (rank == 0 or step < _low(rank)):
        ranks.append(rank + step)
        step *= 2
    return ranks


def above(rank: int) -> int:
    """Returns the rank that a rank other than 0 hands its words to."""
    return rank - _low(rank)


def _low(rank: int) -> int:
    return rank & -rank


class Tree:
    def __init__(self, store: Store, rank: int, world: int, late: tuple[type[Exception], ...]) -> None:
        """`late`: what the store raises when the time is up."""
        self._store, self._rank, self._world, self._late = store, rank, world, late
        self._below = below(rank, world)
        self._mark = ""  # that this rank is there, of the decision before

    def up(self, name: str, value: Any) -> list[Any] | None:
        """Hands on this rank's value (JSON) with those of the ranks below; returns all by rank on rank 0, else None.
        Every rank must call it. Raises Missing on rank 0 for a rank that did not come."""
        # Whoever begins a decision has read the one before: nobody looks for its mark any more.
        before, self._mark = self._mark, f"{name}/here/{self._rank}"
        self._store.set(self._mark, "")
        if before:
            self._store.delete_key(before)
        words, missing, begin = [json.dumps(value)], "", time.monotonic()
        for number, rank in enumerate(self._below):
            patience = self._store.timeout + GRACE * number - timedelta(seconds=time.monotonic() - begin)
            said = self._heard(f"{name}/{rank}", max(patience, SHORTEST))
            if said is None:
                said = f"{_MISSING}{self._absent(name, rank)}"
            missing = missing or (said if said.startswith(_MISSING) else "")
            words.append(said)
        if self._rank:
            self._store.set(f"{name}/{self._rank}", missing or ",".join(words))
            return None
        if missing:
            raise Missing(int(missing.removeprefix(_MISSING)))
        return list(json.loads(f"[{','.join(words)}]"))

    def answer(self, name: str, value: Any) -> None:
        """Says to all, on rank 0, what came of it."""
        self._store.set(name, json.dumps(value))

    def answered(self, name: str) -> Any:
        """Returns what rank 0 said. Raises Missing where it does not in time."""
        try:
            self._store.wait([name], self._store.timeout + GRACE * (self._world.bit_length() + 1))
        except self._late as error:
            raise Missing(0) from error
        return json.loads(self._store.get(name))

    def forget(self, names: Sequence[str]) -> None:
        """Takes answers that everyone has read off the store."""
        for name in names:
            self._store.delete_key(name)

    def _heard(self, key: str, patience: timedelta) -> str | None:
        try:
            self._store.wait([key], patience)
        except self._late:
            return None
        said = self._store.get(key).decode()
        self._store.delete_key(key)
        return said

    def _absent(self, name: str, rank: int) -> int:
        """The first rank of those that a rank speaks for that never came; the rank itself if all did, too late."""
        spoken_for = range(rank, min(rank + _low(rank), self._world))
        return next((each for each in spoken_for if not self._store.check([f"{name}/here/{each}"])), rank)
