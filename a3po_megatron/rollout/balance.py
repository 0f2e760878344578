"""A step's rollouts on the replicas that train on them: dealt (schedule/balance.py), sent, and laid out again.

    groups of a replica's engines ──▶ advantages ──▶ dealt over replicas ──▶ score, shape, update
                                                     ◀── what was found of them, for the files in rollouts/

An advantage needs a whole group, and is there before any rollout leaves. The ranks of a batch group hold the same
rollouts: each exchanges them with its like in the other replicas, so that none passes them on.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Prompt, Rollout
from ..ranks.groups import Ranks
from ..schedule.balance import costs_of, deal, imbalance
from .parcel import pack, unpack

_Share = tuple[list[Rollout], dict[str, np.ndarray]]
NOTHING = torch.zeros(0, dtype=torch.uint8)
RESULTS = ("advantages", "old_logprobs", "entropy", "token_weights")  # what comes home


@dataclass(frozen=True)
class _Deal:
    assembled: Batch  # as it was before
    order: list[tuple[int, int]]  # (prompt, sample) of its rollouts
    kept: dict[tuple[int, int], int]  # of what this replica trains on → the replica whose engine sampled it
    gone: dict[tuple[int, int], int]  # of what this replica's engine sampled → the replica that trains on it


class Balance:
    def __init__(self, ranks: Ranks, prompt_at: Callable[[int], Prompt], scale: float) -> None:
        """`scale`: of schedule/balance.py."""
        self._ranks, self._prompt_at, self._scale = ranks, prompt_at, scale
        self._last: _Deal | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Returns the batch that this replica trains on, with `imbalance` set. Collective."""
        here, replicas = self._ranks.coordinates.data, self._ranks.data
        table = torch.tensor(
            [
                (mini_batch, rollout.prompt.index, rollout.sample, len(rollout.prompt.tokens) + len(rollout.tokens) - 1)
                for mini_batch, rollout in zip(batch.mini_batch.tolist(), batch.rollouts, strict=True)
            ],
            dtype=torch.int64,
        ).view(-1, 4)
        tables = self._ranks.gather_over_data(table)
        rows = sorted((*row, owner) for owner, each in enumerate(tables) for row in each.tolist())
        plan: dict[tuple[int, int], tuple[int, int]] = {}  # (prompt, sample) → from, to
        worst = 1.0
        for _, part in itertools.groupby(rows, key=lambda row: row[0]):
            _, prompts, samples, lengths, owners = zip(*part, strict=True)
            # Who sampled what is a matter of time, and who trains on it must not be: sums depend on their order.
            homes = {prompt: self._ranks.topology.home(prompt) for prompt in dict.fromkeys(prompts)}
            targets = deal(costs_of(lengths, self._scale), [homes[prompt] for prompt in prompts], replicas)
            worst = max(worst, imbalance(lengths, targets, replicas))
            plan |= dict(zip(zip(prompts, samples, strict=True), zip(owners, targets, strict=True), strict=True))
        if replicas > 1:
            self._last = _Deal(
                batch,
                [_name(rollout) for rollout in batch.rollouts],
                {name: source for name, (source, target) in plan.items() if target == here},
                {name: target for name, (source, target) in plan.items() if source == here},
            )
            batch = self._dealt(batch, self._last)
        batch.imbalance = worst
        return batch

    def home(self, batch: Batch) -> Batch:
        """Returns the batch as it was before, with what was found of its rollouts since. Collective."""
        if self._ranks.data == 1:
            return batch
        assert self._last is not None, "nothing was dealt"
        back, kept = self._last.assembled, self._last.kept
        shares = [
            _results(batch, [row for row, rollout in enumerate(batch.rollouts) if kept[_name(rollout)] == replica])
            for replica in range(self._ranks.data)
        ]
        found = [arrays for _, arrays in self._exchanged([([], arrays) for arrays in shares])]
        # Both sides have a replica's rollouts in the same order: by prompt and sample.
        rows = [[i for i, name in enumerate(self._last.order) if self._last.gone[name] == r] for r in range(len(found))]
        for name in _known(batch):
            whole = torch.zeros_like(back.advantages if name == "advantages" else back.rollout_logprobs)
            for mine, arrays in zip(rows, found, strict=True):
                places = (
                    torch.tensor(mine, dtype=torch.int64) if name == "advantages" else _tokens_of(back.lengths, mine)
                )
                whole[places] = torch.from_numpy(arrays[name])
            setattr(back, name, whole)
        self._last = None  # with routes and all that is much to keep through a rollout
        return back

    def _dealt(self, batch: Batch, last: _Deal) -> Batch:
        rows: list[list[int]] = [[] for _ in range(self._ranks.data)]
        for row, name in enumerate(last.order):
            rows[last.gone[name]].append(row)
        shares = [([batch.rollouts[row] for row in mine], _columns(batch, mine)) for mine in rows]
        return _joined(self._exchanged(shares), batch)

    def _exchanged(self, shares: list[_Share]) -> list[_Share]:
        """What every replica has for this one; what this one has for itself stays as it is."""
        here = self._ranks.coordinates.data
        parts = [NOTHING if replica == here else pack(*share) for replica, share in enumerate(shares)]
        came = self._ranks.exchange_over_data(parts)
        return [shares[here] if replica == here else unpack(part, self._prompt_at) for replica, part in enumerate(came)]


