"""Alerts: each formula against what docs/alerts.md says of it, written down literally. tests/test_alerts_runs.py has
each in a real run."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from a3po_megatron.config import AlertsOptions, Config, load_config
from a3po_megatron.config.alerts import THRESHOLDS, AlertName
from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.launch.check import settle
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.rollout.tally import repeated_phrases
from a3po_megatron.telemetry.alerts import ALERTS, Alerts, Row, Scale, rise, rows_needed, stretches
from a3po_megatron.telemetry.catalogue import METRICS
from a3po_megatron.telemetry.metrics import read_ends
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT

SCALE = Scale(max_tokens=100, reward=1.0, evaluations=0)
FOUR, LOW_ENTROPY = AlertsOptions(window=4), 0.05


def raised(rows: list[Row], options: AlertsOptions = FOUR, scale: Scale = SCALE) -> list[set[str]]:
    """Per row the alerts that are raised with it."""
    alerts = Alerts(options, scale)
    return [set(alerts.judge(row)) for row in rows]


def rows(**series: list[float | None]) -> list[Row]:
    """Rows of metrics from their values; `__` in a name stands for a slash."""
    return [
        dict(zip([name.replace("__", "/") for name in series], values, strict=True))
        for values in zip(*series.values(), strict=True)
    ]


def mean(values: list[float | None]) -> float:
    known = [value for value in values if value is not None]
    return sum(known) / len(known)


# ----- the registry


def test_every_alert_that_can_be_asked_for_is_there_and_looks_at_metrics_that_are_measured() -> None:
    assert tuple(alert.name for alert in ALERTS) == get_args(AlertName) == tuple(THRESHOLDS)
    assert {metric for alert in ALERTS for metric in alert.metrics} <= set(METRICS)
    assert {f"alert/{alert.name}" for alert in ALERTS} <= set(METRICS)
    assert {name for names in THRESHOLDS.values() for name in names} < set(AlertsOptions.model_fields)


# ----- formulas


@pytest.mark.parametrize(
    ("correct", "expected"),
    [([0.3] * 8, True), ([0.3] * 4 + [0.3, 0.3, 0.4, 0.4], False), ([0.3] * 4 + [0.8] * 4, False)],
    ids=["neither solved nor rising", "rising", "solved"],
)
def test_entropy_collapses_where_it_is_spent_and_the_task_is_neither_solved_nor_being_solved(
    correct: list[float | None], expected: bool
) -> None:
    entropy = [0.5, 0.6, 0.4, 0.5, *[LOW_ENTROPY] * 4]
    found = raised(rows(policy__entropy=entropy, reward__correct_rate=correct))
    assert found[-1] == ({"entropy_collapse"} if expected else set())
    # Until the window holds little enough of the beginning nothing is said: 0.05·3 + 0.5 over 4 is 0.1625.
    assert not any(found[:-1])
    assert LOW_ENTROPY < 0.2 * mean(entropy[:4]) < mean(entropy[3:7])


SERIES = st.lists(st.none() | st.floats(0, 1), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(entropy=SERIES, data=st.data())
def test_entropy_collapse_is_its_formula_at_every_row_with_gaps(entropy: list[float | None], data: Any) -> None:
    correct = data.draw(st.lists(st.none() | st.floats(0, 1), min_size=len(entropy), max_size=len(entropy)))
    found = raised(rows(policy__entropy=entropy, reward__correct_rate=correct))
    for end in range(1, len(entropy) + 1):
        window, began, verdicts = entropy[max(0, end - 4) : end], entropy[:4], correct[max(0, end - 4) : end]
        halves = verdicts[:2], verdicts[2:]
        defined = all(any(v is not None for v in part) for part in (window, began, *halves)) and end >= 4
        expected = (
            defined
            and mean(window) < 0.2 * mean(began)
            and mean(verdicts) < 0.7
            and mean(halves[1]) - mean(halves[0]) <= 0.02
        )
        assert ("entropy_collapse" in found[end - 1]) == expected, end


def test_a_rise_is_of_halves_of_one_size_and_a_middle_row_is_in_neither() -> None:
    assert rise(rows(reward__mean=[0.1, None, 9.0, 0.3, 0.5]), "reward/mean") == pytest.approx(0.4 - 0.1)
    assert rise(rows(reward__mean=[None, None, 9.0, 0.3, 0.5]), "reward/mean") is None


@pytest.mark.parametrize(
    ("name", "metric", "limit", "others"),
    [
        ("mismatch", "mismatch/kl_k3", 0.01, {}),
        ("mismatch", "mismatch/logprob_abs_mean", 0.1, {}),
        ("length_explosion", "rollout/length_mean", 90.0, {"rollout/truncated_rate": 0.1}),
        ("length_explosion", "rollout/truncated_rate", 0.5, {"rollout/length_mean": 20.0}),
        ("no_spread", "rollout/spread_rate", 0.05, {"reward/correct_rate": 0.0}),
    ],
)
@settings(max_examples=30, deadline=None)
@given(shares=st.lists(st.none() | st.floats(0.5, 1.5), min_size=4, max_size=10))
def test_an_alert_of_a_mean_is_raised_beyond_its_threshold_in_a_full_window_and_never_of_nothing(
    name: str, metric: str, limit: float, others: dict[str, float | None], shares: list[float | None]
) -> None:
    values = [None if share is None else share * limit for share in shares]
    found = raised([{metric: value, **others} for value in values])
    for end in range(1, len(values) + 1):
        window = values[max(0, end - 4) : end]
        known = end >= 4 and any(value is not None for value in window)
        beyond = known and (mean(window) < limit if name == "no_spread" else mean(window) > limit)
        if not known or abs(mean(window) / limit - 1) > 1e-9:  # a mean at the very threshold is a matter of rounding
            assert (name in found[end - 1]) == beyond, end


def test_inert_shaping_says_of_which_rollouts() -> None:
    for side, which in (("positive", "correct"), ("negative", "wrong")):
        alerts = Alerts(AlertsOptions(window=2), SCALE)
        found = [alerts.judge({f"shaping/inert_rate_{side}": rate}) for rate in (0.99, None, 0.75, 0.76)]
        assert [set(said) for said in found] == [set(), {"inert_shaping"}, set(), {"inert_shaping"}]
        assert f"of the shaped tokens 99.0% of those of {which} rollouts have" in found[1]["inert_shaping"]


def test_clipping_is_in_every_step_of_the_window() -> None:
    low, high = [0.1, 0.1, 0.1, 0.1, 0.0, 0.1], [0.15, 0.15, 0.15, 0.15, 0.15, None]
    found = raised(rows(policy__clip_low_rate=low, policy__clip_high_rate=high))
    assert found == [set(), set(), set(), {"clipping"}, set(), set()]


HELD_OUT = "eval/held_out_avg"


def hacked(fall: float, gain: float, every: int) -> list[Row]:
    """Twelve steps in which the reward gains so much a step while a benchmark falls so much a step."""
    evaluation = [0.9 - fall * step if step % every == 0 else None for step in range(12)]
    return [{"reward/mean": 0.1 + gain * step, HELD_OUT: evaluation[step]} for step in range(12)]


@pytest.mark.parametrize(
    ("fall", "gain", "expected"), [(0.03, 0.02, True), (0.03, 0.001, False), (0.001, 0.02, False), (-0.03, 0.02, False)]
)
def test_hacking_is_a_reward_that_rises_while_a_benchmark_falls_however_rare_evaluations_are(
    fall: float, gain: float, expected: bool
) -> None:
    # An evaluation in 5 steps: a window of 4 never holds two, the ten rows that are looked at always do.
    scale = Scale(max_tokens=100, reward=1.0, evaluations=5)
    assert rows_needed(FOUR, scale) == (4, 10)
    found = raised(hacked(fall, gain, 5), scale=scale)
    assert ("reward_hacking" in found[-1]) == expected
    # Ten rows: evaluations of steps 5 and 10, the halves 2 to 6 and 7 to 11.
    assert (5 * fall > 0.05 and 5 * gain > 0.02) == expected
    twice = Scale(max_tokens=100, reward=2 * gain * 5 / 0.02, evaluations=5)
    assert "reward_hacking" not in raised(hacked(fall, gain, 5), scale=twice)[-1]  # of a reward worth more it is little


@pytest.mark.parametrize(
    ("metric", "began", "within", "beyond"),
    [
        ("rollout/length_mean", 10.0, 49.0, 51.0),
        ("rollout/length_mean", 10.0, 2.1, 1.9),
        ("rollout/repetition_rate", 0.1, 0.39, 0.41),
    ],
)
def test_hacking_is_a_reward_that_rises_while_lengths_or_repetition_leave_their_band(
    metric: str, began: float, within: float, beyond: float
) -> None:
    for later, gain, expected in ((within, 0.1, False), (beyond, 0.1, True), (beyond, 0.0, False)):
        values = [began] * 4 + [later] * 4
        found = raised([{metric: value, "reward/mean": gain * step} for step, value in enumerate(values)])
        assert ("reward_hacking" in found[-1]) == expected, (later, gain)


@pytest.mark.parametrize("name", get_args(AlertName))
def test_an_alert_whose_thresholds_are_0_is_off_and_no_other(name: str) -> None:
    worst: Row = {
        **{"mismatch/kl_k3": 9.0, "shaping/inert_rate_negative": 1.0, "rollout/spread_rate": 0.0},
        **{"rollout/length_mean": 99.0, "policy/clip_low_rate": 0.5, "policy/clip_high_rate": 0.5},
        **{"policy/entropy": 0.01, "reward/correct_rate": 0.0},
    }
    # Entropy and reward leave their beginnings; the reward rises to the last step.
    story = [worst | {"reward/mean": 0.1 * step} for step in range(8)]
    story[:4] = [row | {"policy/entropy": 1.0, "rollout/length_mean": 9.0} for row in story[:4]]
    assert raised(story)[-1] == set(get_args(AlertName))
    off = AlertsOptions(window=4, **dict.fromkeys(THRESHOLDS[name], 0.0))
    assert raised(story, off)[-1] == set(get_args(AlertName)) - {name}


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 12), window=st.integers(2, 5), every=st.integers(0, 4))
def test_what_is_read_back_of_a_file_judges_as_if_it_had_never_been_put_down(cut: int, window: int, every: int) -> None:
    options, scale = AlertsOptions(window=window, hacking_fall=0.01), Scale(100, 1.0, every)
    story = [
        row | {"policy/entropy": 0.5**step, "reward/correct_rate": 0.2}
        for step, row in enumerate(hacked(0.03, 0.02, every or 20))
    ]
    whole = raised(story, options, scale)
    first, last = rows_needed(options, scale)
    resumed = Alerts(options, scale, story[:cut][:first], story[:cut][-last:])
    assert [set(resumed.judge(row)) for row in story[cut:]] == whole[cut:]
    assert any(whole)


def test_only_the_ends_of_a_file_are_kept_in_memory(tmp_path: Path) -> None:
    assert read_ends(tmp_path, 2, 3) == ([], [])
    RunFolder(tmp_path).metrics.write_text("".join(f'{{"step": {step}}}\n' for step in range(9)))
    beginning, latest = read_ends(tmp_path, 2, 3)
    assert [row["step"] for row in beginning] == [0, 1]
    assert [row["step"] for row in latest] == [6, 7, 8]


@given(st.lists(st.integers(0, 3), max_size=30))
def test_repetition_counts_the_phrases_that_stood_there_before(tokens: list[int]) -> None:
    import numpy as np

    phrases = [tuple(tokens[at : at + 4]) for at in range(len(tokens) - 3)]
    again = sum(phrase in phrases[:at] for at, phrase in enumerate(phrases))
    assert repeated_phrases(np.array(tokens, dtype=np.int64)) == (len(phrases), again)


def test_steps_are_told_by_their_stretches() -> None:
    assert stretches([3, 4, 5, 9, 11, 12]) == "steps 3 to 5, step 9, steps 11 to 12"


# ----- options


def config_of(tmp_path: Path, *changes: str) -> Config:
    with contextlib.chdir(ROOT):
        return load_config(ROOT / "configs/demo.yaml", [*tools.SMALL, *changes])


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            ["alerts.stop=[mismatch, entropi_collapse]"],
            r"alerts\.stop: Input should be .*entropi_collapse",
        ),
        (["alerts.stop=[mismatch]"], r"alerts\.window = 20 is more than trainer\.steps = 6"),
        (["alerts.window=7"], r"alerts\.window = 7 is more than trainer\.steps = 6"),
        (
            ["alerts.hacking_fall=0.1"],
            r"alerts\.hacking_fall = 0\.1 has no effect, because evaluation\.every_steps is 0",
        ),
        (["alerts.inert_rate=0.5", "shaping.name=none", "shaping.decay=null"], "alerts.inert_rate has no effect"),
        (["alerts.hacking_length=0.5"], "greater than 1, or 0 for off"),
    ],
)
def test_an_alert_that_there_is_not_or_that_could_not_come_is_refused_by_name(
    tmp_path: Path, changes: list[str], says: str
) -> None:
    with contextlib.chdir(ROOT), pytest.raises(RequestError, match=says):
        settle(config_of(tmp_path, *changes), CPU)
