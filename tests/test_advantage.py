"""Group advantages against numpy, group by group."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from a3po_megatron.algorithm.advantage import assemble, group_advantages
from a3po_megatron.batch import Collected, Verdict
from a3po_megatron.config import Advantage, AdvantageOptions, LeaveOneOut, MaxRl, Signed
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


def literal(rewards: list[float], positive: list[bool], valid: list[bool], options: Advantage) -> list[float]:
    """The advantages of one group, member by member, as the papers write them."""
    members = [reward for reward, is_valid in zip(rewards, valid, strict=True) if is_valid]
    made = []
    for number, (reward, is_correct, is_valid) in enumerate(zip(rewards, positive, valid, strict=True)):
        others = [rewards[n] for n in range(len(rewards)) if valid[n] and n != number]
        if not is_valid:
            value = 0.0
        elif isinstance(options, Signed):
            value = 1.0 if is_correct else -1.0
        elif len(members) < 2:
            value = 0.0
        elif isinstance(options, LeaveOneOut):
            value = reward - sum(others) / len(others)
        else:
            mean = sum(members) / len(members)
            value = (reward - mean) / (mean + 1e-6) if mean > 0 else 0.0
        made.append(value * (options.positive_scale if is_correct else options.negative_scale))
    return made


@pytest.mark.parametrize(
    "options", [LeaveOneOut(), MaxRl(), Signed(), MaxRl(positive_scale=0.5), Signed(positive_scale=0.1)]
)
@pytest.mark.parametrize("seed", range(20))
def test_every_estimator_is_the_papers_formula(options: Advantage, seed: int) -> None:
    draw = np.random.default_rng(seed)
    groups = np.sort(draw.integers(0, 7, 40))
    positive, valid = draw.random(40) < draw.random(), draw.random(40) < 0.8
    rewards = positive.astype(np.float32)
    found = group_advantages(*map(torch.from_numpy, (rewards, groups, positive, valid)), options)
    wanted: list[float] = []
    for group in np.unique(groups):
        of = groups == group
        wanted += literal(rewards[of].tolist(), positive[of].tolist(), valid[of].tolist(), options)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6, atol=0)  # atol 0: what is 0 is exactly so


def test_leave_one_out_is_the_mean_form_times_g_over_g_less_one() -> None:
    """As the paper on RLOO has it, too."""
    rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])
    index, whole = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    plain = group_advantages(rewards, index, rewards > 0, whole, AdvantageOptions(normalise_std=False))
    assert torch.equal(group_advantages(rewards, index, rewards > 0, whole, LeaveOneOut()), plain * 4 / 3)


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
