"""A learner and an engine in one process, as train.py has them: the engine first, on the empty device.

The only place of the experiments that calls the engine; what it needs of it: VllmEngine(folder, facts, stops, options,
dtype, backend) with sample, probe, load, forget, sleep, wake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.data.order import named_seed
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import layout_of
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.ranks.groups import Ranks
from a3po_megatron.residency import Residency
from a3po_megatron.rollout.engine import Completion, Request, in_order
from a3po_megatron.rollout.vllm_engine import VllmEngine
from a3po_megatron.weights.publish import Publisher

from .rank import alone, config, make_learner

LENGTHS = {"max_prompt_tokens": 128, "max_tokens": 64, "max_sequences": 64}
CANARY = [tuple(range(2 + n, 12 + n)) for n in range(4)]


@dataclass
class Colocated:
    ranks: Ranks
    facts: ModelFacts
    folder: Path
    engine: VllmEngine
    learner: Learner
    publisher: Publisher
    residency: Residency

    def publish(self) -> Any:
        """Learner → engine, proven; returns the receipt."""
        return self.publisher.publish(self.learner.parameters(), self.learner.logprobs, self.engine)

    def sample(self, requests: Sequence[Request]) -> list[Completion]:
        return in_order(self.engine.sample(requests))

    def replace_learner(self, **learner: Any) -> None:
        """Another learner of the same weights, in another precision."""
        self.learner = make_learner(self.ranks, self.folder, learner=learner)

    def scores(self, requests: Sequence[Request], completions: Sequence[Completion], replayed: bool = False) -> Tensor:
        """The learner's log-probs [T] of what the engine sampled; `replayed`: by the engine's routes."""
        pairs = [(tuple(r.prompt), tuple(c.tokens.tolist())) for r, c in zip(requests, completions, strict=True)]
        routes = [c.routes for c in completions if c.routes is not None] if replayed else None
        return torch.cat(self.learner.logprobs(pairs, routes))


def colocate(
    folder: Path,
    backend: Backend = CUDA,
    learner: dict[str, Any] | None = None,
    *,
    stops: Sequence[int] = (),  # what ends a response besides its length
    cluster: Ranks | None = None,  # None: this rank alone
    sections: dict[str, dict[str, Any]] | None = None,  # of the configuration: parallel, optimizer, publish
    **rollout: Any,
) -> Colocated:
    cluster, facts = cluster or alone(backend), read_facts(folder)
    settings = config(folder, backend, learner=learner or {}, rollout=LENGTHS | rollout, **(sections or {}))
    dtype = torch.bfloat16 if settings.model.dtype == "bfloat16" else torch.float32
    engine = VllmEngine(folder, facts, stops, settings.rollout, dtype, backend)
    made = Learner(cluster, facts, settings)
    layout = layout_of(settings.parallel, backend.spec)
    publisher = Publisher(cluster, facts, layout, settings.publish, CANARY)
    residency = Residency(engine, made.arena, backend, settings.learner.offload)
    return Colocated(cluster, facts, folder, engine, made, publisher, residency)


def requests_of(vocab: int, count: int, tokens: int = 24) -> list[Request]:
    """Prompts of different lengths, seeds by name."""
    generator = torch.Generator().manual_seed(11)
    return [
        Request(
            torch.randint(2, vocab, (3 + number % tokens,), generator=generator).tolist(), named_seed("bringup", number)
        )
        for number in range(count)
    ]


def stops_of(vocab: int) -> range:
    """One token in sixteen: of responses of 64 all but one in sixty end on one, the last to end too. Then async
    scheduling has a step in flight that nobody waits for, which routes and a second cycle trip over."""
    return range(2, vocab, 16)


def stopped_share(completions: Sequence[Completion]) -> float:
    return sum(completion.finish == "stop" for completion in completions) / len(completions)


def in_flight(engine: VllmEngine) -> int:
    """Batches that vLLM's queue still holds; without async scheduling it has none."""
    return len(engine._llm.llm_engine.engine_core.engine_core.batch_queue or ())


def logprobs_of(completions: Sequence[Completion]) -> Tensor:
    return torch.cat([torch.from_numpy(completion.logprobs) for completion in completions])
