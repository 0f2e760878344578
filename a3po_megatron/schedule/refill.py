"""How far ahead of its verdicts a step samples: prompt after prompt, as engines have room, until enough groups count.

    prompts in order    0 1 2 3 4 5 6 7 8 9 …
    verdicts            ✓ ✗ ✓ ✓ . ✗ . . .             . not known yet
                        ───────┤         ├────── released: engines may take them
                        known: the prompts before the first whose verdicts are missing

What is released follows from the verdicts of the known prompts alone, in their order: never from who was faster. So a
step samples the same prompts whichever engines there are, and what is sampled too much is carried over, not dropped.

With m groups missing and a share s of groups that count, the m-th of them comes after m/s prompts in the mean, with a
standard deviation of √(m(1 − s))/s (a negative binomial distribution). As soon as what is released falls short of the
mean, it is made up to the mean and two deviations: so it seldom falls short once more at the very end of a step, where
one more prompt costs the time of one more of the longest responses. It is never so much that a step could end with
enough groups for another one, even if the share were half as large again as it is thought to be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

DEVIATIONS = 2
CHANGE = 1.5  # of the share, at most, within a step


@dataclass(frozen=True)
class Share:
    """Of groups that count, so far: one that knows nothing takes it that all do."""

    kept: float = 0.0
    tried: float = 0.0

    def after(self, kept: float, tried: float) -> Share:
        """With a step's groups; those of earlier ones count half with every step."""
        return Share(self.kept / 2 + kept, self.tried / 2 + tried) if tried else self


class Refill:
    """One step's way through its prompts, which are numbered from 0."""

    def __init__(self, missing: int, wanted: int, most: int, before: Share) -> None:
        """
        missing: groups that the step still needs
        wanted: groups of a whole step, missing ones and those carried over to it
        most: prompts that the step may sample
        before: the share of earlier steps; it weighs as much as `wanted` prompts
        """
        self._missing, self._wanted, self._most = missing, wanted, most
        self._share = (before.kept + 1) / (before.tried + 1)
        self._said: dict[int, bool] = {}  # number → whether its group counts
        self._known = self._kept = 0
        self.released = 0  # numbers below it may be sampled
        self._release()

    def add(self, number: int, counts: bool) -> None:
        """Takes note of the verdicts of a prompt."""
        self._said[number] = counts
        while not self.enough and (said := self._said.get(self._known)) is not None:
            self._known += 1
            self._kept += said
            self._release()

    @property
    def enough(self) -> bool:
        """Whether no more prompts will be released."""
        return self._kept >= self._missing or self._known >= self._most

    def _release(self) -> None:
        if self.enough:
            return
        missing = self._missing - self._kept
        share = (self._kept + self._wanted * self._share) / (self._known + self._wanted)
        if self._known + missing / share <= self.released:
            return
        ahead = math.ceil(missing / share + DEVIATIONS * math.sqrt(missing * (1 - share)) / share)
        bound = int((missing + self._wanted - 1) / min(1.0, CHANGE * share))
        self.released = min(self._most, max(self.released, self._known + max(1, min(ahead, bound))))
