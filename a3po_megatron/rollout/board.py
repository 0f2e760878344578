"""Which prompts of a step an engine takes: the next one that is released, as soon as it has room.

    next of an engine   how many of its own prompts are taken           a counter in the store
    verdicts            "3+,0-,7+,…": whose groups count or do not      text that is appended to
    said                how often was appended                          a counter: whether there is anything new

Prompt n is the own one of engine n mod engines. An engine takes its own ones first; when none of them is left and it
holds less than half of an engine's share, it takes those that others have not come to.

The first rank of an engine asks and tells the others, so that all of its ranks take the same. Every first rank reads
all verdicts and comes to the same release (schedule/refill.py). Which engine takes which prompt is a matter of time,
and nothing else is: who trains on it follows from whose own it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..ranks.groups import Ranks
from ..schedule.refill import Refill

NOTHING_NOW, NO_MORE = -1, -2  # instead of the index of a prompt
_LEAVES = "!"


class Board:
    """One step's, as one rank sees it. Prompts go by their index in the run's endless order."""

    def __init__(self, ranks: Ranks, store: Any, first: int, refill: Refill) -> None:
        """`first`: index of the step's first prompt."""
        self._ranks, self._store, self._first, self._refill = ranks, store, first, refill
        self._verdicts, self._said = f"{first}/verdicts", f"{first}/said"
        self._ticket: int | None = None  # the next one of its own, which the engine has taken before it is released
        self._late: list[int] = []  # likewise, of others: their own engine was faster with the last one released
        self._gone = [0] * ranks.engines  # engine → how much was released when its own ones were all taken
        self._read = self._heard = 0  # of the text, of the counter
        self._left = False  # whether an engine left early

    def take(self, held: int) -> int:
        """The index of the next prompt, NOTHING_NOW or NO_MORE. Collective over the engine's ranks.

        held: prompts that the engine has at the moment
        """
        return self._ranks.told_by_engine(self._chosen(held) if self._ranks.engine_rank == 0 else NOTHING_NOW)

    def _chosen(self, held: int) -> int:
        if (number := self._own()) is None:
            self._listen()
            number = self._own()
        if self._left:
            return NO_MORE
        released = self._refill.released
        if number is None and 2 * held * self._ranks.engines < released:
            number = self._others()
        if number is not None:
            return self._first + number
        others = (gone for engine, gone in enumerate(self._gone) if engine != self._ranks.engine)
        return NO_MORE if self._refill.enough and all(gone == released for gone in others) else NOTHING_NOW

    def _own(self) -> int | None:
        """The first that is released of those that this engine has taken, its own or late ones."""
        if self._ticket is None:
            self._ticket = self._taken(self._ranks.engine)
        number = min([self._ticket, *self._late])
        if number >= self._refill.released:
            return None
        if number == self._ticket:
            self._ticket = None
        else:
            self._late.remove(number)
        return number

    def _others(self) -> int | None:
        """The first that another engine has not come to, looking at each once as long as nothing more is released."""
        released = self._refill.released
        for step in range(1, self._ranks.engines):
            engine = (self._ranks.engine + step) % self._ranks.engines
            if self._gone[engine] < released:
                if self._number(engine, self._store.add(self._next(engine), 0)) < released:
                    if (number := self._taken(engine)) < released:
                        return number
                    self._late.append(number)
                self._gone[engine] = released
        return None

    def _taken(self, engine: int) -> int:
        return self._number(engine, self._store.add(self._next(engine), 1) - 1)

    def _number(self, engine: int, place: int) -> int:
        """The `place`-th of an engine's own numbers."""
        engines = self._ranks.engines
        return (engine - self._first) % engines + place * engines

    def _next(self, engine: int) -> str:
        return f"{self._first}/next/{engine}"

    def say(self, verdicts: Mapping[int, bool]) -> None:
        """Says of prompts, by index, whether their groups count: of each one rank does, once."""
        if verdicts:
            self._append(
                ",".join(f"{index - self._first}{'+' if counts else '-'}" for index, counts in verdicts.items())
            )

    def leave(self) -> None:
        """Says that this engine stops, so that no other one waits for its verdicts."""
        self._append(_LEAVES)

    def _append(self, words: str) -> None:
        self._store.append(self._verdicts, f"{words},")
        self._store.add(self._said, 1)

    def _listen(self) -> None:
        if (said := self._store.add(self._said, 0)) == self._heard:
            return
        self._heard = said
        text = self._store.get(self._verdicts).decode()
        for words in text[self._read :].split(",")[:-1]:
            if words == _LEAVES:
                self._left = True
            else:
                self._refill.add(int(words[:-1]), words[-1] == "+")
        self._read = len(text)

    def clear(self) -> None:
        """Takes the step off the store: one rank does, when all are through."""
        for key in (self._verdicts, self._said, *map(self._next, range(self._ranks.engines))):
            self._store.delete_key(key)
