"""What the planner says of a job that somebody else ran: its formulas with that job's parameters.

Parameters are counted from the shape (our own models' from their families' tables: preflight/static.py); of their
bytes, a weight has 2, its gradient 4, masters and moments 12 over the ranks that share them out.
"""

from __future__ import annotations

from dataclasses import dataclass

from a3po_megatron.preflight.activations import in_flight
from a3po_megatron.preflight.overhead import GAPS, LIBRARIES
from a3po_megatron.preflight.shape import Shape
from a3po_megatron.preflight.update import Peak, peak_of_update

from .rows import Job

GIB = 1 << 30
WEIGHT, GRADIENT, MASTER, MOMENT = 2, 4, 4, 4
FP8_COPIES = 2  # bytes of a linear layer's weight: quantised, and transposed


@dataclass(frozen=True)
class Answer:
    """GiB of the rank that was measured."""

    static: float
    first: float  # at the first step, which finds no moments
    peak: float


@dataclass(frozen=True)
class _Count:
    """Parameters of one rank."""

    matrices: float = 0.0
    others: float = 0.0  # embeddings, norms, biases
    experts: float = 0.0

    def __add__(self, other: _Count) -> _Count:
        return _Count(self.matrices + other.matrices, self.others + other.others, self.experts + other.experts)


def answer(job: Job) -> Answer:
    stages = [job.pipeline - 1] if job.last_stage else range(job.pipeline)
    return max((_of_stage(job, stage) for stage in stages), key=lambda each: each.peak)


def _of_stage(job: Job, stage: int) -> Answer:
    count = _parameters(job, stage)
    weights, states, masters = _static(job, count)
    libraries = LIBRARIES["hopper" if job.hopper else "older"]
    static = weights + states + libraries
    peak = _peak(job, stage)
    moving = peak.activations + peak.head + peak.work
    first, most = weights + masters + libraries + moving, static + moving
    if job.reserved:
        first, most = first + GAPS * moving, most + GAPS * moving
    return Answer(static / GIB, first / GIB, most / GIB)


def _peak(job: Job, stage: int) -> Peak:
    flight = in_flight(job.pipeline, job.virtual, stage, job.micro_batches)
    rows = _padded(job) / job.tensor
    head = rows * job.share.tokens * job.logit_bytes if stage == job.pipeline - 1 else 0.0
    return peak_of_update(job.shape, job.share, job.chunks[stage], flight, head)


def _static(job: Job, count: _Count) -> tuple[float, float, float]:
    """Weights and gradients; masters and moments; masters alone."""
    copies = expert_copies = 1
    if job.distributed:
        copies = max(1, job.data * job.context // job.instances)
        both_copies = job.data * job.context * job.tensor // (job.expert * job.expert_tensor)
        expert_copies = max(1, both_copies // job.instances)
    both = (WEIGHT + GRADIENT) * (count.matrices + count.others + count.experts)
    if job.fp8:
        both += FP8_COPIES * (count.matrices + count.experts)
    if job.on_host:
        return both, 0.0, 0.0
    shared = count.others / copies + (0.0 if job.muon else count.matrices / copies + count.experts / expert_copies)
    whole = count.matrices + count.experts if job.muon else 0.0
    return both, (MASTER + 2 * MOMENT) * shared + (MASTER + MOMENT) * whole, MASTER * (shared + whole)


def _parameters(job: Job, stage: int) -> _Count:
    shape, t = job.shape, job.tensor
    first, last = stage == 0, stage == job.pipeline - 1
    total = _Count()
    for chunk in job.chunks[stage]:
        for dense in chunk:
            total += _layer(job, dense)
    vocabulary = _padded(job) * shape.hidden / t
    if first:
        total += _Count(others=vocabulary + shape.learned_positions * shape.hidden)
    if last:
        total += _Count(others=shape.hidden * (1 + shape.norm_bias))
        if not shape.tied or job.pipeline > 1:
            total += _Count(others=vocabulary)
        if shape.predicted:  # their own embedding, where they stand apart from the first stage, and their projection
            total += _Count(others=vocabulary if job.pipeline > 1 else 0.0)
            total += _Count(matrices=shape.predicted * 2 * shape.hidden**2 / t, others=2 * shape.hidden)
    return total


def _padded(job: Job) -> int:
    return -(-job.shape.vocab // job.vocab_multiple) * job.vocab_multiple


def _layer(job: Job, dense: bool) -> _Count:
    shape, t = job.shape, job.tensor
    hidden, width = shape.hidden, 2 if shape.gated else 1
    matrices, others = 0.0, 2 * hidden * (1 + shape.norm_bias)
    if (latent := shape.latent) is not None:
        matrices += hidden * (latent.query_rank + latent.key_rank + latent.rope)
        matrices += (
            latent.query_rank * shape.queries + latent.key_rank * shape.heads * (latent.nope + latent.value)
        ) / t
        others += latent.query_rank + latent.key_rank
    else:
        matrices += hidden * (shape.queries + shape.keys + shape.values) / t
    matrices += shape.outputs * hidden / t
    if shape.bias:
        others += (shape.queries + shape.keys + shape.values) / t + hidden
    if shape.mixture is None or dense:
        matrices += _mlp(hidden, shape.ffn, width) / t
        if shape.bias:
            others += width * shape.ffn / t + hidden
        return _Count(matrices, others)
    mixture = shape.mixture
    experts = mixture.count / job.expert * _mlp(hidden, mixture.ffn, width) / job.expert_tensor
    matrices += _mlp(hidden, mixture.shared, width) / t
    others += hidden * mixture.count
    if shape.bias:
        experts += mixture.count / job.expert * (width * mixture.ffn + hidden) / job.expert_tensor
    if job.expert == 1:  # Megatron then counts them among the rest
        return _Count(matrices + experts, others)
    return _Count(matrices, others, experts)


def _mlp(hidden: int, ffn: int, width: int) -> int:
    return (1 + width) * hidden * ffn


def total_parameters(shape: Shape) -> float:
    """Of the whole model, its vocabulary not padded."""
    layers = tuple(shape.mixture is None or number < shape.dense_layers for number in range(shape.layers))
    from a3po_megatron.preflight.activations import Share

    alone = Job(shape, Share(1, 1), 1, 1, 1, 1, 1, 1, 1, 1, ((layers,),), True, 1, 0)
    count = _parameters(alone, 0)
    return count.matrices + count.others + count.experts
