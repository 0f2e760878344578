"""The seam between learner and objective: an objective is one file, whatever it sums over and is divided by."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from a3po_megatron.algorithm.sums import Kind, Max, Report, Sum
from a3po_megatron.algorithm.token_loss import TokenBatch, known, normaliser_count
from tests.distributed import cases_objective as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint

CPU = torch.device("cpu")


def test_a_sequence_level_objective_has_the_gradient_of_its_formula_under_every_layout_and_normaliser(
    tmp_path: Path,
) -> None:
    make_checkpoint(tmp_path / "qwen3", "qwen3")
    for found in run_ranks(2, cases.by_sequence, folder=tmp_path)["by_sequence"]:
        assert len(found) == len(cases.CELLS) * len(cases.NORMALISERS)
        for name, apart in found.items():
            # float32 against float64: as of the token-level objective (tests/test_learner.py)
            assert apart["gradient"] < 2e-4, (name, apart)
            assert apart["loss"] < 1e-5, (name, apart)
            assert apart["high"] == 0, (name, apart)
            assert apart["largest"] < 1e-5, (name, apart)


def token_batch(rollout: list[int], begins: list[bool]) -> TokenBatch:
    values = torch.arange(float(len(rollout)), requires_grad=True)
    zeros = torch.zeros(len(rollout))
    return TokenBatch(values, zeros, zeros, zeros, zeros, torch.tensor(rollout), torch.tensor(begins), 4, 0)


def test_a_rollout_counts_once_where_it_begins_and_every_token_by_itself() -> None:
    batch = token_batch([0, 0, 2, 2, 2, 3], [True, False, False, False, False, True])  # 2 began on another rank
    assert batch.sequence_sum(batch.logprobs).tolist() == [1.0, 0.0, 9.0, 5.0]
    for normaliser, count in (("tokens", 6), ("sequences", 2), ("constant", 2 * cases.CONSTANT)):
        assert normaliser_count(cases.SequenceRatio(normaliser), batch) == count  # type: ignore[arg-type]


class Declares:
    normaliser, constant = "tokens", 1

    def __init__(self, metrics: Mapping[str, Kind]) -> None:
        self.metrics = metrics


def test_a_metric_that_is_not_in_the_catalogue_is_refused_before_anything_is_trained() -> None:
    objective: Any = Declares({"learner/loss": Sum, "policy/clip_rate": Sum})
    with pytest.raises(KeyError, match="policy/clip_rate"):
        known(objective)


@pytest.mark.parametrize(
    "found",
    [
        {"a": Sum(1.0, 2)},
        {"a": Sum(1.0, 2), "b": Max(1.0), "c": Max(1.0)},
        {"a": Max(1.0), "b": Max(1.0)},
    ],
)
def test_what_is_reported_must_be_what_was_declared(found: dict[str, Sum | Max]) -> None:
    with pytest.raises(ValueError, match="declares"):
        Report({"a": Sum, "b": Max}).vector(found, CPU)


def test_sums_are_quotients_of_sums_and_maxima_keep_a_nan() -> None:
    report = Report({"mean": Sum, "largest": Max, "empty": Sum})
    parts = [(3.0, 2, 1.0), (5.0, 6, math.nan), (0.0, 0, 2.0)]
    for numerator, denominator, largest in parts:
        report.sums += report.vector(
            {"mean": Sum(numerator, denominator), "largest": Max(largest), "empty": Sum(0.0, 0)}, CPU
        )
    assert report.metrics() == {"mean": 1.0, "empty": None, "largest": None}
    assert math.isnan(report.largest[0])
