"""Which metrics are drawn together, and what each drawing means: shared by the page and the figures.

A chart whose metrics a run lacks is drawn without that line; metrics that stand in no chart follow at the page's end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ..telemetry.catalogue import CATALOGUE, EVALUATION, evaluation_metrics


class Chart(NamedTuple):
    section: str
    title: str
    says: str  # one sentence: what the number is, and how to read it
    unit: str  # of the vertical axis; "%" metrics are stored as fractions
    scale: float = 1.0  # stored value × scale = value in `unit`
    sparse: bool = False  # few steps have a value: neighbours are joined over the others

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """(metric, its name in this chart), as the catalogue has them; one line style each."""
        own = tuple((metric.name, metric.line) for metric in CATALOGUE if metric.chart == self.title)
        return own or ((self.title, self.title),)


REWARD, POLICY, SHAPING, ENGINES, COST = (
    "Does it learn",
    "How the policy moves",
    "What the shaping does",
    "Do the two engines agree",
    "What it costs",
)


def _percent(section: str, title: str, says: str) -> Chart:
    return Chart(section, title, says, "%", 100.0)


CHARTS = (
    _percent(
        REWARD,
        "Ways of answering",
        "Share of all sampled rollouts that write steps before they answer, and of those that answer at once.",
    ),
    _percent(
        REWARD,
        "Correct rate",
        "Share of all sampled rollouts that the grader found correct, before any group is dropped.",
    ),
    Chart(
        REWARD,
        "Entropy",
        "Mean entropy of the policy's next-token distribution over response tokens; near 0 it has stopped exploring.",
        "nats",
    ),
    Chart(
        REWARD,
        "Response length",
        "Mean number of response tokens of all sampled rollouts.",
        "tokens",
    ),
    _percent(
        REWARD,
        "Truncated and invalid",
        "Share of sampled rollouts cut off at the length limit, and share that the grader failed on.",
    ),
    Chart(
        REWARD,
        "Kept groups",
        "Groups a step trained on (mixed verdicts), and how many of them were sampled in an earlier step.",
        "groups",
    ),
    Chart(
        REWARD,
        "Mean reward",
        "Mean reward of all sampled rollouts; differs from the correct rate where a penalty is on.",
        "reward",
    ),
    Chart(
        SHAPING,
        "Token weight ρ",
        "Weight of the shaped tokens (all others have 1); it decays to 1, from where on training is unshaped.",
        "ρ",
    ),
    _percent(
        SHAPING,
        "Shaped tokens",
        "Share of response tokens that carry the weight ρ: the least probable tokens of correct rollouts and the most "
        "probable ones of wrong rollouts.",
    ),
    _percent(
        SHAPING,
        "Inert shaped tokens",
        "Share of the shaped tokens with 1 − p < 10⁻⁴: the policy is already sure of them, so weighting them changes "
        "almost nothing.",
    ),
    _percent(
        SHAPING,
        "Gradient share of shaped tokens",
        "Share of Σ w·|A|·(1 − p), a proxy for the size of the gradient, that falls on the shaped tokens.",
    ),
    Chart(
        POLICY,
        "Gradient norm",
        "Norm of the gradient; spikes are steps in which a few tokens dominated the update.",
        "norm",
    ),
    Chart(
        POLICY,
        "KL to the old policy",
        "Estimated divergence of the updated policy from the one that sampled; grows with each mini-batch of a step.",
        "nats per token",
    ),
    _percent(
        POLICY,
        "Clipped tokens",
        "Share of tokens whose probability ratio left the trust region, below and above.",
    ),
    Chart(
        POLICY,
        "Ratio in the first mini-batch",
        "Largest |ratio − 1| before the first optimiser step; nothing has changed yet, so it must be numerical noise.",
        "|ratio − 1|",
    ),
    Chart(
        POLICY,
        "Log-prob of sampled tokens",
        "Mean log-prob that the training engine gives the sampled tokens; towards 0 the policy becomes surer.",
        "nats",
    ),
    Chart(
        POLICY,
        "Loss",
        "The objective that was minimised; its level says little, a jump or a NaN gap says something broke.",
        "loss",
    ),
    Chart(
        POLICY,
        "Learning rate",
        "Learning rate of the step.",
        "learning rate",
    ),
    Chart(
        ENGINES,
        "Log-prob difference",
        "Mean |difference| between the log-probs of the rollout engine and the training engine on the same tokens.",
        "nats",
    ),
    Chart(
        ENGINES,
        "KL between the engines",
        "Divergence of the two engines on the same weights (k3 estimate); 0 if they computed exactly the same.",
        "nats per token",
    ),
    Chart(
        COST,
        "Throughput",
        "Tokens per second, as the run recorded it.",
        "tokens/s",
    ),
    _percent(
        COST,
        "Idle shares",
        "Of the seconds of sampling, the share in which an engine had nothing to sample; of the step's, the share in "
        "which nothing was scored or learned.",
    ),
    Chart(
        COST,
        "Sampled groups",
        "Groups that a step sampled to find enough that count; the more, the more prompts without mixed verdicts.",
        "groups",
    ),
    Chart(
        COST,
        "Publishing",
        "Seconds from the learner's new weights to the rollout engine holding the same ones, proven equal.",
        "s",
    ),
    Chart(
        COST,
        "Peak memory",
        "Largest memory use of any rank, and what is in use at the end of each part of a step.",
        "GiB",
        2.0**-30,
    ),
    Chart(
        COST,
        "Memory by the plan",
        "What a3po plan says that the fullest rank needs in three phases of a step, and what was in use there; on a "
        "CPU nothing is measured that could be held against it.",
        "GiB",
        2.0**-30,
    ),
)


def chart_of(metric: str) -> Chart:
    """The chart that shows `metric`; a plain one where none does."""
    for chart in CHARTS:
        if metric in dict(chart.lines):
            return chart
    if metric.startswith(EVALUATION):
        (own,) = (m for m in evaluation_metrics([metric[len(EVALUATION) :].rpartition("_")[0]]) if m.name == metric)
        share = own.unit == "share"
        return Chart(
            "On benchmarks", metric, own.meaning, "%" if share else own.unit, 100.0 if share else 1.0, sparse=True
        )
    known = next((each for each in CATALOGUE if each.name == metric), None)
    return Chart("Other metrics", metric, "" if known is None else known.meaning, "" if known is None else known.unit)


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


def short(value: Any, digits: int = 4) -> Any:
    """Returns a number with few digits, as a whole one where it is one: the page's size is mostly numbers."""
    if not isinstance(value, float):
        return value
    if value != value or value in (float("inf"), float("-inf")):
        return None
    rounded = float(f"{value:.{digits}g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e9 else rounded
