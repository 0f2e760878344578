"""Settings of `ranks/`: how the ranks share the model, and how they find each other."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import Positive, PositiveFloat, Section, option


class ParallelOptions(Section):
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
        None, "data-parallel ranks; null: from the number of ranks, on one machine as few as the experts need"
    )


class ClusterOptions(Section):
    device: Literal["cpu", "cuda"] | None = option(
        None,
        "what the ranks train on, which must be what they find; null: GPUs where there are any, and under Slurm where "
        "slurm.gpus_per_node asks for some",
    )
    port: Annotated[int, Field(ge=1024, le=65535)] | None = option(None, "of the ranks' rendezvous; null: a free one")
    timeout_seconds: PositiveFloat = option(
        7200.0, "a collective that waits longer is an error; telemetry.stall_seconds is sooner"
    )
