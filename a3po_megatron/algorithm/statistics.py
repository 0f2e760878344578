"""What a batch says about the sampler and about shaping, as sums that add over ranks.

`batch_sums` gives one vector per replica; added over the replicas, `batch_metrics` turns it into metrics. A share whose
denominator is 0 is undefined (None), except that shaping which is switched off shapes a share of exactly 0. Tokens that
are not trained on count nowhere here. A token is on the side that shaping has it on: that of its rollout's verdict, or,
with process.polarity: tokens, its own.
"""

from __future__ import annotations

import itertools
import math

import torch

from ..batch import Batch
from .kl import kl_k3

INERT = 1e-4  # a shaped token whose 1 - p is below this has practically no gradient to scale

_SIDES = ("positive", "negative")
_NAMES = ("tokens", "shaped", "inert", "gradient", "gradient_shaped")
KEYS = (
    "tokens",
    "scored_tokens",
    "entropy",
    "old_logprob",
    "fresh_tokens",
    "mismatch_abs",
    "mismatch_k3",
    "routed",
    "rerouted",
    "rollouts",
    "masked",
    "reference_tokens",
    "kl_reference",
    "restrained",
    *(f"{name}_{side}" for side in _SIDES for name in _NAMES),
)


@torch.no_grad()
def batch_sums(batch: Batch, weight_version: int) -> torch.Tensor:
    """Returns [len(KEYS)] float64. Mismatch is summed over tokens that the current weights sampled: for those of older
    weights the difference would be the policy's own progress, not noise between two engines. Where the learner did not
    score (learner.old_logprobs), neither it nor entropy is known."""
    assert batch.old_logprobs is not None and batch.token_weights is not None
    scored = batch.entropy is not None
    segments = [segment for rollout in batch.rollouts for segment in rollout.segments]
    lengths = torch.tensor([segment.length for segment in segments], dtype=torch.int64)
    of_weights = torch.tensor([segment.weight_version == weight_version for segment in segments], dtype=torch.bool)
    trained = slice(None) if batch.trained is None else batch.trained
    fresh_tokens = of_weights.repeat_interleave(lengths)[trained]
    old, sampled = (values[trained].double() for values in (batch.old_logprobs, batch.rollout_logprobs))
    weights = batch.token_weights[trained]
    # Routes are of a whole rollout, prompt and all: of several weights they are nobody's.
    fresh = torch.tensor([rollout.sampled_by(weight_version) for rollout in batch.rollouts], dtype=torch.bool)
    difference = (old - sampled)[fresh_tokens]
    routed = [math.prod(r.routes.shape[:2]) if r.routes is not None else 0 for r in batch.rollouts]
    sums = {
        "tokens": torch.tensor(float(old.numel())),
        "scored_tokens": torch.tensor(float(scored * old.numel())),
        "entropy": torch.tensor(0.0) if batch.entropy is None else batch.entropy[trained].double().sum(),
        "old_logprob": old.sum(),
        "fresh_tokens": fresh_tokens.sum() * scored,
        "mismatch_abs": difference.abs().sum(),
        "mismatch_k3": kl_k3(difference).sum(),
        "routed": torch.tensor(0.0 if batch.rerouted is None else float(sum(itertools.compress(routed, fresh)))),
        "rerouted": torch.tensor(0.0) if batch.rerouted is None else batch.rerouted[fresh].sum(),
        "rollouts": torch.tensor(float(len(batch.rollouts))),
        "masked": torch.tensor(0.0) if batch.masked is None else batch.masked.sum(),
        "reference_tokens": torch.tensor(0.0),
        "kl_reference": torch.tensor(0.0),
        "restrained": torch.tensor(0.0) if batch.restrained is None else batch.restrained.sum(),
    }
    if batch.reference_logprobs is not None:
        sums["reference_tokens"] = sums["tokens"]
        sums["kl_reference"] = kl_k3(batch.reference_logprobs[trained].double() - old).sum()
    one_minus_p = -torch.expm1(old)
    shaped = weights != 1
    pull = weights.double() * batch.token_advantages(trained).double().abs() * one_minus_p
    positive = batch.positive_tokens(trained)
    for side, mask in zip(_SIDES, (positive, ~positive), strict=True):
        sums[f"tokens_{side}"] = mask.sum()
        sums[f"shaped_{side}"] = (mask & shaped).sum()
        sums[f"inert_{side}"] = (mask & shaped & (one_minus_p < INERT)).sum()
        sums[f"gradient_{side}"] = pull[mask].sum()
        sums[f"gradient_shaped_{side}"] = pull[mask & shaped].sum()
    return torch.stack([sums[key].double() for key in KEYS])


def batch_metrics(total: torch.Tensor, rho: tuple[float, float]) -> dict[str, float | None]:
    """Metrics of the summed vector; `shaping/rho` is the weight of positives."""
    sums = dict(zip(KEYS, total.tolist(), strict=True))

    def share(part: str, whole: str) -> float | None:
        return sums[part] / sums[whole] if sums[whole] else None

    metrics: dict[str, float | None] = {
        "policy/entropy": share("entropy", "scored_tokens"),
        "policy/old_logprob_mean": share("old_logprob", "tokens"),
        "mismatch/logprob_abs_mean": share("mismatch_abs", "fresh_tokens"),
        "mismatch/kl_k3": share("mismatch_k3", "fresh_tokens"),
        "mismatch/routes_rate": share("rerouted", "routed"),
        "mismatch/masked_rate": share("masked", "rollouts"),
        "policy/kl_reference": share("kl_reference", "reference_tokens"),
        "shaping/drawn_rate": share("restrained", "tokens"),
        "shaping/rho": rho[0],
    }
    for side, weight in zip(_SIDES, rho, strict=True):
        off = weight == 1.0
        metrics[f"shaping/shaped_rate_{side}"] = 0.0 if off else share(f"shaped_{side}", f"tokens_{side}")
        metrics[f"shaping/inert_rate_{side}"] = 0.0 if off else share(f"inert_{side}", f"shaped_{side}")
        metrics[f"shaping/gradient_share_{side}"] = 0.0 if off else share(f"gradient_shaped_{side}", f"gradient_{side}")
    return metrics
