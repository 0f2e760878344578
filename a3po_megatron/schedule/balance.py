"""Which data-parallel replica trains on which rollout, so that none waits for another.

All replicas end an optimiser step together: it takes as long as the heaviest one. Within each mini-batch rollouts, each
whole, are dealt so that the heaviest replica is near the mean, or near the longest rollout where that alone is more.
Which rollouts share a mini-batch is decided elsewhere, and stays.

    start from who has them     a rollout goes from the heaviest replica to the lightest, or changes places with one
                                there, as long as that makes the heavier of the two lighter: few rollouts move
    start from nothing          longest first to the lightest replica (Graham's LPT), each such share to the replica
                                that has most of it already; then as above

The first is taken where it comes near enough, else the better of the two. Pure: equal input gives equal output.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from .packing import longest_first

NEAR = 1.03  # times the mean: near enough
BOUND = 1.005  # times the least that is possible: likewise


class Sizes(Protocol):
    """What counts of a model (model/facts.py)."""

    @property
    def hidden(self) -> int: ...
    @property
    def ffn(self) -> int: ...
    @property
    def heads(self) -> int: ...
    @property
    def kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def experts(self) -> Any: ...


def costs_of(lengths: Sequence[int], scale: float) -> list[float]:
    """What rollouts of so many tokens, prompt and response, cost: a token's weights, and the tokens that it attends to.

    `scale`: how many attended tokens cost as much as a token's weights (`attention_scale`)."""
    return [length * (1 + length / scale) for length in lengths]


def attention_scale(facts: Sizes) -> float:
    """Returns after how many tokens attention costs as much as a layer's weights do: per token 2 · weights operations
    against 2 · heads · head_dim · length, of which causal attention leaves half (scores and values)."""
    experts = facts.experts
    ffn = facts.ffn if experts is None else experts.per_token * experts.ffn
    weights = facts.hidden * (2 * (facts.heads + facts.kv_heads) * facts.head_dim + 3 * ffn)
    return weights / (facts.heads * facts.head_dim)


def deal(costs: Sequence[float], owners: Sequence[int], replicas: int) -> list[int]:
    """Returns which replica trains on each rollout of one mini-batch; `owners`: which has it."""
    if not costs or replicas == 1:
        return list(owners)
    mean = sum(costs) / replicas
    enough = max(NEAR * mean, BOUND * max(costs))
    moved = _Shares(costs, owners, replicas).levelled(enough)
    if moved.heaviest() <= enough:
        return moved.owners
    anew = _Shares(costs, _anew(costs, owners, replicas), replicas).levelled(enough)
    return min(moved, anew, key=lambda shares: shares.heaviest()).owners


def imbalance(tokens: Sequence[int], owners: Sequence[int], replicas: int) -> float:
    """Returns how many times the mean the heaviest replica has to compute, 1 at least; 1 where there is nothing."""
    loads = np.bincount(np.asarray(owners, np.int64), np.asarray(tokens, np.float64), replicas)
    return float(loads.max() / loads.mean()) if loads.any() else 1.0


class _Shares:
    def __init__(self, costs: Sequence[float], owners: Sequence[int], replicas: int) -> None:
        self.costs, self.owners = list(costs), list(owners)
        self.loads = [0.0] * replicas
        self.held: list[list[int]] = [[] for _ in range(replicas)]
        for item, owner in enumerate(owners):
            self.loads[owner] += costs[item]
            self.held[owner].append(item)

    def heaviest(self) -> float:
        return max(self.loads)

    def levelled(self, enough: float) -> _Shares:
        """Moves rollouts until the heaviest replica has no more than that, or no move makes it lighter."""
        while True:
            *lighter, heavy = sorted(range(len(self.loads)), key=lambda replica: (self.loads[replica], replica))
            if self.loads[heavy] <= enough:
                return self
            best = next((step for light in lighter if (step := self._step(heavy, light)) is not None), None)
            if best is None:
                return self
            self._apply(heavy, *best)

    def _step(self, heavy: int, light: int) -> tuple[int, int, int | None] | None:
        """What goes from the heavier to the lighter replica, and what comes back, so that the heavier of the two is as
        light as it can be; None: it would not be lighter."""
        gap = self.loads[heavy] - self.loads[light]
        if gap <= 0:
            return None
        here, there = self.held[heavy], self.held[light]
        # What the heavier one loses: best is half of the gap; from 0 on, and short of the whole, it helps.
        lost = np.array([self.costs[item] for item in here])[:, None] - np.array(
            [0.0, *(self.costs[item] for item in there)]
        )
        off = np.where((lost > 1e-9 * gap) & (lost < gap * (1 - 1e-9)), np.abs(lost - gap / 2), np.inf)
        place = int(off.argmin())
        if not np.isfinite(off.flat[place]):
            return None
        row, column = divmod(place, off.shape[1])
        return light, here[row], there[column - 1] if column else None

    def _apply(self, heavy: int, light: int, item: int, back: int | None) -> None:
        self._move(item, heavy, light)
        if back is not None:
            self._move(back, light, heavy)

    def _move(self, item: int, source: int, target: int) -> None:
        self.held[source].remove(item)
        self.held[target].append(item)
        self.loads[source] -= self.costs[item]
        self.loads[target] += self.costs[item]
        self.owners[item] = target


def _anew(costs: Sequence[float], owners: Sequence[int], replicas: int) -> list[int]:
    shares = longest_first(costs, replicas)
    # Of shares and replicas those with most in common come together first.
    common = np.zeros((replicas, replicas))
    for share, items in enumerate(shares):
        for item in items:
            common[share, owners[item]] += costs[item]
    result, free_shares, free_replicas = [0] * len(costs), set(range(replicas)), set(range(replicas))
    for place in np.argsort(-common, axis=None, kind="stable").tolist():
        share, replica = divmod(place, replicas)
        if share in free_shares and replica in free_replicas:
            free_shares.remove(share)
            free_replicas.remove(replica)
            for item in shares[share]:
                result[item] = replica
    return result
