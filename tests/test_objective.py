"""The clipped objective, token by token, in plain arithmetic."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from a3po_megatron.algorithm.correction import sampler_correction
from a3po_megatron.algorithm.kl import kl_k3
from a3po_megatron.algorithm.objectives.clipped import surrogate
from a3po_megatron.config import ClippedOptions, NoCorrection, TisOptions


def test_value_and_gradient_equal_the_formula_on_every_branch() -> None:
    cases = list(itertools.product([0.3, 0.79, 0.9, 1.0, 1.2, 1.3, 2.9, 3.5], [-1.5, -0.5, 0.0, 0.5, 2.0]))
    ratio = torch.tensor([r for r, _ in cases], dtype=torch.float64)
    advantage = torch.tensor([a for _, a in cases], dtype=torch.float64)
    old = torch.full_like(ratio, -1.0)
    logprobs = (old + ratio.log()).requires_grad_()
    found = surrogate(logprobs, old, advantage, ClippedOptions())
    found.values.sum().backward()
    for i, (r, a) in enumerate(cases):
        inside = min(r * a, min(max(r, 0.8), 1.28) * a)
        objective = max(inside, 3 * a) if a < 0 else inside
        assert found.values[i].item() == pytest.approx(objective, abs=1e-12)
        flat = (a > 0 and r > 1.28) or (a < 0 and (r < 0.8 or r > 3)) or a == 0
        assert logprobs.grad[i].item() == pytest.approx(0.0 if flat else r * a, abs=1e-12)
        assert bool(found.clipped_low[i]) == (a < 0 and r < 0.8)
        assert bool(found.clipped_high[i]) == (a > 0 and r > 1.28)


def test_without_dual_clip_the_loss_of_wrong_rollouts_is_unbounded() -> None:
    logprobs, old = torch.tensor([3.0]), torch.tensor([0.0])
    found = surrogate(logprobs, old, torch.tensor([-1.0]), ClippedOptions(dual_clip=0))
    assert found.values.item() == pytest.approx(-math.exp(3), rel=1e-6)


def test_the_samplers_correction_is_truncated_importance_sampling_and_can_be_off() -> None:
    old, rollout = torch.tensor([-1.0, -1.0, -1.0]), torch.tensor([-1.0, -0.5, -4.0])
    assert sampler_correction(old, rollout, TisOptions()).tolist() == pytest.approx([1, math.exp(-0.5), 2])
    assert sampler_correction(old, rollout, NoCorrection()).tolist() == [1, 1, 1]


def test_k3_is_zero_at_equality_and_keeps_its_digits_near_it() -> None:
    small = torch.tensor([0.0, 1e-4], dtype=torch.float64)
    assert kl_k3(small).tolist() == pytest.approx([0.0, 0.5e-8], rel=1e-4)
