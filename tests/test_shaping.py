"""A3PO's token weights against a slow, literal reading of the rule."""

from __future__ import annotations

import math
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


SCHEDULES = {  # what is left of the excess over 1 when a linear schedule has lost so large a share of it
    "linear": lambda share: max(1 - share, 0.0),
    "cosine": lambda share: 0.5 * (1 + math.cos(math.pi * share)) if share < 1 else 0.0,
    "exponential": lambda share: math.exp(-share),
    "constant": lambda share: 1.0,
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("start", "negative"), [(2.0, 5.0), (0.5, 0.2), (1.0, 3.0)])
def test_every_schedule_goes_to_one_from_above_and_from_below(schedule: str, start: float, negative: float) -> None:
    decay = {} if schedule == "constant" else {"decay": 0.01, "origin": 3}
    options = ShapingOptions(rho=start, rho_negative=negative, schedule=schedule, **decay)
    for step in (0, 3, 4, 20, 53, 90, 103, 203, 403, 5000):
        for found, begun in zip(rho(step, options), (start, negative), strict=True):
            share = 0.01 * max(step - 3, 0) / abs(begun - 1) if begun != 1 else 0.0
            assert found == pytest.approx(1 + (begun - 1) * SCHEDULES[schedule](share), abs=1e-12)
    if schedule in ("linear", "cosine"):
        assert rho(403, options) == (1.0, 1.0)  # exactly: nothing is shaped any more


@pytest.mark.parametrize("positives", ["unlikely", "likely"])
@pytest.mark.parametrize("negatives", ["unlikely", "likely"])
@pytest.mark.parametrize("seed", range(5))
def test_either_end_of_either_polarity_can_be_chosen(positives: str, negatives: str, seed: int) -> None:
    draw = random.Random(seed)
    values = [[-draw.choice([0.1, 0.5, 2.0, 3.0]) for _ in range(draw.randint(1, 30))] for _ in range(9)]
    positive = [draw.random() < 0.5 for _ in values]
    options = ShapingOptions(positives=positives, negatives=negatives, rho=5.0, rho_negative=0.2, schedule="constant")
    logprobs, index = laid_out(values)
    found = token_weights(logprobs, index, torch.tensor(positive), 77, options).tolist()
    wanted = []
    for row, is_positive in zip(values, positive, strict=True):
        lowest = (positives if is_positive else negatives) == "unlikely"
        order = sorted(range(len(row)), key=lambda place: (row[place] if lowest else -row[place], place))
        chosen = order[: max(1, int(0.2 * len(row)))]
        wanted += [(5.0 if is_positive else 0.2) if place in chosen else 1.0 for place in range(len(row))]
    assert found == pytest.approx(wanted)
