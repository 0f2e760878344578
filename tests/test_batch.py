"""A rollout's segments say of every token who sampled it, and whether it is trained on."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.algorithm.statistics import batch_metrics, batch_sums
from a3po_megatron.batch import Batch, Collected, Prompt, Rollout, Segment
from a3po_megatron.config import AdvantageOptions, ShapingOptions
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.telemetry.rollouts import rollout_table, write_rollouts
from tests.harness.tiny_models import literal_token_weights, make_collected, trained_places, with_tools

SEGMENTS = st.lists(st.builds(Segment, st.integers(1, 9), st.integers(0, 3), st.booleans()), min_size=1, max_size=6)


def made(tokens: int, segments: tuple[Segment, ...]) -> Rollout:
    values = np.zeros(tokens, np.float32)
    return Rollout(Prompt("p/7", "", ""), 2, 0, 0, values.astype(np.int64), values, "stop", "", segments)


@given(SEGMENTS)
def test_segments_that_cover_the_response_say_of_every_token_whether_it_is_trained_on(segments: list[Segment]) -> None:
    flags = [segment.trained for segment in segments for _ in range(segment.length)]
    rollout = made(len(flags), tuple(segments))
    assert rollout.trained().tolist() == flags
    assert rollout.trained().dtype == bool
    assert rollout.untrained == flags.count(False)
    assert [rollout.sampled_by(v) for v in range(4)] == [{s.weight_version for s in segments} == {v} for v in range(4)]


@given(SEGMENTS, st.integers(-60, 60))
def test_segments_that_do_not_are_refused_with_the_rollouts_name(segments: list[Segment], apart: int) -> None:
    tokens = sum(segment.length for segment in segments) + apart
    if apart == 0 or tokens < 0:
        return
    with pytest.raises(ValueError, match="p/7#2"):
        made(tokens, tuple(segments))


def test_a_segment_has_tokens_and_an_empty_response_one_segment_of_none() -> None:
    assert made(0, (Segment(0, 1),)).trained().tolist() == []
    for tokens, segments in (
        (0, ()),
        (2, (Segment(2, 1), Segment(0, 1))),
        (2, (Segment(3, 1), Segment(-1, 1))),
        (0, (Segment(1, 1), Segment(-1, 1))),
    ):
        with pytest.raises(ValueError, match="p/7#2"):
            made(tokens, segments)


# --- what is not trained on takes no part ---------------------------------------------------------------------------


def scored(collected: Collected, metric: str = "probability") -> Batch:
    """Of a step 20: scored by no model, with numbers that differ from token to token, whichever tokens there are."""
    batch = assemble(collected, AdvantageOptions(), 1)
    batch.old_logprobs = batch.rollout_logprobs * 1.25
    batch.entropy = (batch.rollout_logprobs * 7).sin() + 1
    if batch.trained is not None:  # as the learner leaves them, which must not matter
        batch.old_logprobs[~batch.trained] = batch.entropy[~batch.trained] = 0.0
    return shape(batch, 20, ShapingOptions.model_validate({"metric": metric}))


def without_tools(collected: Collected) -> Collected:
    """The same with what tools wrote cut out."""
    for rollout in (r for group in collected.groups for r in group.rollouts):
        places = trained_places(rollout)
        rollout.tokens, rollout.logprobs = rollout.tokens[places], rollout.logprobs[places]
        rollout.segments = (Segment(len(places), 1),)
    return collected


@pytest.mark.parametrize("metric", ["probability", "entropy"])
def test_shaping_ranks_and_counts_trained_tokens_alone(metric: str) -> None:
    batch = scored(with_tools(make_collected(groups=6, size=4)), metric)
    assert batch.trained is not None and batch.old_logprobs is not None
    assert batch.token_weights is not None and batch.entropy is not None
    ranked = (-batch.entropy if metric == "entropy" else batch.old_logprobs).split(batch.lengths.tolist())
    values = [[float(v[t]) for t in trained_places(r)] for v, r in zip(ranked, batch.rollouts, strict=True)]
    wanted = literal_token_weights(values, batch.positive.tolist(), 20, 0.2, 2.0, 0.005)
    assert batch.token_weights[batch.trained].tolist() == pytest.approx(list(itertools.chain(*wanted)))
    assert not batch.token_weights[~batch.trained].any()


def test_the_sums_over_a_batch_are_those_of_one_without_the_tokens_that_are_not_trained_on() -> None:
    batch = scored(with_tools(make_collected(groups=6, size=4)))
    assert batch.trained is not None and int((~batch.trained).sum()) > 20
    cut = scored(without_tools(with_tools(make_collected(groups=6, size=4))))
    assert cut.trained is None
    assert torch.equal(batch_sums(batch, 1), batch_sums(cut, 1))


def test_what_is_written_of_tokens_that_were_not_trained_on_is_null_and_segments_are_there(tmp_path: Path) -> None:
    collected = with_tools(make_collected(groups=3, size=4))
    batch = scored(collected)
    table = rollout_table(20, collected.groups, set(collected.accepted), batch, 3, lambda tokens: [""] * len(tokens))
    write_rollouts(path := tmp_path / "rollouts.parquet", table)
    records = list(read_rollouts(path))
    assert len(records) == len(batch.rollouts)
    for record, rollout in zip(records, batch.rollouts, strict=True):
        assert [tuple(segment) for segment in record["segments"]] == list(rollout.segments)
        for key in ("old_logprobs", "entropy", "weights"):
            assert [i for i, value in enumerate(record[key]) if value is not None] == trained_places(rollout), key
        assert None not in record["logprobs"]


def test_the_mismatch_of_engines_is_over_the_segments_that_the_current_weights_sampled() -> None:
    batch = scored(make_collected(groups=6, size=4))
    assert batch.old_logprobs is not None
    differences = []
    for one, values in zip(
        batch.rollouts, (batch.old_logprobs - batch.rollout_logprobs).split(batch.lengths.tolist()), strict=True
    ):
        half = len(one.tokens) // 2
        parts = (Segment(half, 1), Segment(len(one.tokens) - half, 2))
        one.segments = tuple(part for part in parts if part.length)
        differences += values[half:].abs().tolist()
    found = batch_metrics(batch_sums(batch, 2), batch.rho)["mismatch/logprob_abs_mean"]
    assert found == pytest.approx(sum(differences) / len(differences))
