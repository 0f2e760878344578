"""An objective from outside the package that goes by whole sequences, against the same on the HF model in float64.

The sequence ratio and its clipping are GSPO's (arXiv 2507.18071): s = exp(mean over the response of log pi - log
pi_old), a rollout's loss -min(s A, clip(s) A), summed and divided by what `normaliser` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.sums import Kind, Max, Sum
from a3po_megatron.algorithm.token_loss import Normaliser, TokenBatch, TokenLoss
from a3po_megatron.config import Config
from tests.distributed.cases_learner import TEMPERATURE, as_hf, batch_of, learner_in, literal_old, share
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import hf_logprobs, hf_model, hf_tensors_of, make_collected, trained_places, with_tools

CLIP, CONSTANT = 0.1, 32
LAYOUTS: tuple[dict[str, int], ...] = ({"data": 2}, {"context": 2}, {"tensor": 2}, {"pipeline": 2})
# Each layout, and one of them with rollouts that tools wrote some tokens, or all, of.
CELLS = (*((layout, False) for layout in LAYOUTS), ({"context": 2}, True))
NORMALISERS: tuple[Normaliser, ...] = ("sequences", "constant", "tokens")


@dataclass(frozen=True)
class SequenceRatio:
    normaliser: Normaliser
    constant: int = CONSTANT
    metrics: ClassVar[Mapping[str, Kind]] = {
        "learner/loss": Sum,
        "policy/clip_high_rate": Sum,
        "policy/ratio_first_max": Max,
    }

    def __call__(self, batch: TokenBatch) -> TokenLoss:
        lengths = batch.sequence_sum(torch.ones_like(batch.logprobs)).clamp(min=1)
        ratio = torch.exp(batch.sequence_sum(batch.logprobs - batch.old_logprobs) / lengths)[batch.rollout]
        clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
        losses = -torch.minimum(ratio * batch.advantages, clipped * batch.advantages)[batch.begins]
        loss, rollouts = losses.sum(), losses.numel()
        high = (ratio > 1 + CLIP)[batch.begins].sum()
        largest = ratio.detach().max() if ratio.numel() else 0.0
        return TokenLoss(
            loss,
            {
                "learner/loss": Sum(loss.detach(), rollouts),
                "policy/clip_high_rate": Sum(high, rollouts),
                "policy/ratio_first_max": Max(largest),
            },
        )


@dataclass
class Literal:
    loss: float  # per rollout
    high: float  # share of rollouts
    largest: float
    rollouts: int
    tokens: int
    gradients: dict[str, torch.Tensor]  # of the summed loss, as HF tensors


def literal(folder: Path, tools: bool) -> Literal:
    model = hf_model(folder)
    collected = with_tools(make_collected(groups=5, size=4)) if tools else make_collected(groups=5, size=4)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = literal_old(whole).split(whole.lengths.tolist())
    losses, ratios, tokens = [], [], 0
    for rollout, before, advantage in zip(whole.rollouts, old, whole.advantages.double(), strict=True):
        logprobs = hf_logprobs(model, rollout.prompt.tokens, rollout.tokens, TEMPERATURE)
        if not (places := trained_places(rollout)):
            continue
        tokens += len(places)
        ratio = torch.exp((logprobs - before.double())[places].mean())
        losses.append(-torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage))
        ratios.append(float(ratio))
    total = torch.stack(losses).sum()
    total.backward()
    named = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    high = sum(ratio > 1 + CLIP for ratio in ratios) / len(ratios)
    return Literal(float(total) / len(losses), high, max(ratios), len(losses), tokens, hf_tensors_of(named))


def by_sequence(ranks: CaseRanks) -> dict[str, Any]:
    """Differences from the literal computation, by layout and normaliser."""
    folder, found = ranks.folder / "qwen3", {}
    for layout, tools in CELLS:
        exact = ranks.once(f"by-sequence-{tools}", lambda tools=tools: literal(folder, tools))
        divisors = {"sequences": exact.rollouts, "constant": exact.rollouts * CONSTANT, "tokens": exact.tokens}
        collected = with_tools(make_collected(groups=5, size=4)) if tools else make_collected(groups=5, size=4)
        cluster, learner = learner_in(ranks, folder, layout)
        mine = share(collected, cluster.coordinates.data, cluster.data)
        with torch.no_grad():
            weights = {key: value.clone() for key, value in learner.parameters().items()}
        for normaliser in NORMALISERS:
            update = learner.update(batch_of(collected, mine), SequenceRatio(normaliser))
            ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
            wanted = {name: gradient / divisors[normaliser] for name, gradient in exact.gradients.items()}
            reported = {name: value for name, value in update.reported.items() if value is not None}
            found[f"{layout} {normaliser} {tools}"] = {
                "gradient": max(float((ours[n] - g).abs().max() / g.abs().max()) for n, g in wanted.items()),
                "loss": abs(reported["learner/loss"] - exact.loss),
                "high": abs(reported["policy/clip_high_rate"] - exact.high),
                "largest": abs(reported["policy/ratio_first_max"] - exact.largest),
            }
            with torch.no_grad():
                for key, value in learner.parameters().items():
                    value.copy_(weights[key])
    return found
