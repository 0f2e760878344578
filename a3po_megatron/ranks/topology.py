"""Who is where: coordinates, groups, replicas and engines of all ranks, from the layout alone.

Pure: no torch, no process; a planner may ask for thousands of ranks. Ranks that learn come first, laid out as Megatron
lays them out ("tp-cp-ep-dp-pp"), tensor parallel fastest:

    rank = tensor + TP * (context + CP * (data + DP * pipeline))

Within a pipeline stage the same ranks share the experts, expert tensor parallel fastest, then the experts:

    rank within the stage = expert_tensor + ETP * (expert + EP * copy)

An *engine* is a run of neighbouring ranks: of those that learn, where they take turns with it (colocated), or of ranks
of its own behind them.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Literal

from ..config import ParallelOptions, stage_ranks
from ..errors import RequestError

# Which ranks a group holds, in ascending order:
Kind = Literal[
    "tensor",  # share every layer
    "context",  # hold parts of the same sequences
    "data",  # hold the same weights and other rollouts
    "pipeline",  # the stages of one model
    "tokens",  # hold the same dense weights and different tokens: data × context
    "batch",  # train on the same rollouts: tensor × context × pipeline
    "replica",  # the smallest set that holds every weight, stage after stage
    "experts",  # hold one copy of a stage's experts together
    "expert_copies",  # hold the very same shard of experts
    "engine",  # sample together
]


class Role(enum.Enum):
    LEARNER = "learner"
    ENGINE = "engine"
    BOTH = "both"


@dataclass(frozen=True)
class Coordinates:
    tensor: int = 0
    pipeline: int = 0
    data: int = 0
    context: int = 0


@dataclass(frozen=True)
class ExpertCoordinates:
    """Where a rank stands among those that share the experts of its stage."""

    expert_tensor: int = 0
    expert: int = 0
    copy: int = 0


@dataclass(frozen=True)
class Topology:
    """`engine_ranks`: of one engine; `apart`: ranks that only sample, behind those that learn."""

    tensor: int = 1
    context: int = 1
    data: int = 1
    pipeline: int = 1
    expert: int = 1
    expert_tensor: int = 1
    engine_ranks: int = 1
    apart: int = 0

    @property
    def learning(self) -> int:
        """How many ranks learn: the first ones."""
        return self.tensor * self.context * self.data * self.pipeline

    @property
    def sampling(self) -> int:
        """How many ranks sample."""
        return self.apart or self.learning

    @property
    def world(self) -> int:
        return self.learning + self.apart

    @property
    def stage_ranks(self) -> int:
        """The ranks of one pipeline stage that hold one copy of all its weights."""
        return stage_ranks(self.tensor, self.expert, self.expert_tensor)

    @property
    def spread(self) -> int:
        """Context- and data-parallel neighbours of one replica: more than one only where experts spread over them."""
        return self.stage_ranks // self.tensor

    @property
    def _first_sampling(self) -> int:
        return self.world - self.sampling

    @property
    def engines(self) -> int:
        return self.sampling // self.engine_ranks

    def role(self, rank: int) -> Role:
        if not self.apart:
            return Role.BOTH
        return Role.LEARNER if rank < self.learning else Role.ENGINE

    def coordinates(self, rank: int) -> Coordinates:
        """Of a rank that learns."""
        rest, tensor = divmod(rank, self.tensor)
        rest, context = divmod(rest, self.context)
        pipeline, data = divmod(rest, self.data)
        return Coordinates(tensor, pipeline, data, context)

    def expert_coordinates(self, rank: int) -> ExpertCoordinates:
        """Of a rank that learns."""
        rest, expert_tensor = divmod(rank % (self.learning // self.pipeline), self.expert_tensor)
        copy, expert = divmod(rest, self.expert)
        return ExpertCoordinates(expert_tensor, expert, copy)

    def within(self, rank: int) -> int:
        """A rank's place among those of its stage that hold one copy of the stage's weights."""
        return rank % self.stage_ranks

    def engine(self, rank: int) -> tuple[int, int]:
        """Which engine a rank that samples belongs to, and which of its ranks it is."""
        return divmod(rank - self._first_sampling, self.engine_ranks)

    def leaders(self, engine: int) -> list[int]:
        """The ranks that answer for what an engine sampled.

        Of a colocated one the first of every data-parallel rank that it spans: all its ranks hold all its completions,
        so that each replica takes its share without sending any. Of one by itself its first rank.
        """
        begin = self._first_sampling + engine * self.engine_ranks
        ranks = range(begin, begin + self.engine_ranks)
        if self.apart:
            return [ranks[0]]
        first: dict[int, int] = {}
        for rank in ranks:
            first.setdefault(self.coordinates(rank).data, rank)
        return sorted(first.values())

    def leader(self, prompt: int, engine: int) -> int:
        """Which of an engine's leaders answers for a prompt, by its index."""
        leaders = self.leaders(engine)
        return leaders[prompt // self.engines % len(leaders)]

    def home(self, prompt: int) -> int:
        """The replica that would train on a prompt's rollouts if each engine sampled its own (rollout/board.py), and
        none had to be moved for balance."""
        return self.coordinates(self.leader(prompt, prompt % self.engines)).data

    def group(self, kind: Kind, rank: int) -> list[int]:
        """The group of a kind that a rank is in."""
        return next(ranks for ranks in self.groups(kind) if rank in ranks)

    def groups(self, kind: Kind) -> list[list[int]]:
        """All groups of a kind, by their first ranks."""
        if kind == "engine":
            firsts = range(self._first_sampling, self.world, self.engine_ranks)
            return [list(range(first, first + self.engine_ranks)) for first in firsts]
        members: dict[Hashable, list[int]] = {}
        of = self._of(kind)
        for rank in range(self.learning):
            members.setdefault(of(rank), []).append(rank)
        return list(members.values())

    def _of(self, kind: Kind) -> Callable[[int], Hashable]:
        """What the ranks of one group have in common."""
        stage = self.learning // self.pipeline
        by_experts: dict[Kind, Callable[[ExpertCoordinates], Hashable]] = {
            "experts": lambda at: at.copy,
            "expert_copies": lambda at: (at.expert_tensor, at.expert),
        }
        by_coordinates: dict[Kind, Callable[[Coordinates], Hashable]] = {
            "tensor": lambda at: (at.context, at.data, at.pipeline),
            "context": lambda at: (at.tensor, at.data, at.pipeline),
            "data": lambda at: (at.tensor, at.context, at.pipeline),
            "pipeline": lambda at: (at.tensor, at.context, at.data),
            "tokens": lambda at: (at.tensor, at.pipeline),
            "batch": lambda at: at.data,
        }
        if kind == "replica":
            return lambda rank: rank % stage // self.stage_ranks
        if kind in by_experts:
            return lambda rank: (rank // stage, by_experts[kind](self.expert_coordinates(rank)))
        return lambda rank: by_coordinates[kind](self.coordinates(rank))


def topology_of(parallel: ParallelOptions, engine_ranks: int = 1, learning: int | None = None) -> Topology:
    """The topology of a layout. `parallel.data` follows from the number of ranks that learn, or, where that is not
    known (one machine), is as small as the experts allow.

    Raises RequestError, naming the options, where the ranks do not divide by the layout.
    """
    spread, model = parallel.stage_ranks() // parallel.tensor, parallel.ranks_of(1)
    data = parallel.data or (learning or 0) // model or parallel.fewest_data()
    if learning not in (None, model * data):
        raise RequestError(
            f"{learning} ranks, but parallel.tensor × context × pipeline = {model}"
            + (f" and parallel.data = {data}" if parallel.data else " does not divide them")
        )
    if (copies := parallel.context * data) % spread:
        raise RequestError(
            f"the experts of this layout spread over {spread} ranks beside tensor parallelism, but parallel.context × "
            f"parallel.data = {copies} is no multiple of that"
        )
    if model * data % engine_ranks:
        raise RequestError(f"rollout.tensor = {engine_ranks} does not divide the {model * data} ranks of the layout")
    return Topology(
        tensor=parallel.tensor,
        context=parallel.context,
        data=data,
        pipeline=parallel.pipeline,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor or parallel.tensor,
        engine_ranks=engine_ranks,
    )