def gather_rollouts(ranks: Ranks, rollouts: Sequence[Rollout], prompt_at: Callable[[int], Prompt]) -> list[Rollout]:
    """Returns those of all ranks that train on the same rollouts, rank after rank. Collective over them."""
    if ranks.batch_group.size() == 1:
        return list(rollouts)
    return [rollout for part in ranks.gather_bytes(pack(rollouts)) for rollout in unpack(part, prompt_at)[0]]


def _name(rollout: Rollout) -> tuple[int, int]:
    return rollout.prompt.index, rollout.sample


def _tokens_of(lengths: Tensor, rows: Sequence[int]) -> Tensor:
    """Places of some rollouts' tokens among those of all, which are so long, rollout after rollout."""
    ends = lengths.cumsum(0)
    spans = [torch.arange(int(ends[row] - lengths[row]), int(ends[row])) for row in rows]
    return torch.cat([torch.zeros(0, dtype=torch.int64), *spans])


def _columns(batch: Batch, rows: Sequence[int]) -> dict[str, np.ndarray]:
    """What a batch knows of rollouts beside what they are."""
    chosen, tokens = torch.tensor(rows, dtype=torch.int64), _tokens_of(batch.lengths, rows)
    masked = torch.zeros_like(batch.positive) if batch.masked is None else batch.masked
    columns = {
        "mini_batch": batch.mini_batch[chosen],
        "advantages": batch.advantages[chosen],
        "masked": masked[chosen],
        "trained": batch.is_trained()[tokens],
    }
    for name in ("process_advantages", "token_positive"):
        if (values := getattr(batch, name)) is not None:
            columns[name] = values[tokens]
    return {name: values.numpy() for name, values in columns.items()}


def _results(batch: Batch, rows: Sequence[int]) -> dict[str, np.ndarray]:
    chosen, tokens = torch.tensor(rows, dtype=torch.int64), _tokens_of(batch.lengths, rows)
    return {name: getattr(batch, name)[chosen if name == "advantages" else tokens].numpy() for name in _known(batch)}


def _known(batch: Batch) -> list[str]:
    """Returns those of RESULTS that the batch has, which are the same on all ranks."""
    return [name for name in RESULTS if getattr(batch, name) is not None]


def _joined(parts: list[_Share], before: Batch) -> Batch:
    """One batch of all that came, by prompt and sample."""
    rollouts = [rollout for mine, _ in parts for rollout in mine]
    order = sorted(range(len(rollouts)), key=lambda row: _name(rollouts[row]))
    lengths = torch.tensor([len(rollout.tokens) for rollout in rollouts], dtype=torch.int64)
    tokens = _tokens_of(lengths, order)
    rows = torch.tensor(order, dtype=torch.int64)

    def column(name: str, places: Tensor) -> Tensor:
        return torch.from_numpy(np.concatenate([arrays[name] for _, arrays in parts]))[places]

    def if_any(name: str, places: Tensor) -> Tensor | None:
        return None if getattr(before, name) is None else column(name, places)

    rollouts = [rollouts[row] for row in order]
    prompts = torch.tensor([rollout.prompt.index for rollout in rollouts], dtype=torch.int64)
    trained, masked = column("trained", tokens), column("masked", rows)
    return Batch(
        rollouts=rollouts,
        group_index=torch.unique(prompts, return_inverse=True)[1],
        mini_batch=column("mini_batch", rows),
        mini_batches=before.mini_batches,
        rewards=torch.tensor([rollout.reward for rollout in rollouts], dtype=torch.float32),
        positive=torch.tensor([rollout.verdict.outcome == "correct" for rollout in rollouts], dtype=torch.bool),
        advantages=column("advantages", rows),
        lengths=lengths[rows],
        rollout_index=torch.repeat_interleave(torch.arange(len(rollouts)), lengths[rows]),
        rollout_logprobs=torch.cat([torch.zeros(0), *(torch.from_numpy(r.logprobs) for r in rollouts)]),
        trained=None if bool(trained.all()) else trained,
        masked=masked if bool(masked.any()) else None,
        process_advantages=if_any("process_advantages", tokens),
        token_positive=if_any("token_positive", tokens),
    )
