"""Group advantages against numpy, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.advantage import assemble, group_advantages
from a3po_megatron.batch import Collected, Verdict
from a3po_megatron.config import AdvantageOptions
from tests.harness.tiny_models import make_collected


def advantages(
    rewards: list[float], groups: list[int], valid: list[bool] | None = None, **options: object
) -> list[float]:
    keep = torch.tensor(valid or [True] * len(rewards))
    reward = torch.tensor(rewards)
    found = group_advantages(reward, torch.tensor(groups), reward > 0, keep, AdvantageOptions(**options))
    assert found.dtype == torch.float32
    return found.tolist()


@pytest.mark.parametrize("ddof", [0, 1])
def test_advantages_are_the_group_normalised_rewards(ddof: int) -> None:
    draw = np.random.default_rng(0)
    groups = np.sort(draw.integers(0, 6, 40))
    rewards = draw.normal(size=40).astype(np.float32)
    found = advantages(rewards.tolist(), groups.tolist(), ddof=ddof)
    for group in np.unique(groups):
        members = rewards[groups == group].astype(np.float64)
        if len(members) > 1:
            wanted = (members - members.mean()) / (members.std(ddof=ddof) + 1e-6)
            np.testing.assert_allclose(np.array(found)[groups == group], wanted, rtol=1e-6)


def test_equal_rewards_give_exactly_zero() -> None:
    assert advantages([0.1] * 7 + [0.3] * 3, [0] * 7 + [1] * 3) == [0.0] * 10


def test_invalid_rollouts_leave_their_group_and_a_group_of_one_is_zero() -> None:
    found = advantages([1.0, 0.0, 9.0, 1.0, 5.0], [0, 0, 0, 1, 1], [True, True, False, True, False])
    assert found[:2] == advantages([1.0, 0.0], [0, 0])
    assert found[2:] == [0.0, 0.0, 0.0]


def test_polarity_scales_and_no_std() -> None:
    plain = advantages([1.0, 0.0, 0.0], [0, 0, 0], normalise_std=False)
    assert plain == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    scaled = advantages([1.0, 0.0, 0.0], [0, 0, 0], normalise_std=False, positive_scale=0.5, negative_scale=2.0)
    assert scaled == pytest.approx([1 / 3, -2 / 3, -2 / 3])


def test_mini_batches_follow_the_global_prompt_order_whatever_the_number_of_replicas() -> None:
    collected = make_collected(groups=7, size=3)
    whole = assemble(collected, AdvantageOptions(), 3)
    where = {r.name: int(m) for r, m in zip(whole.rollouts, whole.mini_batch, strict=True)}
    assert sorted(set(where.values())) == [0, 1, 2]
    for replica in range(2):
        part = assemble(Collected(collected.groups[replica::2], [], collected.accepted, {}), AdvantageOptions(), 3)
        assert all(where[r.name] == m for r, m in zip(part.rollouts, part.mini_batch.tolist(), strict=True))


def test_a_rollout_whose_grading_failed_neither_trains_nor_counts() -> None:
    collected = make_collected(groups=2, size=4)
    collected.groups[0].rollouts[2].verdict = Verdict("invalid", "killed")
    batch = assemble(collected, AdvantageOptions(), 1)
    assert len(batch.rollouts) == 7
    assert batch.rollout_index.numel() == sum(len(r.tokens) for r in batch.rollouts)
