"""Which metrics are drawn together, and what each drawing means: shared by the page and the figures.

A chart whose metrics a run lacks is drawn without that line; metrics that stand in no chart follow at the page's end.
"""

from __future__ import annotations

from typing import NamedTuple


class Chart(NamedTuple):
    section: str
    title: str
    says: str  # one sentence: what the number is, and how to read it
    unit: str  # of the vertical axis; "%" metrics are stored as fractions
    lines: tuple[tuple[str, str], ...]  # (metric, its name in this chart); one line style each
    scale: float = 1.0  # stored value × scale = value in `unit`


REWARD, POLICY, SHAPING, ENGINES, COST = (
    "Does it learn",
    "How the policy moves",
    "What the shaping does",
    "Do the two engines agree",
    "What it costs",
)
POSITIVE_NEGATIVE = (("positive", "correct rollouts"), ("negative", "wrong rollouts"))
PHASE_PREFIX = "perf/seconds_"
PHASES = ("rollout", "reward", "score", "update", "publish", "checkpoint")


def _both(metric: str) -> tuple[tuple[str, str], ...]:
    return tuple((f"{metric}_{key}", name) for key, name in POSITIVE_NEGATIVE)


def _percent(section: str, title: str, says: str, *lines: tuple[str, str]) -> Chart:
    return Chart(section, title, says, "%", lines, 100.0)


