"""Alerts: signatures of a run that fails, each a formula over the metrics of a window of steps.

    beginning   the first `window` rows of metrics.jsonl        window   its last `window` rows, this step's with them
    mean(m)     of the values of m in the window that are defined
    rise(m)     mean(m) over the later half of the rows - mean(m) over the earlier half

An alert is judged once there are `window` rows; where an input is undefined it is not raised. Nothing but rows goes in,
so that a run that resumes judges as an undisturbed one does. Pure functions; what a raised alert leads to is said in
run/recorder.py (the columns `alert/NAME`, a line) and run/checkpoints.py (`alerts.stop`).

docs/alerts.md has the table for people.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the catalogue names the alerts, and is imported before anything that takes long
    from ..config import AlertsOptions, Settings

Row = Mapping[str, float | None]  # of metrics.jsonl; a metric that is not there counts as undefined
ALERT = "alert/"  # before an alert's name: its column
# What counts as rising from one half of a window to the other, as a share of what a correct response is worth: twice
# the standard error of the difference between two halves of ten steps with some thousand rollouts each.
RISE = 0.02


@dataclass(frozen=True)
class Scale:
    """What a run's numbers are held against."""

    max_tokens: int  # rollout.max_tokens
    reward: float  # of a correct response over a wrong one
    evaluations: int  # steps between two evaluations; 0: there are none

    @classmethod
    def of(cls, settings: Settings) -> Scale:
        """Returns that of a run's settings."""
        reward, evaluation = settings.reward, settings.evaluation
        return cls(settings.rollout.max_tokens, reward.correct - reward.wrong, evaluation.every_steps)


@dataclass(frozen=True)
class Seen:
    """What an alert is judged by."""

    options: AlertsOptions
    scale: Scale
    beginning: Sequence[Row]
    window: Sequence[Row]
    evaluated: Sequence[Row]  # as many as it takes to hold an evaluation in either half; at least the window

    def mean(self, metric: str) -> float | None:
        return mean(self.window, metric)

    def began(self, metric: str) -> float | None:
        return mean(self.beginning, metric)


def mean(rows: Iterable[Row], metric: str) -> float | None:
    """Returns the mean of a metric's defined values; None where there is none."""
    values = [value for row in rows if (value := row.get(metric)) is not None]
    return statistics.fmean(values) if values else None


def rise(rows: Sequence[Row], metric: str) -> float | None:
    """Returns by how much a metric's mean is higher in the later half of the rows (a middle one counts in neither)."""
    half = len(rows) // 2
    earlier, later = mean(rows[:half], metric), mean(rows[len(rows) - half :], metric)
    return None if earlier is None or later is None else later - earlier


@dataclass(frozen=True)
class Alert:
    """A formula, and what people are told of it."""

    name: str
    meaning: str
    metrics: tuple[str, ...]  # whose charts show where it begins
    judge: Callable[[Seen], str | None]  # the numbers and the threshold, in words, where it is raised
    advice: str


def _entropy_collapse(seen: Seen) -> str | None:
    """mean(entropy) < entropy_share · beginning's, mean(correct rate) < entropy_correct, rise(correct rate) <= RISE.

    Entropy falls in every run, and is low where a task is solved or is just being solved: it has collapsed where it was
    spent and bought no further correct answers (arXiv 2505.22617: what is reached saturates as entropy runs out).
    """
    options = seen.options
    entropy, began = seen.mean("policy/entropy"), seen.began("policy/entropy")
    correct, rises = seen.mean("reward/correct_rate"), rise(seen.window, "reward/correct_rate")
    if entropy is None or began is None or correct is None or rises is None:
        return None
    if entropy >= options.entropy_share * began or correct >= options.entropy_correct or rises > RISE:
        return None
    return (
        f"mean entropy is {entropy:.3g} nats, below {options.entropy_share:g} (alerts.entropy_share) of the "
        f"{began:.3g} that the run began with, while {correct:.0%} of the responses are correct (below "
        f"{options.entropy_correct:g}, alerts.entropy_correct) and that rises no more"
    )


def _reward_hacking(seen: Seen) -> str | None:
    """rise(reward) > RISE · (correct - wrong), and one of: rise(a benchmark's avg) < -hacking_fall, over as many rows
    as hold two evaluations; mean(length) / beginning's outside [1 / hacking_length, hacking_length]; mean(repetition) -
    beginning's > hacking_repetition."""
    return _falls_on_a_benchmark(seen) or _leaves_its_band(seen)


def _rewards_rise(seen: Seen, rows: Sequence[Row]) -> float | None:
    """Returns by how much the training reward rises; None: it does not."""
    rises = rise(rows, "reward/mean")
    return rises if rises is not None and rises > RISE * seen.scale.reward else None


