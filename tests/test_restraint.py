"""Tokens that are kept from being learned as the others are, against loops over all tokens of all replicas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.largest import KEYS, keys_of, threshold
from a3po_megatron.algorithm.restraint import restrain
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch
from a3po_megatron.config import ClipCov, KlCov, LpReg, Shaping
from tests.test_correction import scored
from tests.test_fork_tokens import over


def replicas_of(count: int, holes: bool = True) -> list[Batch]:
    """Scored batches of replicas, of which one has tokens that are not trained on, and one has none at all."""
    batches = [scored(groups=3 + number, seed=number) for number in range(count)]
    draw = np.random.default_rng(7)
    for number, batch in enumerate(batches):
        tokens = len(batch.rollout_index)
        batch.old_logprobs = torch.from_numpy(draw.normal(-1.5, 1.5, tokens).clip(max=0).astype(np.float32))
        cut = torch.from_numpy(draw.random(tokens) < 0.4)
        batch.proxy_logprobs = torch.where(cut, float("-inf"), batch.old_logprobs / 2)
        for place, rollout in enumerate(batch.rollouts):
            rollout.seed = 1000 * number + place
        if holes and number == 1:
            batch.trained = torch.from_numpy(draw.random(tokens) < 0.7)
        if holes and number == 2:
            batch.trained = torch.zeros(tokens, dtype=torch.bool)
    return batches


def restrained(batches: list[Batch], options: Shaping) -> list[Batch]:
    return over(batches, lambda batch, total: restrain(shape(batch, 0, options), options, total))


def tokens_of(batches: list[Batch]) -> list[tuple[int, int, float, float]]:
    """(replica, place, advantage, old log-prob) of all tokens that are trained on."""
    return [
        (number, place, float(batch.advantages[batch.rollout_index[place]]), float(batch.old_logprobs[place]))
        for number, batch in enumerate(batches)
        for place in range(len(batch.rollout_index))
        if batch.old_logprobs is not None and (batch.trained is None or batch.trained[place])
    ]


def covariances(batches: list[Batch]) -> dict[tuple[int, int], float]:
    tokens = tokens_of(batches)
    mean = math.fsum(a for *_, a, _ in tokens) / len(tokens), math.fsum(old for *_, old in tokens) / len(tokens)
    return {(number, place): (a - mean[0]) * (old - mean[1]) for number, place, a, old in tokens}


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("fraction", [1e-6, 0.05, 1.0])
def test_kl_cov_draws_the_tokens_of_largest_covariance_to_the_old_policy(replicas: int, fraction: float) -> None:
    batches = restrained(replicas_of(replicas), KlCov(fraction=fraction, kl=0.5))
    values = covariances(batches)
    wanted = max(1, math.floor(fraction * len(values)))
    least = np.float32(sorted(values.values(), reverse=True)[wanted - 1])
    chosen: set[tuple[int, int]] = set()
    for number, batch in enumerate(batches):
        (pull,) = batch.pulls
        assert pull.estimator == "abs" and pull.targets is batch.old_logprobs
        chosen |= {(number, place) for place in torch.nonzero(pull.weights)[:, 0].tolist()}
        assert set(pull.weights.tolist()) <= {0.0, 0.5} and batch.restrained is not None
        assert torch.equal(batch.restrained, pull.weights > 0)
        assert batch.token_weights is not None
        assert torch.equal(batch.token_weights, batch.is_trained().float()), "no other weight than 1"
    assert len(chosen) == wanted, "also where many are alike"
    assert {key for key, value in values.items() if np.float32(value) > least} <= chosen
    assert all(np.float32(values[key]) >= least for key in chosen)


@pytest.mark.parametrize("replicas", [1, 2, 3])
@pytest.mark.parametrize("fraction", [1e-6, 0.05, 1.0])
def test_lp_reg_draws_the_least_likely_of_bad_tokens_that_are_no_noise(replicas: int, fraction: float) -> None:
    batches = restrained(replicas_of(replicas), LpReg(fraction=fraction, kl=2.0))
    bad = sorted((old, number, place) for number, place, advantage, old in tokens_of(batches) if advantage < 0)
    chosen = {(number, place) for _, number, place in bad[: max(1, math.floor(fraction * len(bad)))]}
    drawn = 0
    for number, batch in enumerate(batches):
        (pull,) = batch.pulls
        assert pull.estimator == "k3" and batch.proxy_logprobs is not None and batch.old_logprobs is not None
        for place, weight in enumerate(pull.weights.tolist()):
            proxy, old = float(batch.proxy_logprobs[place]), float(batch.old_logprobs[place])
            assert weight == (2.0 if (number, place) in chosen and proxy > old else 0.0)
            drawn += weight > 0
    assert drawn < len(chosen) or fraction < 0.01


@pytest.mark.parametrize("fraction", [1e-6, 0.05, 1.0])
def test_clip_cov_leaves_out_as_many_of_a_band_whoever_holds_them(fraction: float) -> None:
    options = ClipCov(fraction=fraction, low=0.2, high=1.5)
    batches = restrained(replicas_of(3), options)
    values = covariances(batches)
    band = {key for key, value in values.items() if 0.2 < value < 1.5}
    assert 5 < len(band) < len(values) / 2
    out: set[tuple[int, int]] = set()
    for number, batch in enumerate(batches):
        assert batch.token_weights is not None and not batch.pulls
        trained = batch.is_trained()
        assert set(batch.token_weights[trained].tolist()) <= {0.0, 1.0} and not batch.token_weights[~trained].any()
        out |= {(number, place) for place in torch.nonzero(trained & (batch.token_weights == 0))[:, 0].tolist()}
    assert out <= band and len(out) == min(len(band), max(1, math.floor(fraction * len(values))))


def test_which_tokens_clip_cov_draws_depends_on_no_layout_and_differs_from_step_to_step() -> None:
    """The same rollouts as one replica's and as three's."""
    options, whole = ClipCov(fraction=0.05, low=0.2, high=1.5), scored(groups=6)
    for number, rollout in enumerate(whole.rollouts):
        rollout.seed = number

    def left_out(batches: list[Batch]) -> set[tuple[str, int]]:
        found = set()
        for batch in restrained(batches, options):
            assert batch.token_weights is not None
            starts = batch.lengths.cumsum(0) - batch.lengths
            for place in torch.nonzero(batch.token_weights == 0)[:, 0].tolist():
                rollout = int(batch.rollout_index[place])
                found.add((batch.rollouts[rollout].name, place - int(starts[rollout])))
        return found

    def part(replica: int) -> Batch:
        batch = scored(groups=6)
        mine = batch.group_index % 3 == replica
        tokens = mine[batch.rollout_index]
        assert batch.old_logprobs is not None and batch.entropy is not None
        batch.rollouts = [r for r, m in zip(whole.rollouts, mine.tolist(), strict=True) if m]
        for name in ("group_index", "mini_batch", "rewards", "positive", "advantages", "lengths"):
            setattr(batch, name, getattr(batch, name)[mine])
        batch.rollout_index = torch.repeat_interleave(torch.arange(len(batch.rollouts)), batch.lengths)
        batch.old_logprobs, batch.entropy = batch.old_logprobs[tokens], batch.entropy[tokens]
        return batch

    once = left_out([whole])
    assert once and left_out([part(0), part(1), part(2)]) == once
    for rollout in whole.rollouts:
        rollout.step = 1
    assert left_out([whole]) != once


def test_a_threshold_is_the_value_at_its_place_in_a_sort() -> None:
    draw = np.random.default_rng(3)
    values = torch.from_numpy(np.round(draw.normal(0, 3, 500), 1).astype(np.float32))
    keys = keys_of(values)
    assert int(keys.min()) >= 0 and int(keys.max()) < KEYS
    assert torch.equal(torch.argsort(keys, stable=True), torch.argsort(values, stable=True))
    ordered = sorted(keys.tolist(), reverse=True)
    for wanted in (1, 2, 77, 499, 500):
        assert threshold(keys, wanted, lambda v: v) == ordered[wanted - 1]
    assert threshold(keys, 501, lambda v: v) == 0 == threshold(keys[:0], 1, lambda v: v)