CHARTS = (
    _percent(
        REWARD,
        "Ways of answering",
        "Share of all sampled rollouts that write steps before they answer, and of those that answer at once.",
        ("task/stepwise_rate", "stepwise"),
        ("task/at_once_rate", "at once"),
    ),
    _percent(
        REWARD,
        "Correct rate",
        "Share of all sampled rollouts that the grader found correct, before any group is dropped.",
        ("reward/correct_rate", "correct"),
    ),
    Chart(
        REWARD,
        "Entropy",
        "Mean entropy of the policy's next-token distribution over response tokens; near 0 it has stopped exploring.",
        "nats",
        (("policy/entropy", "entropy"),),
    ),
    Chart(
        REWARD,
        "Response length",
        "Mean number of response tokens of all sampled rollouts.",
        "tokens",
        (("rollout/length_mean", "mean"),),
    ),
    _percent(
        REWARD,
        "Truncated and invalid",
        "Share of sampled rollouts cut off at the length limit, and share that the grader failed on.",
        ("rollout/truncated_rate", "truncated"),
        ("reward/invalid_rate", "invalid"),
    ),
    Chart(
        REWARD,
        "Kept groups",
        "Groups a step trained on (mixed verdicts), and how many of them were sampled in an earlier step.",
        "groups",
        (("rollout/kept_groups", "kept"), ("rollout/carried_groups", "carried over")),
    ),
    Chart(
        REWARD,
        "Mean reward",
        "Mean reward of all sampled rollouts; differs from the correct rate where a penalty is on.",
        "reward",
        (("reward/mean", "mean"),),
    ),
    Chart(
        SHAPING,
        "Token weight ρ",
        "Weight of the shaped tokens (all others have 1); it decays to 1, from where on training is unshaped.",
        "ρ",
        (("shaping/rho", "ρ"),),
    ),
    _percent(
        SHAPING,
        "Shaped tokens",
        "Share of response tokens that carry the weight ρ: the least probable tokens of correct rollouts and the most "
        "probable ones of wrong rollouts.",
        *_both("shaping/shaped_rate"),
    ),
    _percent(
        SHAPING,
        "Inert shaped tokens",
        "Share of the shaped tokens with 1 − p < 10⁻⁴: the policy is already sure of them, so weighting them changes "
        "almost nothing.",
        *_both("shaping/inert_rate"),
    ),
    _percent(
        SHAPING,
        "Gradient share of shaped tokens",
        "Share of Σ w·|A|·(1 − p), a proxy for the size of the gradient, that falls on the shaped tokens.",
        *_both("shaping/gradient_share"),
    ),
    Chart(
        POLICY,
        "Gradient norm",
        "Norm of the gradient; spikes are steps in which a few tokens dominated the update.",
        "norm",
        (("policy/grad_norm", "norm"),),
    ),
    Chart(
        POLICY,
        "KL to the old policy",
        "Estimated divergence of the updated policy from the one that sampled; grows with each mini-batch of a step.",
        "nats per token",
        (("policy/kl_old", "KL"),),
    ),
    _percent(
        POLICY,
        "Clipped tokens",
        "Share of tokens whose probability ratio left the trust region, below and above.",
        ("policy/clip_high_rate", "above 1 + ε high"),
        ("policy/clip_low_rate", "below 1 − ε low"),
    ),
    Chart(
        POLICY,
        "Ratio in the first mini-batch",
        "Largest |ratio − 1| before the first optimiser step; nothing has changed yet, so it must be numerical noise.",
        "|ratio − 1|",
        (("policy/ratio_first_max", "largest"),),
    ),
    Chart(
        POLICY,
        "Log-prob of sampled tokens",
        "Mean log-prob that the training engine gives the sampled tokens; towards 0 the policy becomes surer.",
        "nats",
        (("policy/old_logprob_mean", "mean"),),
    ),
    Chart(
        POLICY,
        "Loss",
        "The objective that was minimised; its level says little, a jump or a NaN gap says something broke.",
        "loss",
        (("learner/loss", "loss"),),
    ),
    Chart(
        POLICY,
        "Learning rate",
        "Learning rate of the step.",
        "learning rate",
        (("learner/lr", "rate"),),
    ),
    Chart(
        ENGINES,
        "Log-prob difference",
        "Mean |difference| between the log-probs of the rollout engine and the training engine on the same tokens.",
        "nats",
        (("mismatch/logprob_abs_mean", "mean absolute"),),
    ),
    Chart(
        ENGINES,
        "KL between the engines",
        "Divergence of the two engines on the same weights (k3 estimate); 0 if they computed exactly the same.",
        "nats per token",
        (("mismatch/kl_k3", "k3"),),
    ),
    Chart(
        COST,
        "Throughput",
        "Tokens per second, as the run recorded it.",
        "tokens/s",
        (("perf/tokens_per_second", "tokens/s"),),
    ),
    Chart(
        COST,
        "Sampling rounds",
        "Rounds of sampling a step needed to fill its groups; more rounds, more prompts without mixed verdicts.",
        "rounds",
        (("rollout/rounds", "rounds"),),
    ),
    Chart(
        COST,
        "Publishing",
        "Seconds from the learner's new weights to the rollout engine holding the same ones, proven equal.",
        "s",
        (("refit/seconds", "seconds"),),
    ),
    Chart(
        COST,
        "Peak memory",
        "Largest memory use of any rank, and what is in use at the end of each part of a step.",
        "GiB",
        (
            ("memory/peak_bytes", "peak"),
            ("memory/rollout_bytes", "while sampling"),
            ("memory/training_bytes", "while training"),
            ("memory/publishing_bytes", "while publishing"),
        ),
        2.0**-30,
    ),
)


def chart_of(metric: str) -> Chart:
    """The chart that shows `metric`; a plain one where none does."""
    for chart in CHARTS:
        if metric in dict(chart.lines):
            return chart
    return Chart("Other metrics", metric, "", "", ((metric, metric),))


def smoothing_window(steps: int) -> int:
    """Over how many steps a curve of `steps` steps is smoothed: 5, of a long run about a fiftieth of it; odd."""
    return max(5, steps // 100 * 2 + 1)


def moving_mean(values: list[float | None], window: int) -> list[float | None]:
    """Mean of the defined values in a centred window; undefined stays undefined. (template.html.j2 does the same.)

    Towards both ends the window narrows evenly: a one-sided mean would bend a rising curve where it begins.
    """
    smooth: list[float | None] = []
    for i, value in enumerate(values):
        half = min(window // 2, i, len(values) - 1 - i)
        near = [v for v in values[max(0, i - half) : i + half + 1] if v is not None]
        smooth.append(None if value is None else sum(near) / len(near))
    return smooth