def _falls_on_a_benchmark(seen: Seen) -> str | None:
    limit, rises = seen.options.hacking_fall, _rewards_rise(seen, seen.evaluated)
    if not limit or rises is None:
        return None
    columns = sorted({name for row in seen.evaluated for name in row if _is_of_a_benchmark(name)})
    falls = {name: -change for name in columns if (change := rise(seen.evaluated, name)) is not None}
    name = max(falls, key=falls.__getitem__, default="")
    if not name or falls[name] <= limit:
        return None
    return (
        f"over {len(seen.evaluated)} steps the training reward rises by {rises:.3g} while {name} falls by "
        f"{falls[name]:.3g}, more than {limit:g} (alerts.hacking_fall)"
    )


def _is_of_a_benchmark(name: str) -> bool:
    return name.startswith("eval/") and name.endswith("_avg")


def _leaves_its_band(seen: Seen) -> str | None:
    options, rises = seen.options, _rewards_rise(seen, seen.window)
    if rises is None:
        return None
    length, first = seen.mean("rollout/length_mean"), seen.began("rollout/length_mean")
    if options.hacking_length and length and first:
        times = max(length / first, first / length)
        if times > options.hacking_length:
            return (
                f"the training reward rises by {rises:.3g} while responses have {length:.0f} tokens on average, "
                f"{times:.3g} times {'more' if length > first else 'fewer'} than at the beginning (alerts."
                f"hacking_length {options.hacking_length:g})"
            )
    repetition, usual = seen.mean("rollout/repetition_rate"), seen.began("rollout/repetition_rate")
    if not options.hacking_repetition or repetition is None or usual is None:
        return None
    if repetition - usual <= options.hacking_repetition:
        return None
    return (
        f"the training reward rises by {rises:.3g} while {repetition:.0%} of what responses say stood in them before, "
        f"which was {usual:.0%} at the beginning (alerts.hacking_repetition {options.hacking_repetition:g})"
    )


def _mismatch(seen: Seen) -> str | None:
    """mean(k3) > mismatch_kl or mean(|engine - learner|) > mismatch_logprob."""
    options = seen.options
    limits = (
        ("mismatch/kl_k3", options.mismatch_kl, "alerts.mismatch_kl"),
        ("mismatch/logprob_abs_mean", options.mismatch_logprob, "alerts.mismatch_logprob"),
    )
    return " and ".join(filter(None, (_above(seen, *limit) for limit in limits))) or None


def _above(seen: Seen, metric: str, limit: float, option: str) -> str:
    """Says that a metric's mean is above a limit; empty where it is not, or the limit is off."""
    value = seen.mean(metric)
    return (
        f"{metric} is {value:.3g}, above {limit:g} ({option})" if limit and value is not None and value > limit else ""
    )


def _inert_shaping(seen: Seen) -> str | None:
    """mean(inert rate) > inert_rate, of correct rollouts or of wrong ones."""
    limit, sides = seen.options.inert_rate, {"positive": "correct", "negative": "wrong"}
    rates = {which: seen.mean(f"shaping/inert_rate_{side}") for side, which in sides.items()}
    inert = [f"{rate:.1%} of those of {which} rollouts" for which, rate in rates.items() if rate and rate > limit]
    if not limit or not inert:
        return None
    return f"of the shaped tokens {' and '.join(inert)} have 1 - p < 1e-4, more than {limit:g} (alerts.inert_rate)"


def _no_spread(seen: Seen) -> str | None:
    """mean(share of sampled groups with mixed verdicts) < spread_rate."""
    limit, rate, correct = seen.options.spread_rate, seen.mean("rollout/spread_rate"), seen.mean("reward/correct_rate")
    if rate is None or rate >= limit:
        return None
    solved = "" if correct is None else f"; {correct:.0%} of the responses are correct"
    return f"{rate:.1%} of the sampled groups have mixed verdicts, below {limit:g} (alerts.spread_rate){solved}"


def _length_explosion(seen: Seen) -> str | None:
    """mean(length) / rollout.max_tokens > length_share or mean(truncated rate) > truncated_rate."""
    options, longest = seen.options, seen.scale.max_tokens
    length, cut = seen.mean("rollout/length_mean"), seen.mean("rollout/truncated_rate")
    reasons = []
    if options.length_share and length is not None and length / longest > options.length_share:
        reasons.append(
            f"responses have {length:.0f} tokens on average, {length / longest:.2g} of rollout.max_tokens {longest}, "
            f"above {options.length_share:g} (alerts.length_share)"
        )
    if options.truncated_rate and cut is not None and cut > options.truncated_rate:
        reasons.append(
            f"{cut:.0%} of the responses are cut off, above {options.truncated_rate:g} (alerts.truncated_rate)"
        )
    return " and ".join(reasons) or None


