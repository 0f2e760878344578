"""What travels in a step, by collective: the group's size, how often, and the bytes that one rank gives each time.

Of each micro-batch, forward and backward (Megatron-Core 0.16.1): under sequence parallelism a gather before and a
reduce-scatter behind every attention and MLP, else an all-reduce; experts' tokens there and back; activations and their
gradients between stages; keys and values around the context ranks. Of each update the gradients in float32 and the
weights; of each publish its buckets. Recomputation repeats the forward's.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..config import Settings
from ..model.facts import ModelFacts
from ..ranks.topology import Topology, topology_of
from .memory import micro_batches_of, share_of
from .static import Static, shared_out, static_of

GRADIENT = 4


@dataclass(frozen=True)
class Collective:
    what: str
    kind: str  # the operation
    ranks: int  # of its group
    times: int  # in one step
    bytes: int  # that one rank gives each time


def collectives(facts: ModelFacts, settings: Settings, rank: int) -> list[Collective]:
    """Returns what a rank takes part in during one step, at most: of the stages the one with most layers."""
    topology = topology_of(settings.parallel, settings.rollout.tensor, settings.ranks)
    share, parallel = share_of(facts, settings), settings.parallel
    layers = -(-facts.layers // parallel.pipeline)
    updates = settings.trainer.mini_batches
    passes = updates * micro_batches_of(settings)  # forward and backward
    scored = passes if settings.learner.old_logprobs == "score" else 0
    forwards = passes * (2 if settings.learner.recompute == "full" else 1) + scored
    again = passes if settings.learner.recompute == "selective" else 0  # of MLPs or experts alone
    hidden = share.tokens * facts.hidden * share.itemsize
    found: list[Collective] = []

    def add(what: str, kind: str, ranks: int, times: int, size: float) -> None:
        if ranks > 1 and times:
            found.append(Collective(what, kind, ranks, times, round(size)))

    between = "all-gather, reduce-scatter" if share.spread > 1 else "all-reduce"
    dense = 1 if facts.experts is not None else 2  # of a layer's two halves: experts' tokens travel by themselves
    half = 2 if share.spread > 1 else 1
    times = half * layers * (dense * forwards + (dense - 1) * again)
    add("layers, forward", between, share.tensor, times, hidden / share.spread)
    add("layers, backward", between, share.tensor, half * dense * layers * passes, hidden / share.spread)
    if facts.experts is not None:
        rows = hidden / share.spread * facts.experts.per_token
        ranks = parallel.expert * parallel.expert_tensor
        add("experts, forward", "all-to-all", ranks, 2 * layers * (forwards + again), rows)
        add("experts, backward", "all-to-all", ranks, 2 * layers * passes, rows)
    keys = 2 * facts.kv_heads * facts.head_dim / share.tensor * share.tokens * share.itemsize
    add("attention", "send, receive", parallel.context, layers * (forwards + 2 * passes), keys)
    add("stages", "send, receive", parallel.pipeline, (forwards + passes) * parallel.virtual, hidden / share.spread)
    reduce = "reduce-scatter" if settings.optimizer.distributed else "all-reduce"
    buffers: dict[int, Static] = {}  # experts' have copies of their own
    for copies, buffer in shared_out(facts, settings, rank):
        buffers[copies] = buffers.get(copies, Static(0, 0, 0)) + buffer
    for copies, static in buffers.items():
        add("gradients", reduce, copies, updates, static.gradients)
        if settings.optimizer.distributed:
            add("weights", "all-gather", copies, updates, static.weights / copies)
    published = static_of(facts, settings, rank).weights
    add("weights, published", "all-gather", _replica(topology), 1, published)
    return found


def _replica(topology: Topology) -> int:
    return topology.stage_ranks * topology.pipeline
