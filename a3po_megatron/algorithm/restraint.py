"""Which tokens of a step are kept from being learned as the others are, against the collapse of entropy.

    clip_cov   c = (A - mean A)(log pi_old - mean log pi_old) of each token; max(1, floor(fraction * T)) of those with
               low < c < high, drawn by name, have weight 0                                     (arXiv 2505.22617)
    kl_cov     the max(1, floor(fraction * T)) tokens of largest c are drawn to pi_old by |log pi - log pi_old|
    lp_reg     of the max(1, floor(fraction * N)) least likely of the N tokens with A < 0, those that are in the less
               noisy policy (learner/proxy.py) are drawn to it by k3                            (arXiv 2510.03222)

T, N and the means are of all replicas, and a choice is made once a step, by the old log-probs: it depends on no layout
and no packing. Among those that are alike lots decide: where the policy is sure, thousands are. The authors choose
within each micro-batch, by the log-probs of the moment; in the first mini-batch these are the same. Tokens that are
left out or drawn still count in the normaliser.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..batch import Batch, Pull
from ..config import ClipCov, KlCov, LpReg, Shaping
from .largest import KEYS, Total, count, keys_of, threshold


@torch.no_grad()
def restrain(batch: Batch, options: Shaping, total: Total) -> Batch:
    """Takes weights off tokens of a shaped batch, or has them drawn. Collective over the replicas."""
    assert batch.old_logprobs is not None and batch.token_weights is not None, "shape the batch first"
    trained = batch.is_trained()
    if isinstance(options, ClipCov):
        values, wanted = _covariance(batch, trained, total)
        band = trained & (values > options.low) & (values < options.high)
        out = _largest(_lots(batch), band, _share(options.fraction, wanted), total)
        batch.token_weights = batch.token_weights.masked_fill(out, 0.0)
    elif isinstance(options, KlCov):
        values, wanted = _covariance(batch, trained, total)
        chosen = _chosen(batch, values, trained, _share(options.fraction, wanted), total)
        _draw(batch, "abs", batch.old_logprobs, chosen, options.kl)
    elif isinstance(options, LpReg):
        assert batch.proxy_logprobs is not None, "score the batch with the less noisy policy"
        bad = trained & (batch.token_advantages() < 0)
        unlikely = _chosen(batch, -batch.old_logprobs, bad, _share(options.fraction, count(bad, total)), total)
        chosen = unlikely & (batch.proxy_logprobs > batch.old_logprobs)
        _draw(batch, "k3", batch.proxy_logprobs, chosen, options.kl)
    return batch


def _share(fraction: float, tokens: int) -> int:
    return max(1, int(fraction * tokens))


def _covariance(batch: Batch, trained: Tensor, total: Total) -> tuple[Tensor, int]:
    """What each token adds to the covariance of advantage and log-prob over all replicas [T] float64, and how many
    tokens that are."""
    assert batch.old_logprobs is not None
    advantages, logprobs = batch.token_advantages().double(), batch.old_logprobs.double()
    values = torch.stack([torch.ones_like(logprobs), advantages, logprobs])[:, trained]
    tokens, of_advantages, of_logprobs = total(values.sum(dim=1)).tolist()
    means = of_advantages / max(tokens, 1), of_logprobs / max(tokens, 1)
    return (advantages - means[0]) * (logprobs - means[1]), int(tokens)


def _chosen(batch: Batch, values: Tensor, among: Tensor, wanted: int, total: Total) -> Tensor:
    """Which tokens [T] bool have the so many largest values of some of all replicas' tokens; of those that are as large
    as the last one, lots decide."""
    keys = keys_of(values)
    least = threshold(keys[among], wanted, total)
    larger, alike = among & (keys > least), among & (keys == least)
    return larger | _largest(_lots(batch), alike, wanted - count(larger, total), total)


def _largest(keys: Tensor, among: Tensor, wanted: int, total: Total) -> Tensor:
    return among & (keys >= threshold(keys[among], wanted, total))


def _lots(batch: Batch) -> Tensor:
    """A key of each token [T], drawn at random by its rollout's seed: whoever holds it, and however often."""
    drawn = [
        np.random.default_rng([rollout.seed, rollout.step]).integers(0, KEYS, len(rollout.tokens))
        for rollout in batch.rollouts
    ]
    return torch.from_numpy(np.concatenate(drawn)) if drawn else torch.zeros(0, dtype=torch.int64)


def _draw(batch: Batch, estimator: str, targets: Tensor, chosen: Tensor, weight: float) -> None:
    batch.pulls.append(Pull(estimator, targets, chosen.float() * weight))
    batch.restrained = chosen
