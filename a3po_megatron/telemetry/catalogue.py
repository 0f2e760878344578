"""The phases of a run and its metrics, by name: said here once, for the loop, rows, charts and `a3po status`.

A metric stands in every row, in this order: 0 where shaping is inactive, null where it is undefined. One that is not
here is refused (telemetry/metrics.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from .alerts import ALERT, ALERTS


class Phase(StrEnum):
    """What a rank is doing."""

    START_UP = "start-up"  # before the first of these
    IMPORTS = "imports"
    GROUPS = "groups"  # ranks meet
    ENGINE = "engine"
    MODEL = "model"
    BETWEEN = "between phases"
    EVALUATE = "evaluate"  # a run that evaluates itself, before the step's own rollout; `a3po eval`
    ROLLOUT = "rollout"
    REWARD = "reward"
    SCORE = "score"
    UPDATE = "update"
    PUBLISH = "publish"
    CHECKPOINT = "checkpoint"


_TRAINING = (Phase.REWARD, Phase.SCORE, Phase.UPDATE, Phase.PUBLISH, Phase.CHECKPOINT)
STEP = (Phase.EVALUATE, Phase.ROLLOUT, *_TRAINING)  # phases of a step, in order
STARTUP = (Phase.IMPORTS, Phase.GROUPS, Phase.ENGINE, Phase.MODEL, Phase.PUBLISH)  # of a start
PLANNED = {"publish": "publishing", "rollout": "rollout", "update": "training"}  # phases of a plan, and their state
RESIDENCY = ("publishing", "rollout", "training")  # who is in device memory when (residency.py)
ELAPSED, IDLE = "elapsed", "idle"  # seconds of a rank's step; those of its phase rollout, with nothing to sample
WAITING, REST = "waiting", "rest"  # what the timeline calls the idle ones, and those in no phase
PARTS = (Phase.EVALUATE, Phase.ROLLOUT, WAITING, *_TRAINING, REST)  # that a rank's step is made of
SECONDS = "perf/seconds_"  # before a phase's name: its seconds in a step


@dataclass(frozen=True)
class Metric:
    name: str
    unit: str  # of the stored value; "share": of 1
    meaning: str
    chart: str = ""  # the title of the chart that draws it (report/charts.py); none: it is drawn by itself
    line: str = ""  # what it is called there


def _both(name: str, meaning: str, chart: str) -> dict[str, Metric]:
    sides = {"positive": "correct rollouts", "negative": "wrong rollouts"}
    return {
        side: Metric(f"{name}_{side}", "share", meaning.format(rollouts), chart, rollouts)
        for side, rollouts in sides.items()
    }


_SHAPED = _both("shaping/shaped_rate", "response tokens of {} that carry the weight ρ", "Shaped tokens")
_INERT = _both("shaping/inert_rate", "shaped tokens of {} with 1 − p < 1e-4", "Inert shaped tokens")
_PULL = _both(
    "shaping/gradient_share", "part of Σ w·|A|·(1 − p) over {} on shaped tokens", "Gradient share of shaped tokens"
)

CATALOGUE = (
    Metric("reward/mean", "reward", "mean reward of all sampled rollouts", "Mean reward", "mean"),
    Metric("reward/correct_rate", "share", "sampled rollouts that the grader found correct", "Correct rate", "correct"),
    Metric("reward/invalid_rate", "share", "rollouts whose grading failed", "Truncated and invalid", "invalid"),
    Metric("reward/steps_rate", "share", "rollouts whose grader gave steps; null without process rewards"),
    Metric("reward/steps_mean", "steps", "mean number of steps of all sampled rollouts; likewise"),
    Metric("reward/step_score_mean", "score", "mean score of those steps"),
    Metric("rollout/length_mean", "tokens", "mean length of all sampled responses", "Response length", "mean"),
    Metric("rollout/truncated_rate", "share", "responses cut off at the limit", "Truncated and invalid", "truncated"),
    Metric("rollout/repetition_rate", "share", "runs of four tokens that stood in the response before"),
    Metric("rollout/tokens", "tokens", "response tokens that were sampled"),
    Metric("rollout/spread_rate", "share", "sampled groups with mixed verdicts"),
    Metric("rollout/kept_groups", "groups", "groups that the step trained on", "Kept groups", "kept"),
    Metric("rollout/carried_groups", "groups", "of those, sampled in a step before", "Kept groups", "carried over"),
    Metric("rollout/sampled_groups", "groups", "groups that the step sampled", "Sampled groups", "sampled"),
    Metric("task/stepwise_rate", "share", "responses that write steps first", "Ways of answering", "stepwise"),
    Metric("task/at_once_rate", "share", "responses that answer at once", "Ways of answering", "at once"),
    Metric("policy/entropy", "nats", "mean entropy over response tokens", "Entropy", "entropy"),
    Metric("policy/old_logprob_mean", "nats", "mean old log-prob", "Log-prob of sampled tokens", "mean"),
    Metric("policy/kl_old", "nats per token", "divergence from the old policy (k3)", "KL to the old policy", "KL"),
    Metric("policy/kl_reference", "nats per token", "divergence from the run's first weights (k3), with a regulariser"),
    Metric("policy/clip_low_rate", "share", "tokens clipped from below", "Clipped tokens", "below 1 − ε low"),
    Metric("policy/clip_high_rate", "share", "tokens clipped from above", "Clipped tokens", "above 1 + ε high"),
    Metric("policy/grad_norm", "norm", "mean gradient norm of the step's updates", "Gradient norm", "norm"),
    Metric(
        "policy/ratio_first_max", "ratio", "largest |ratio − 1| at first", "Ratio in the first mini-batch", "largest"
    ),
    Metric("policy/rejected_updates", "updates", "updates that were not finite, and not applied"),
    Metric("shaping/rho", "ρ", "weight of the shaped tokens of correct rollouts", "Token weight ρ", "ρ"),
    *(_SHAPED["positive"], _INERT["positive"], _PULL["positive"]),
    *(_SHAPED["negative"], _INERT["negative"], _PULL["negative"]),
    Metric("shaping/drawn_rate", "share", "response tokens that kl_cov or lp_reg draws elsewhere"),
    Metric("mismatch/logprob_abs_mean", "nats", "mean |engine − learner|", "Log-prob difference", "mean absolute"),
    Metric("mismatch/kl_k3", "nats per token", "divergence of the engines (k3)", "KL between the engines", "k3"),
    Metric("mismatch/routes_rate", "share", "(token, layer) pairs that the learner would have routed otherwise"),
    Metric("mismatch/masked_rate", "share", "accepted rollouts that are masked (correction, trainer.mask_truncated)"),
    Metric("learner/loss", "loss", "the objective that was minimised", "Loss", "loss"),
    Metric("learner/regulariser", "loss", "what is added to it: divergences, less the entropy bonus"),
    Metric("learner/entropy_weight", "1", "weight of the entropy bonus"),
    Metric("learner/lr", "1", "learning rate", "Learning rate", "rate"),
    Metric("refit/seconds", "s", "of a publish, without the canary", "Publishing", "seconds"),
    Metric("refit/bytes", "bytes", "that an engine's rank took up in a publish"),
    Metric("refit/canary", "nats", "largest |learner − engine| on the canary"),
    Metric("refit/canary_mean", "nats", "mean |learner − engine| on the canary"),
    Metric("refit/witness", "nats", "largest |learner − transformers| on the canary, when asked"),
    Metric("perf/tokens_per_second", "tokens/s", "sampled tokens over the step's seconds", "Throughput", "tokens/s"),
    Metric("perf/imbalance", "ratio", "heaviest replica's tokens over the mean, in the worst mini-batch"),
    Metric("perf/padding_share", "share", "of the tokens that the learner computed in updates, of no rollout"),
    Metric("perf/recalled_groups", "groups", "that a start of before had finished"),
    Metric("perf/engine_idle_share", "share", "of sampling, with nothing to sample", "Idle shares", "engines"),
    Metric("perf/learner_idle_share", "share", "of the step, nothing scored or learned", "Idle shares", "learner"),
    *(Metric(f"{SECONDS}{phase}", "s", f"of the step's phase {phase}, on its slowest rank") for phase in STEP),
    Metric("startup/seconds", "s", "from the command to the first step"),
    *(Metric(f"startup/{phase}", "s", f"of the start's phase {phase}, on rank 0") for phase in STARTUP),
    Metric("memory/peak_bytes", "bytes", "largest memory use of any rank", "Peak memory", "peak"),
    Metric("memory/publishing_bytes", "bytes", "in use after publishing", "Peak memory", "while publishing"),
    Metric("memory/rollout_bytes", "bytes", "in use after sampling", "Peak memory", "while sampling"),
    Metric("memory/training_bytes", "bytes", "in use after training", "Peak memory", "while training"),
    *(
        Metric(f"memory/{kind}_{phase}", "bytes", meaning, "Memory by the plan", f"{phase}, {kind}")
        for phase in PLANNED
        for kind, meaning in (
            ("predicted", f"of the fullest rank in its phase {phase}, by a3po plan"),
            ("measured", f"in use on the fullest rank at the end of {phase}; null on a CPU"),
        )
    ),
    *(Metric(f"{ALERT}{alert.name}", "0 or 1", alert.meaning) for alert in ALERTS),
)
METRICS = tuple(metric.name for metric in CATALOGUE)
EVALUATION = "eval/"  # before the name of a benchmark and what is said of it


def evaluation_metrics(benchmarks: Sequence[str]) -> tuple[Metric, ...]:
    """Returns the metrics of a run that evaluates itself: null in steps that do not."""
    says = {
        "avg": ("share", "mean share of correct samples of the weights that the step began with"),
        "pass": ("share", "problems that at least one of n samples solves (pass@n), of these weights"),
        "length": ("tokens", "mean length of the samples"),
    }
    return tuple(
        Metric(f"{EVALUATION}{name}_{kind}", unit, f"{name}: {meaning}")
        for name in benchmarks
        for kind, (unit, meaning) in says.items()
    )
