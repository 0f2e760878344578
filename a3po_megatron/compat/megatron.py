"""Megatron-Core 0.16.1 on any device: what is wrong in it.

| patch | symptom without it | cause |
|---|---|---|
| whole buckets | a checkpoint of the distributed optimizer (`fully_reshardable`) holds shifted values and zeros, with a warning only: the weights and moments of the last pipeline stage of a model with tied embeddings, or of any model with several buckets whose sizes are no multiples of the padding | `distrib_optimizer.py`: `get_parameter_state_dp_zero` lays buckets end to end without their padding, `sharded_param_state_fully_reshardable` looks for parameters where they are with it (its comment: "this is a bug in the param ranges logic") |
"""  # noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def _padded(buffers: Any) -> Iterator[None]:
    """Every buffer and bucket says that it has no padding: then it is gathered as it lies."""
    sized = [thing for buffer in buffers for thing in (buffer, *buffer.buckets)]
    unpadded = [thing.numel_unpadded for thing in sized]
    for buffer in buffers:
        buffer.numel_unpadded = buffer.numel
        for bucket in buffer.buckets:
            bucket.numel_unpadded = bucket.grad_data.numel()
    try:
        yield
    finally:
        for thing, numel in zip(sized, unpadded, strict=True):
            thing.numel_unpadded = numel


def install() -> None:
    """Installs the patches once per process."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    theirs = DistributedOptimizer.sharded_param_state_fully_reshardable
    if theirs.__module__ == __name__:
        return

    def sharded_param_state_fully_reshardable(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _padded(self.buffers):
            return theirs(self, *args, **kwargs)

    DistributedOptimizer.sharded_param_state_fully_reshardable = sharded_param_state_fully_reshardable
