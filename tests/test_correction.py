"""The correction for the sampler's log-probs against loops, and what masking takes out of a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.correction import mask_far, mask_truncated, outside, sampler_correction
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.algorithm.statistics import batch_metrics, batch_sums
from a3po_megatron.batch import Batch
from a3po_megatron.config import AdvantageOptions, IcePop, NoCorrection, SequenceMask, ShapingOptions, TisOptions
from tests.harness.tiny_models import make_collected


def scored(groups: int = 4, size: int = 5, seed: int = 0) -> Batch:
    batch = assemble(make_collected(groups, size, seed), AdvantageOptions(), 2)
    draw = torch.Generator().manual_seed(seed)
    tokens = len(batch.rollout_index)
    batch.old_logprobs = batch.rollout_logprobs + 0.02 * torch.randn(tokens, generator=draw)
    batch.entropy = torch.rand(tokens, generator=draw)
    return batch


def test_icepop_keeps_the_ratios_within_its_bounds_and_no_others() -> None:
    ratios = torch.tensor([0.4999, 0.5, 1.0, 5.0, 5.001, 1e-9])
    old = ratios.double().log()
    assert sampler_correction(old, torch.zeros(6), IcePop()).tolist() == pytest.approx([0, 0.5, 1, 5, 0, 0])
    assert sampler_correction(old, torch.zeros(6), IcePop(low=0.0, high=10.0)).tolist() == pytest.approx(
        ratios.tolist()
    )


def test_the_rest_of_masked_batches_is_truncated_as_with_tis() -> None:
    old, rollout = torch.tensor([0.0, 2.0, -1.0]), torch.zeros(3)
    wanted = sampler_correction(old, rollout, TisOptions(cap=2.0))
    assert torch.equal(sampler_correction(old, rollout, SequenceMask()), wanted)
    assert torch.equal(sampler_correction(old, rollout, SequenceMask(cap=0.0)), torch.ones(3))


@pytest.mark.parametrize("seed", range(10))
def test_a_rollout_is_masked_where_the_mean_or_one_of_its_ratios_leaves_the_band(seed: int) -> None:
    draw = np.random.default_rng(seed)
    lengths = draw.integers(0, 9, 30)
    index = np.repeat(np.arange(30), lengths)
    old, rollout = draw.normal(-2, 1, len(index)), draw.normal(-2, 1, len(index))
    close = draw.random(30) < 0.6
    rollout = np.where(close[index], old + draw.normal(0, 0.01, len(index)), rollout).astype(np.float32)
    old = old.astype(np.float32)
    options = SequenceMask(token_high=3.0, token_low=0.1)
    found = outside(*map(torch.from_numpy, (old, rollout, index)), 30, options).tolist()
    for number in range(30):
        ratios = [
            math.exp(float(a) - float(b)) for a, b in zip(old[index == number], rollout[index == number], strict=True)
        ]
        mean = math.prod(ratios) ** (1 / len(ratios)) if ratios else 1.0
        far = any(ratio < 0.1 or ratio > 3.0 for ratio in ratios)
        assert found[number] == (bool(ratios) and (not 0.99 <= mean <= 1.01 or far)), number
    assert any(found) and not all(found)


def test_bounds_of_single_ratios_can_be_off() -> None:
    old, index = torch.tensor([-20.0, 20.0]), torch.zeros(2, dtype=torch.int64)
    assert not outside(old, torch.zeros(2), index, 1, SequenceMask(token_low=0.0)).item()
    assert outside(old, torch.zeros(2), index, 1, SequenceMask()).item()
    assert outside(old, torch.zeros(2), index, 1, SequenceMask(token_low=0.0, token_high=9.0)).item()


def test_masked_rollouts_are_neither_shaped_nor_counted() -> None:
    """The sums over a batch with masked rollouts are those over one that never had them."""
    batch = scored()
    far = torch.arange(len(batch.rollouts)) % 3 == 1
    assert batch.old_logprobs is not None and batch.entropy is not None
    batch.old_logprobs = torch.where(far[batch.rollout_index], batch.rollout_logprobs - 1.0, batch.rollout_logprobs)
    masked = shape(mask_far(batch, SequenceMask()), 0, ShapingOptions())
    assert masked.masked is not None and torch.equal(masked.masked, far & (batch.lengths > 0))
    assert masked.token_weights is not None and masked.trained is not None
    assert torch.equal(masked.trained, ~far[batch.rollout_index]) and not masked.token_weights[~masked.trained].any()
    kept = ~far[batch.rollout_index]
    alone = scored()
    keep = [number for number in range(len(alone.rollouts)) if not far[number]]
    alone.rollouts = [alone.rollouts[number] for number in keep]
    alone.advantages, alone.positive, alone.lengths = (
        v[keep] for v in (batch.advantages, batch.positive, batch.lengths)
    )
    alone.rollout_index = torch.repeat_interleave(torch.arange(len(keep)), alone.lengths)
    alone.old_logprobs, alone.entropy = batch.old_logprobs[kept], batch.entropy[kept]
    alone.rollout_logprobs = batch.rollout_logprobs[kept]
    shape(alone, 0, ShapingOptions())
    names = {"mismatch/masked_rate"}
    found, wanted = (batch_metrics(batch_sums(each, 1), each.rho) for each in (masked, alone))
    assert {n: v for n, v in found.items() if n not in names} == pytest.approx(
        {n: v for n, v in wanted.items() if n not in names}
    )
    assert found["mismatch/masked_rate"] == far.float().mean() and wanted["mismatch/masked_rate"] == 0


def test_other_corrections_mask_nothing() -> None:
    for options in (TisOptions(), IcePop(), NoCorrection()):
        batch = mask_far(scored(), options)
        assert batch.trained is None and batch.masked is None


def test_cut_off_responses_are_masked_and_have_had_their_part_in_their_group() -> None:
    collected = make_collected(3, 4)
    for group in collected.groups:
        group.rollouts[1].finish = "length"
    whole = assemble(collected, AdvantageOptions(), 1)
    batch = mask_truncated(assemble(collected, AdvantageOptions(), 1))
    cut = torch.tensor([rollout.finish == "length" for rollout in batch.rollouts])
    assert batch.trained is not None and torch.equal(batch.trained, ~cut[batch.rollout_index])
    assert torch.equal(batch.advantages, whole.advantages) and torch.equal(batch.rollout_index, whole.rollout_index)
    far = mask_far_of(batch)
    assert far.masked is not None and torch.equal(far.masked, cut)  # both may mask, and each counts once


def mask_far_of(batch: Batch) -> Batch:
    batch.old_logprobs = batch.rollout_logprobs.clone()
    return mask_far(batch, SequenceMask())
