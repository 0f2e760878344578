"""Settings of `ranks/`: how the ranks share the model, and how they find each other."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from .section import NoEffect, Positive, PositiveFloat, Section, option, or_off
from .slurm_forms import checked_text


class ParallelOptions(Section):
    layout: Literal["given", "auto"] = option(
        "given",
        "auto: the smallest layout that fits the GPUs (a3po plan) takes the place of tensor, pipeline, context, "
        "expert, expert_tensor and sequence, and raises rollout.tensor where an engine needs more ranks",
    )
    tensor: Positive = option(1, "ranks that share every layer (tensor parallelism)")
    pipeline: Positive = option(1, "ranks that share the layers by depth (pipeline parallelism)")
    context: Positive = option(1, "ranks that share the tokens of a sequence (context parallelism)")
    expert: Positive = option(1, "ranks over which experts are dealt (expert parallelism)")
    expert_tensor: Positive | None = option(None, "tensor parallelism within an expert; null: the same as tensor")
    virtual: Positive = option(1, "model chunks per pipeline rank (interleaved schedule)")
    stages: tuple[Positive, ...] | None = option(
        None, "layers of each chunk, in the model's order; null: as even as they go"
    )
    sequence: bool = option(False, "split activations between layers along the tokens over the tensor ranks")
    data: Positive | None = option(
        None,
        "data-parallel ranks; null: from the number of ranks, on one machine as few as the experts need (layout auto: "
        "over all of its GPUs)",
    )
    without_effect = (
        NoEffect(
            ("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual", "stages", "sequence", "data"),
            lambda p: p.layout == "auto",
            "parallel.layout is auto",
        ),
    )

    def stage_ranks(self) -> int:
        """The ranks of one pipeline stage that hold one copy of all its weights, experts included."""
        return stage_ranks(self.tensor, self.expert, self.expert_tensor or self.tensor)

    def ranks_of(self, data: int) -> int:
        """How many ranks learn."""
        return self.tensor * self.context * self.pipeline * data

    def fewest_data(self) -> int:
        """As few data-parallel ranks as the experts need."""
        return max(1, self.stage_ranks() // self.tensor // self.context)


class ParallelSettings(ParallelOptions):
    expert_tensor: Positive
    stages: tuple[Positive, ...]
    data: Positive


def stage_ranks(tensor: int, expert: int, expert_tensor: int) -> int:
    """The ranks of one pipeline stage that hold one copy of all its weights, experts included."""
    return math.lcm(tensor, expert_tensor * expert)


def even_stages(layers: int, chunks: int) -> tuple[int, ...]:
    """Layers of each chunk, as even as they go; the first and the last one, which also hold embedding and output layer,
    get no remainder."""
    base, rest = divmod(layers, chunks)
    counts = [base] * chunks
    inner = [*range(1, chunks - 1), 0, chunks - 1] if chunks > 1 else [0]
    for index in inner[:rest]:
        counts[index] += 1
    return tuple(counts)


class ClusterOptions(Section):
    device: Literal["cpu", "cuda"] | None = option(
        None,
        "what the ranks train on, which must be what they find; null: GPUs where there are any, and under Slurm where "
        "slurm.gpus_per_node asks for some",
    )
    gpu: Annotated[str, AfterValidator(checked_text)] = option(
        "",
        "GPU whose memory is planned for (a3po plan): h200, h100, …; empty: what slurm.gpus_per_node names, on this "
        "machine what it has, else h200",
    )
    port: Annotated[int, Field(ge=0, le=65535), or_off(least=1024)] = option(
        0, "of the ranks' rendezvous; 0: a free one"
    )
    timeout_seconds: PositiveFloat = option(
        7200.0, "a collective that waits longer is an error; telemetry.stall_seconds is sooner"
    )


class ClusterSettings(ClusterOptions):
    device: Literal["cpu", "cuda"]
