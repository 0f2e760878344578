"""What a rank of the learner holds all the time, in bytes: weights, gradients, the optimizer's state.

Megatron-Core 0.16.1 lays the parameters of one model chunk that have one dtype into one buffer, those of experts into
another, the last one first (distributed/param_and_grad_buffer.py). With the distributed optimizer

    parameters     begin at multiples of 64 elements, and a bucket ends at one of lcm(ranks that share it, 128)
    weights        the buffer in the parameters' dtype        gradients     the buffer in float32
    optimizer      of each rank's share of the buffer, the parts that are parameters

and without it nothing is padded, and every rank has all of the optimizer. Masters are float32 beside weights of another
dtype; float32 weights are their own.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..config import AdamOptions, Settings
from ..config.cluster import ParallelSettings
from ..config.learner import Optimizer
from ..model.cut import Held, LearnerRank, held
from ..model.facts import ModelFacts
from ..model.layout import layout_of
from ..ranks.topology import Topology, topology_of
from ..weights.route import WIDTHS

PARAMETER_START, BUCKET_END = 64, 128  # elements
LEAST_BUCKET, BUCKET_A_RANK = 40_000_000, 1_000_000  # elements, with learner.overlap_grad_reduce
GRADIENT = 4  # bytes an element: sums of micro-batches and ranks are float32


@dataclass(frozen=True)
class Static:
    """Bytes of one rank."""

    weights: int
    gradients: int
    optimizer: int  # on the device
    host_optimizer: int = 0  # with optimizer.on_host

    def __add__(self, other: Static) -> Static:
        return Static(
            self.weights + other.weights,
            self.gradients + other.gradients,
            self.optimizer + other.optimizer,
            self.host_optimizer + other.host_optimizer,
        )


def static_of(facts: ModelFacts, settings: Settings, rank: int) -> Static:
    """Returns what a rank that learns holds."""
    return sum((each for _, each in shared_out(facts, settings, rank)), Static(0, 0, 0))


def shared_out(facts: ModelFacts, settings: Settings, rank: int) -> tuple[tuple[int, Static], ...]:
    """Returns the same buffer by buffer, each with the number of ranks that hold the same parameters."""
    overlap = settings.learner.overlap_grad_reduce
    return _shared_out(facts, settings.parallel, settings.optimizer, settings.model.dtype, overlap, rank)


@functools.lru_cache(maxsize=4096)  # sizes that are tried change nothing of it
def _shared_out(
    facts: ModelFacts, parallel: ParallelSettings, optimizer: Optimizer, own: str, overlap: bool, rank: int
) -> tuple[tuple[int, Static], ...]:
    """`own`: the model's dtype."""
    topology = topology_of(parallel, 1, parallel.ranks_of(parallel.data))
    layout, stage = layout_of(parallel), topology.coordinates(rank).pipeline
    found: list[tuple[int, Static]] = []
    for buffer in _buffers(facts, LearnerRank(layout, layout.place(stage, topology.within(rank))), own):
        ranks, which = _shares(topology, rank, buffer.experts)
        limit = max(LEAST_BUCKET, BUCKET_A_RANK * ranks) if overlap and buffer.chunk == stage == 0 else None
        found.append((ranks, _of_buffer(buffer, optimizer, ranks, which, limit)))
    return tuple(found)


@dataclass(frozen=True)
class _Buffer:
    chunk: int
    experts: bool
    dtype: str
    sizes: tuple[int, ...]  # elements of each parameter, in the buffer's order
    alone: frozenset[int]  # which of them are buckets of their own


@functools.lru_cache(maxsize=256)  # more replicas change nothing of it
def _buffers(facts: ModelFacts, holder: LearnerRank, own: str) -> tuple[_Buffer, ...]:
    layout = holder.layout
    spread = layout.expert > 1  # else Megatron counts experts among the rest
    by_buffer: dict[tuple[int, bool, str], list[Held]] = {}
    for each in reversed(held(facts, holder)):
        if not each.param.buffer:
            key = each.chunk, spread and each.param.experts is not None, each.param.dtype or own
            by_buffer.setdefault(key, []).append(each)
    # A tied embedding on two stages is a bucket of its own, so that both share it out alike.
    apart = facts.tied and layout.pipeline > 1
    return tuple(
        _Buffer(
            *key,
            sizes=tuple(each.elements for each in parameters),
            alone=frozenset(n for n, each in enumerate(parameters) if apart and each.param.cut == "vocabulary"),
        )
        for key, parameters in by_buffer.items()
    )


def _shares(topology: Topology, rank: int, experts: bool) -> tuple[int, int]:
    """How many ranks hold the same parameters, and which of them this is."""
    if experts:
        copies = topology.learning // topology.pipeline // (topology.expert * topology.expert_tensor)
        return copies, topology.expert_coordinates(rank).copy
    at = topology.coordinates(rank)
    return topology.context * topology.data, at.context + topology.context * at.data


def _of_buffer(buffer: _Buffer, optimizer: Optimizer, ranks: int, which: int, limit: int | None) -> Static:
    """`limit`: elements at which a bucket ends; None: all in one."""
    itemsize = WIDTHS[buffer.dtype]
    if not optimizer.distributed:
        size = sum(buffer.sizes)
        return Static(size * itemsize, size * GRADIENT, size * _state_bytes(optimizer, buffer.dtype))
    size = mine = 0
    for sizes in _buckets(buffer, limit):
        padded = {size: _up(size, PARAMETER_START) for size in set(sizes)}  # of tens of thousands, a few differ
        starts = [0, *itertools.accumulate(map(padded.__getitem__, sizes))]
        bucket = _up(starts[-2] + sizes[-1], math.lcm(ranks, BUCKET_END))
        share = bucket // ranks
        mine += _elements(sizes, starts, (which + 1) * share) - _elements(sizes, starts, which * share)
        size += bucket
    states = mine * _state_bytes(optimizer, buffer.dtype)
    on_host = isinstance(optimizer, AdamOptions) and optimizer.on_host
    return Static(size * itemsize, size * GRADIENT, 0 if on_host else states, states if on_host else 0)


def _elements(sizes: Sequence[int], starts: Sequence[int], end: int) -> int:
    """Returns how many elements of a bucket's parameters lie before `end`."""
    last = min(bisect.bisect_right(starts, end), len(sizes)) - 1
    return sum(sizes[:last]) + min(sizes[last], end - starts[last])


def _buckets(buffer: _Buffer, limit: int | None) -> Iterator[Sequence[int]]:
    """Yields the sizes of each bucket's parameters."""
    if limit is None and not buffer.alone:
        yield buffer.sizes
        return
    bucket: list[int] = []
    end = 0
    for number, size in enumerate(buffer.sizes):
        alone = number in buffer.alone
        if alone and bucket:
            yield bucket
            bucket, end = [], 0
        bucket.append(size)
        end = _up(end, PARAMETER_START) + size
        if alone or (limit is not None and end >= limit):
            yield bucket
            bucket, end = [], 0
    if bucket:
        yield bucket


def _state_bytes(optimizer: Optimizer, dtype: str) -> int:
    """Of masters and moments, a parameter's element."""
    if not isinstance(optimizer, AdamOptions):
        return (4 if optimizer.momentum else 0) + (0 if dtype == "float32" else 4)
    moments = 2 * WIDTHS[optimizer.moment_dtype]
    # Where the optimizer keeps masters by itself it has them of float32 weights, too.
    own_masters = optimizer.on_host or optimizer.moment_dtype != "float32"
    return moments + (0 if dtype == "float32" and not own_masters else 4)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
