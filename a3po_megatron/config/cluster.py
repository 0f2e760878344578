"""Settings of `cluster.py`: how the ranks share the model, and how they find each other."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import Positive, PositiveFloat, Section


class ParallelOptions(Section):
    tensor: Positive = 1
    pipeline: Positive = 1
    context: Positive = 1
    expert: Positive = 1
    data: Positive | None = None  # None: from the number of ranks; on one machine 1

    def ranks(self) -> int:
        """The number of processes that this layout needs on one machine."""
        return self.tensor * self.pipeline * self.context * (self.data or 1)


class ClusterOptions(Section):
    port: Annotated[int, Field(ge=1024, le=65535)] | None = None  # of the rendezvous; None: a free one
    timeout_seconds: PositiveFloat = 600.0  # a collective that waits longer than this is an error