def _clipping(seen: Seen) -> str | None:
    """clip_low_rate + clip_high_rate > clip_rate in every step of the window."""
    limit, sides = seen.options.clip_rate, ("policy/clip_low_rate", "policy/clip_high_rate")
    rates = [[row.get(side) for side in sides] for row in seen.window]
    sums = [low + high for low, high in rates if low is not None and high is not None]
    if not limit or len(sums) < len(seen.window) or min(sums) <= limit:
        return None
    return f"at least {min(sums):.0%} of the tokens are clipped in every step, more than {limit:g} (alerts.clip_rate)"


ALERTS = (
    Alert(
        "entropy_collapse",
        "entropy is spent while the task is not solved",
        ("policy/entropy",),
        _entropy_collapse,
        "look at the share of groups with spread and the clipped tokens; lower optimizer.lr, raise objective.clip_high "
        "or shaping.rho",
    ),
    Alert(
        "reward_hacking",
        "the reward rises while held-out answers get worse, or responses turn odd",
        ("reward/mean", "rollout/length_mean"),
        _reward_hacking,
        "read rollouts with a high reward in a3po report, and let the grader judge them whole",
    ),
    Alert(
        "mismatch",
        "engine and learner disagree on the tokens that the engine sampled",
        ("mismatch/kl_k3", "mismatch/logprob_abs_mean"),
        _mismatch,
        "look at rollout.quantization, rollout.top_p and top_k, and model.dtype; correction.name bounds what it does "
        "to the gradient",
    ),
    Alert(
        "inert_shaping",
        "nearly all shaped tokens of a side have no gradient to scale",
        ("shaping/inert_rate_positive", "shaping/inert_rate_negative"),
        _inert_shaping,
        "weighting them changes next to nothing on this task: expected where many tokens are forced (docs/method.md)",
    ),
    Alert(
        "no_spread",
        "nearly no sampled group has mixed verdicts",
        ("rollout/kept_groups", "reward/correct_rate"),
        _no_spread,
        "there is hardly anything to learn from: the task is too hard or too easy for this model, or no answer is "
        "recognised",
    ),
    Alert(
        "length_explosion",
        "responses run into the length limit",
        ("rollout/length_mean", "rollout/truncated_rate"),
        _length_explosion,
        "look whether cut off responses would have become correct: then raise rollout.max_tokens; else set "
        "reward.overlong_tokens",
    ),
    Alert(
        "clipping",
        "many tokens are clipped, step after step",
        ("policy/clip_low_rate", "policy/clip_high_rate"),
        _clipping,
        "the policy moves too far in one step: lower optimizer.lr or trainer.mini_batches",
    ),
)


class Alerts:
    """Judges the rows of a run, one after the other."""

    def __init__(
        self, options: AlertsOptions, scale: Scale, beginning: Sequence[Row] = (), latest: Sequence[Row] = ()
    ) -> None:
        """`beginning`, `latest`: the run's first and last rows, at least as many of each as `rows_needed` says, or all
        that there are."""
        self._options, self._scale = options, scale
        first, last = rows_needed(options, scale)
        self._beginning = list(beginning[:first])
        self._latest = deque(latest, maxlen=last)

    def judge(self, row: Row) -> dict[str, str]:
        """Takes note of the next row; returns the alerts that are raised, each with its numbers and what to look at."""
        window = self._options.window
        self._latest.append(row)
        if len(self._beginning) < window:
            self._beginning.append(row)
        rows = list(self._latest)
        if len(rows) < window:
            return {}
        seen = Seen(self._options, self._scale, self._beginning, rows[-window:], rows)
        on = (alert for alert in ALERTS if self._options.is_on(alert.name))
        return {alert.name: f"{words}: {alert.advice}" for alert in on if (words := alert.judge(seen))}


def rows_needed(options: AlertsOptions, scale: Scale) -> tuple[int, int]:
    """Returns how many of a run's first and of its last rows its alerts follow from.

    Of any two stretches of `evaluations` steps in a row each holds one evaluation.
    """
    return options.window, max(options.window, 2 * scale.evaluations)


def columns(raised: Iterable[str]) -> dict[str, int]:
    """Returns the columns of a row of which these alerts were raised: 0 or 1."""
    names = set(raised)
    return {f"{ALERT}{alert.name}": int(alert.name in names) for alert in ALERTS}


def stretches(steps: Sequence[int]) -> str:
    """Says ascending steps by their beginnings and ends: "steps 19 to 60, step 70"."""
    known = set(steps)
    begins = [step for step in steps if step - 1 not in known]
    ends = [step for step in steps if step + 1 not in known]
    pairs = zip(begins, ends, strict=True)
    return ", ".join(f"step {first}" if first == last else f"steps {first} to {last}" for first, last in pairs)
