"""A3PO's token weights against a slow, literal reading of the rule."""

from __future__ import annotations

import random

import pytest
import torch

from a3po_megatron.algorithm.shaping import rho, token_weights
from a3po_megatron.config import ShapingOptions
from tests.harness.tiny_models import literal_token_weights


def laid_out(values: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    index = [row for row, row_values in enumerate(values) for _ in row_values]
    return torch.tensor([v for row in values for v in row]), torch.tensor(index, dtype=torch.int64)


@pytest.mark.parametrize("seed", range(30))
def test_weights_equal_the_literal_rule_for_random_tied_and_very_short_rollouts(seed: int) -> None:
    draw = random.Random(seed)
    lengths = [draw.choice([0, 1, 4, 5, 6, 9, 10, 37, 100]) for _ in range(12)]
    # Few distinct values make ties; 0.0 is a token of probability 1.
    pool = [0.0, 0.0, -1e-9, -0.5, -0.5, -2.0, -30.0] if seed % 2 else [-draw.expovariate(1) for _ in range(50)]
    values = [[torch.tensor(draw.choice(pool)).item() for _ in range(n)] for n in lengths]
    positive = [draw.random() < 0.5 for _ in lengths]
    step, options = draw.choice([0, 7, 199, 200, 5000]), ShapingOptions(fraction=draw.choice([0.2, 0.05, 0.5, 1.0]))
    logprobs, index = laid_out(values)
    found = token_weights(logprobs, index, torch.tensor(positive), step, options)
    wanted = literal_token_weights(values, positive, step, options.fraction, options.rho, options.decay)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert torch.equal(found, torch.tensor([w for row in wanted for w in row], dtype=torch.float32))


def test_ties_go_to_the_earlier_token_for_both_polarities() -> None:
    logprobs, index = laid_out([[0.0] * 10, [0.0] * 10])
    found = token_weights(logprobs, index, torch.tensor([True, False]), 0, ShapingOptions())
    assert found.view(2, 10).tolist() == [[2.0, 2.0, *[1.0] * 8]] * 2


def test_once_rho_is_one_the_weights_are_bitwise_one() -> None:
    logprobs, index = laid_out([[-0.1, -3.0, -0.2]] * 3)
    for step in (200, 201, 10**6):
        found = token_weights(logprobs, index, torch.tensor([True, False, True]), step, ShapingOptions())
        assert torch.equal(found, torch.ones(9))
    assert rho(199, ShapingOptions())[0] > 1


def test_the_weights_of_negatives_can_differ_and_each_falls_to_one_on_its_own() -> None:
    options = ShapingOptions(rho=1.5, rho_negative=3.0, decay=0.5, origin=2)
    assert [rho(step, options) for step in (0, 2, 3, 4, 6)] == [
        (1.5, 3.0),
        (1.5, 3.0),
        (1.0, 2.5),
        (1.0, 2.0),
        (1.0, 1.0),
    ]


def test_another_metric_ranks_and_no_gradient_flows() -> None:
    logprobs, index = laid_out([[-0.1, -0.2, -0.3, -0.4, -0.5]])
    metric = torch.tensor([5.0, 4.0, 1.0, 2.0, 3.0], requires_grad=True)
    found = token_weights(logprobs.requires_grad_(), index, torch.tensor([True]), 0, ShapingOptions(), metric=metric)
    assert found.tolist() == [1, 1, 2, 1, 1]
    assert not found.requires_grad


def test_permuting_rollouts_permutes_weights() -> None:
    values = [[-float(i + j) % 3 for i in range(5 + j)] for j in range(6)]
    positive = [True, False, True, False, False, True]
    order = [3, 0, 5, 1, 4, 2]
    straight = token_weights(*laid_out(values), torch.tensor(positive), 3, ShapingOptions())
    rows = straight.split([len(v) for v in values])
    shuffled = token_weights(
        *laid_out([values[i] for i in order]), torch.tensor([positive[i] for i in order]), 3, ShapingOptions()
    )
    assert torch.equal(shuffled, torch.cat([rows[i] for i in order]))


def test_nan_is_refused() -> None:
    logprobs, index = laid_out([[-0.1, float("nan")]])
    with pytest.raises(ValueError, match="NaN"):
        token_weights(logprobs, index, torch.tensor([True]), 0, ShapingOptions())


def test_ties_zeros_of_both_signs_and_infinities_are_ranked_as_the_rule_says() -> None:
    values = [0.0, -0.0, -1e-8, -1e-40, -0.5, -3.0, -700.0, float("-inf")]
    for seed in range(200):
        draw = random.Random(seed)
        rollouts = [draw.choices(values, k=draw.randint(1, 30)) for _ in range(6)]
        positive = [draw.random() < 0.5 for _ in rollouts]
        index = torch.repeat_interleave(torch.arange(6), torch.tensor([len(rollout) for rollout in rollouts]))
        flat = torch.tensor([value for rollout in rollouts for value in rollout])
        found = token_weights(flat, index, torch.tensor(positive), 3, ShapingOptions())
        literal = literal_token_weights(rollouts, positive, 3, 0.2, 2.0, 0.005)
        wanted = torch.tensor([weight for rollout in literal for weight in rollout])
        assert torch.allclose(found, wanted, rtol=1e-6), (rollouts, positive)
