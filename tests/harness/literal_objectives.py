"""Objectives written out in float64 with loops over rollouts and tokens, and batches to hold the package's against."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.algorithm.sums import Report
from a3po_megatron.algorithm.token_loss import Objective, TokenBatch, normaliser_count
from a3po_megatron.config import (
    CispoOptions,
    ClippedOptions,
    Correction,
    GmpoOptions,
    GspoOptions,
    GspoTokenOptions,
    LuspoOptions,
    NoCorrection,
    ReinforceOptions,
    SapoOptions,
    TisOptions,
    VespoOptions,
)
from a3po_megatron.config.section import Section

CONSTANT = 11
TIS = TisOptions(cap=1.5)  # so that some weights are cut off


# --- random batches --------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rollouts:
    """A batch as lists of rollouts, each of tokens."""

    logprobs: list[Tensor]
    old: list[Tensor]
    sampled: list[Tensor]
    weights: list[Tensor]
    advantages: list[float]

    def batch(self, mine: list[tuple[int, list[int]]], mini_batch: int = 1, **more: Any) -> TokenBatch:
        """The tokens `mine`, (rollout, which of its tokens) each, as the learner hands them over."""
        index = torch.tensor([i for i, tokens in mine for _ in tokens], dtype=torch.int64)
        places = [(i, t) for i, tokens in mine for t in tokens]

        def flat(values: list[Tensor]) -> Tensor:
            return torch.stack([values[i][t] for i, t in places]) if places else torch.zeros(0, dtype=torch.float64)

        return TokenBatch(
            logprobs=flat(self.logprobs) if places else torch.zeros(0, dtype=torch.float64, requires_grad=True),
            old_logprobs=flat(self.old),
            rollout_logprobs=flat(self.sampled),
            advantages=torch.tensor([self.advantages[i] for i, _ in places], dtype=torch.float64),
            token_weights=flat(self.weights),
            rollout=index,
            begins=torch.tensor([t == 0 for _, t in places], dtype=torch.bool),
            rollouts=len(self.logprobs),
            mini_batch=mini_batch,
            **more,
        )

    def whole(self) -> list[tuple[int, list[int]]]:
        return [(i, list(range(len(values)))) for i, values in enumerate(self.logprobs)]

    def gradients(self) -> list[list[float]]:
        found = [[0.0] * len(v) if v.grad is None else v.grad.tolist() for v in self.logprobs]
        for values in self.logprobs:
            values.grad = None
        return found


LENGTHS = (1, 7, 2, 30, 1, 12, 5, 19, 3, 9, 14, 2)
ADVANTAGES = (1.3, -0.7, -1.1, 0.8, -0.2, 0.0, 0.4, -1.6, 0.9, 1.1, -0.5, 0.3)


def drawn(spread: float, seed: int = 0, weighted: bool = True) -> Rollouts:
    """Rollouts whose log-ratios spread so far, one of which has an advantage of 0."""
    generator = torch.Generator().manual_seed(seed)

    def normal(size: int, scale: float) -> Tensor:
        return scale * torch.randn(size, generator=generator, dtype=torch.float64)

    old = [normal(n, 1.0) - 3 for n in LENGTHS]
    return Rollouts(
        [(o + normal(len(o), spread)).requires_grad_() for o in old],
        old,
        [o + normal(len(o), 0.3) for o in old],
        [1 + (torch.rand(len(o), generator=generator, dtype=torch.float64) < 0.3) * float(weighted) for o in old],
        list(ADVANTAGES),
    )


# --- formulas, one rollout at a time ---------------------------------------------------------------------------------

# (options, log-probs, old ones, those of the sampler, token weights, advantage) of a rollout → of each of its tokens:
# value, whether it is clipped from below, from above. A rollout's only value stands at each of its tokens.
Terms = list[tuple[Tensor, bool, bool]]
Formula = Callable[..., Terms]


def minimum(a: Tensor, b: Tensor) -> Tensor:
    return a if a.item() <= b.item() else b


def bounded(ratio: Tensor, low: float, high: float) -> Tensor:
    limit = low if ratio.item() < low else high if ratio.item() > high else None
    return ratio if limit is None else torch.full_like(ratio, limit)


def clip(o: Any, ratio: Tensor, advantage: float) -> tuple[Tensor, bool, bool]:
    low, high = 1 - o.clip_low, 1 + o.clip_high
    value = minimum(ratio * advantage, bounded(ratio, low, high) * advantage)
    return value, advantage < 0 and ratio.item() < low, advantage > 0 and ratio.item() > high


def geometric_mean(new: Tensor, old: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for t in range(len(new)):
        total = total + new[t] - old[t]
    return torch.exp(total / len(new))


def clipped(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    terms = []
    for t in range(len(new)):
        shaped = float(weights[t]) * advantage
        value, low, high = clip(o, torch.exp(new[t] - old[t]), shaped)
        if shaped < 0 and o.dual_clip and value.item() < o.dual_clip * shaped:
            value = torch.full_like(value, o.dual_clip * shaped)
        terms.append((value, low, high))
    return terms


def gspo(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    return [clip(o, geometric_mean(new, old), advantage)] * len(new)  # each token's share of a mean over tokens


def gspo_token(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    ratio = float(geometric_mean(new, old).detach())
    return [
        clip(o, ratio * torch.exp(new[t]) / math.exp(float(new[t].detach())), float(weights[t]) * advantage)
        for t in range(len(new))
    ]


def luspo(o: Any, new: Tensor, *rest: Any) -> Terms:
    return [(len(new) * value, low, high) for value, low, high in gspo(o, new, *rest)]


def gmpo(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    total, marks = torch.zeros((), dtype=torch.float64), []
    for t in range(len(new)):
        log = new[t] - old[t]
        low = advantage < 0 and log.item() < -o.log_clip_low
        high = advantage > 0 and log.item() > o.log_clip_high
        marks.append((low, high))
        total = total + (-o.log_clip_low if low else o.log_clip_high if high else log)
    return [(torch.exp(total / len(new)) * advantage, low, high) for low, high in marks]


def cispo(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    ratios = [math.exp(float(new[t].detach() - old[t])) for t in range(len(new))]
    return [
        (min(r, 1 + o.clip_high) * float(weights[t]) * advantage * new[t], False, r > 1 + o.clip_high)
        for t, r in enumerate(ratios)
    ]


def sapo(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    tau, terms = o.temperature_positive if advantage > 0 else o.temperature_negative, []
    for t in range(len(new)):
        gate = 1 / (1 + torch.exp(-tau * (torch.exp(new[t] - old[t]) - 1)))
        terms.append((4 / tau * gate * float(weights[t]) * advantage, False, False))
    return terms


def vespo(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    log = sum(float(new[t].detach() - old[t]) + float(old[t] - sampled[t]) for t in range(len(new)))
    w = min(max(math.exp(log), 1e-8), math.exp(20))
    k, scale = (o.k_positive, o.lambda_positive) if advantage >= 0 else (o.k_negative, o.lambda_negative)
    phi = math.exp(scale) * w**k * math.exp(-scale * w)
    return [(phi * float(weights[t]) * advantage * new[t], False, False) for t in range(len(new))]


def reinforce(o: Any, new: Tensor, old: Tensor, sampled: Tensor, weights: Tensor, advantage: float) -> Terms:
    return [(float(weights[t]) * advantage * new[t], False, False) for t in range(len(new))]


def literal(formula: Formula, options: Any, correction: Correction, data: Rollouts) -> dict[str, float]:
    """Loss (its gradients are left in the log-probs) and rates, by the normaliser of the options."""
    total, low, high, tokens = torch.zeros((), dtype=torch.float64), 0, 0, 0
    for new, old, sampled, weights, advantage in zip(
        data.logprobs, data.old, data.sampled, data.weights, data.advantages, strict=True
    ):
        n = len(new)
        cut = [
            1.0 if isinstance(correction, NoCorrection) else min(math.exp(float(old[t] - sampled[t])), correction.cap)
            for t in range(n)
        ]
        if isinstance(options, GmpoOptions):
            cut = [math.prod(cut) ** (1 / n)] * n
        share = 1 / n if getattr(options, "normaliser", "sequences") == "sequences" else 1.0
        for t, (value, is_low, is_high) in enumerate(formula(options, new, old, sampled, weights, advantage)):
            total = total - value * cut[t] * share
            low, high, tokens = low + is_low, high + is_high, tokens + 1
    normaliser = getattr(options, "normaliser", "sequences")
    loss = (
        total
        / {"tokens": tokens, "sequences": len(data.logprobs), "constant": len(data.logprobs) * CONSTANT}[normaliser]
    )
    loss.backward()
    return {"loss": float(loss.detach()), "low": low / tokens, "high": high / tokens}


# Options, formula, how far log-ratios spread, which clips must be hit
CASES: dict[str, tuple[Section, Formula, float, str]] = {
    "clipped": (ClippedOptions(), clipped, 0.8, "low high"),
    "clipped sequences": (ClippedOptions(normaliser="sequences", clip_high=0.2, dual_clip=0), clipped, 0.5, "low high"),
    "clipped constant": (ClippedOptions(normaliser="constant", constant=CONSTANT), clipped, 0.5, "low high"),
    "gspo": (GspoOptions(), gspo, 0.01, "low high"),
    "gspo wide": (GspoOptions(clip_low=0.2, clip_high=0.1), gspo, 0.6, "low high"),
    "gspo_token": (GspoTokenOptions(), gspo_token, 0.002, "low high"),
    "gspo_token tokens": (
        GspoTokenOptions(normaliser="tokens", clip_low=0.2, clip_high=0.1),
        gspo_token,
        0.6,
        "low high",
    ),
    "luspo": (LuspoOptions(), luspo, 0.01, "low high"),
    "cispo": (CispoOptions(clip_high=0.5), cispo, 0.6, "high"),
    "cispo sequences": (CispoOptions(normaliser="sequences"), cispo, 1.5, "high"),
    "sapo": (SapoOptions(), sapo, 0.5, ""),
    "sapo tokens": (
        SapoOptions(normaliser="tokens", temperature_positive=3.0, temperature_negative=0.5),
        sapo,
        0.8,
        "",
    ),
    "gmpo": (GmpoOptions(log_clip_high=0.3), gmpo, 0.6, "low high"),
    "vespo": (VespoOptions(), vespo, 0.1, ""),
    "vespo far": (VespoOptions(normaliser="sequences", k_negative=0.01, lambda_negative=0.01), vespo, 8.0, ""),
    "reinforce": (ReinforceOptions(), reinforce, 0.3, ""),
    "reinforce constant": (ReinforceOptions(normaliser="constant", constant=CONSTANT), reinforce, 0.3, ""),
}


def correction_beside(options: Section) -> Correction:
    return NoCorrection() if isinstance(options, VespoOptions) else TIS


def divided(objective: Objective, batches: list[TokenBatch]) -> tuple[Tensor, dict[str, float | None]]:
    """Loss over micro-batches, as the learner takes it, and what is reported."""
    report, total, count = Report(objective.metrics), torch.zeros((), dtype=torch.float64), 0
    for batch in batches:
        loss, sums = objective(batch)
        total, count = total + loss, count + normaliser_count(objective, batch)
        report.sums += report.vector(sums, torch.device("cpu"))
    return total / count, report.metrics()
