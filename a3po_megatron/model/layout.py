"""How one replica's ranks share a model: a layout, and where each of its ranks stands.

A *replica* is the smallest set of ranks that holds every weight: PP stages of R ranks each, R = lcm(TP, ETP * EP). A
rank's place in it is what ranks/topology.py says of a run that has this one replica: `data` counts the copies of the
dense weights that one copy of all experts spreads over, whether they are context- or data-parallel neighbours.

Virtual stages deal the chunks of layers out round robin.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..config import ParallelOptions, even_stages, stage_ranks
from ..errors import RequestError
from ..ranks.topology import Topology
from .facts import ModelFacts

Scheme = Literal["local", "te"]


@dataclass(frozen=True)
class Layout:
    """How one replica's ranks share the model."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks per pipeline rank
    expert: int = 1
    expert_tensor: int | None = None  # None: the same as tensor
    stages: tuple[int, ...] | None = None  # layers of each chunk in the order of the model; None: as even as they go
    scheme: Scheme = "local"

    @property
    def etp(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def replica(self) -> Topology:
        """Returns the topology of one replica alone, as if it were a run."""
        return Topology(
            tensor=self.tensor,
            data=stage_ranks(self.tensor, self.expert, self.etp) // self.tensor,
            pipeline=self.pipeline,
            expert=self.expert,
            expert_tensor=self.etp,
        )

    @property
    def stage_ranks(self) -> int:
        """Returns R: the ranks of one pipeline stage of a replica."""
        return self.replica.stage_ranks

    def places(self) -> tuple[Place, ...]:
        """Returns the ranks of one replica, stage after stage."""
        return tuple(self.place(p, j) for p in range(self.pipeline) for j in range(self.stage_ranks))

    def place(self, pipeline: int, within: int) -> Place:
        """Returns where a rank of the replica stands: `within` a stage, 0 … R - 1 (Topology.within)."""
        replica = self.replica
        rank = pipeline * replica.stage_ranks + within
        dense, sparse = replica.coordinates(rank), replica.expert_coordinates(rank)
        return Place(pipeline, dense.tensor, dense.data, sparse.expert_tensor, sparse.expert, sparse.copy)

    def chunk_layers(self, layers: int, pipeline: int) -> tuple[range, ...]:
        """The layers of each model chunk of one pipeline rank."""
        counts = self.stages or even_stages(layers, self.pipeline * self.virtual)
        ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        chunks = (virtual * self.pipeline + pipeline for virtual in range(self.virtual))
        return tuple(range(ends[k] - counts[k], ends[k]) for k in chunks)


@dataclass(frozen=True)
class Place:
    """Where one rank stands in its replica."""

    pipeline: int = 0
    tensor: int = 0
    data: int = 0
    expert_tensor: int = 0
    expert: int = 0
    copy: int = 0  # of the experts


def layout_of(parallel: ParallelOptions, scheme: Scheme = "local") -> Layout:
    """The options of a layout as the map's own type."""
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        stages=parallel.stages,
        scheme=scheme,
    )


def padded_vocab(vocab: int, tensor: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks: padded no further than they must be."""
    return -(-vocab // tensor) * tensor


def check_layout(facts: ModelFacts, layout: Layout) -> None:
    """Raises RequestError, naming option and field, where the model does not divide by the layout."""

    def divide(option: str, by: int, name: str, size: int) -> None:
        if size % by:
            raise RequestError(f"{option} = {by} does not divide the model's {name} = {size}")

    divide("parallel.tensor", layout.tensor, "num_attention_heads", facts.heads)
    divide("parallel.tensor", layout.tensor, "num_key_value_heads", facts.kv_heads)
    if facts.experts is None:
        divide("parallel.tensor", layout.tensor, "intermediate_size", facts.ffn)
        if layout.expert > 1:
            raise RequestError(f"parallel.expert = {layout.expert}, but the model has no experts")
        if layout.expert_tensor not in (None, layout.tensor):
            raise RequestError("parallel.expert_tensor has no effect: the model has no experts")
    else:
        divide("parallel.expert_tensor", layout.etp, "moe_intermediate_size", facts.experts.ffn)
        divide("parallel.expert", layout.expert, "num_experts", facts.experts.count)
    chunks = layout.pipeline * layout.virtual
    if layout.virtual > 1 and layout.pipeline == 1:
        raise RequestError(f"parallel.virtual = {layout.virtual} needs parallel.pipeline > 1")
    if chunks > facts.layers:
        raise RequestError(
            f"parallel.pipeline × parallel.virtual = {chunks} chunks are more than the model's {facts.layers} layers"
        )
    if layout.stages is not None and (
        len(layout.stages) != chunks or sum(layout.stages) != facts.layers or min(layout.stages) < 1
    ):
        raise RequestError(
            f"parallel.stages = {list(layout.stages)} must give each of the {chunks} chunks at least one layer, "
            f"{facts.layers} in all"
        )
