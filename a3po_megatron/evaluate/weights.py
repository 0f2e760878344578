"""Brings weights from files into the engines, with the proof that a publish has: no tensor is taken up unseen.

    files → every tensor's name, shape, dtype, finiteness → engine → its own tensors read back, where that is possible

The digest is that of a publish's receipt (weights/receipt.py): a run's weights have one digest, whether the run itself
published them or they were saved, and whatever engine is asked.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from blake3 import blake3

from ..convert.stream import stream_of_checkpoint, stream_of_folder
from ..model.cut import tensors
from ..model.facts import ModelFacts
from ..ranks.agree import same
from ..ranks.groups import Ranks
from ..rollout.engine import Engine, local_experts
from ..telemetry.catalogue import Phase
from ..telemetry.clock import phase
from ..weights.fuse import FusedExperts
from ..weights.publish import checked, compare_back
from ..weights.transfer import Timings, fresh
from .request import Source


def load_weights(
    source: Source, ranks: Ranks, facts: ModelFacts, engine: Engine, engine_ranks: int, expert: int
) -> str:
    """Returns the weights' digest. Collective.

    engine_ranks, expert: rollout.tensor and rollout.expert

    Raises RequestError for files that are not whole, and PublishError on every rank for an engine that holds others.
    """
    with phase(Phase.PUBLISH):
        stream_of = stream_of_folder if source.kind == "hf" else stream_of_checkpoint
        fused = FusedExperts(facts) if engine.fused_experts else None
        allocate = fused.allocate if fused else fresh
        every = tensors(facts)
        first, end = local_experts(ranks.rank, engine_ranks, expert, facts.experts.count if facts.experts else 0)
        coming = {
            name: tensor for name, tensor in every.items() if tensor.expert is None or first <= tensor.expert < end
        }
        sums: dict[str, int] = {}
        inside: dict[str, int] = {}
        quantised = engine.quantised if engine.receipt_strength == "requantised" else None
        read = stream_of(Path(source.weights), facts, engine.dtype, allocate, torch.device(ranks.backend.device))
        stream = checked(
            ([each] for each in read),
            every,
            engine.dtype,
            sums,
            Timings(),
            quantised,
            inside,
        )
        needed = (each for each in stream if each[0] in coming)
        engine.load(fused.fuse(needed) if fused else needed)
        digest = blake3(json.dumps([str(engine.dtype), sums]).encode()).hexdigest()
        ranks.agree("the weights that were read", digest, same)
        if engine.receipt_strength != "stream":
            compare_back(ranks, engine, sums | inside, "evaluation")
        engine.forget()
        engine.weight_version = 1
        return digest
