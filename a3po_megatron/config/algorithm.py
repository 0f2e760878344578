"""Settings of `algorithm/`: advantage, process rewards, A3PO's shaping, the correction for the sampler.

Defaults are the paper's where it states them (arXiv 2512.21625; its sources: docs/method.md) and DAPO's elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import (
    NoEffect,
    NonNegative,
    NonNegativeFloat,
    PositiveFloat,
    Probability,
    Section,
    by_name,
    option,
)


class AdvantageOptions(Section):
    """A_i = (R_i - mean_G) / (std_G + eps), over the valid members of a group."""

    ddof: Literal[0, 1] = option(1, "what is taken off the number of members in the standard deviation of a group")
    eps: PositiveFloat = option(1e-6, "added to the standard deviation of a group")
    normalise_std: bool = option(True, "divide by the standard deviation; false: A = R - mean (Dr.GRPO)")
    positive_scale: NonNegativeFloat = option(1.0, "factor on the advantages of correct rollouts (the x of PxNy)")
    negative_scale: NonNegativeFloat = option(1.0, "factor on the advantages of wrong rollouts (the y of PxNy)")
    without_effect = (NoEffect(("ddof", "eps"), lambda a: not a.normalise_std, "advantage.normalise_std is false"),)


class ShapingOptions(Section):
    """A3PO: rho(s) = max(rho - decay * (s - origin), 1) on the chosen tokens. rho = 1 is plain DAPO, bit for bit."""

    name: Literal["a3po"] = option("a3po", "how tokens are weighted; none: all alike")
    fraction: Probability = option(0.2, "share of a rollout's response tokens that is chosen, at least one token")
    rho: Annotated[float, Field(ge=1)] = option(2.0, "weight of the chosen tokens at the origin; 1: no shaping")
    rho_negative: Annotated[float, Field(ge=1)] | None = option(None, "the same in wrong rollouts; null: rho")
    decay: NonNegativeFloat = option(0.005, "what the weight loses in an RL step, until it is 1")
    origin: NonNegative = option(0, "RL step at which the decay starts")
    metric: Literal["probability", "entropy"] = option("probability", "what ranks the tokens of a rollout")
    source: Literal["training", "rollout"] = option("training", "whose log-probs rank the tokens: learner's, engine's")
    rounding: Literal["floor", "ceil"] = option("floor", "of fraction × the number of tokens")
    without_effect = (
        NoEffect(
            ("fraction", "decay", "origin", "metric", "source", "rounding"),
            lambda s: s.rho == 1 and (s.rho_negative or 1) == 1,
            "shaping.rho is 1 (no shaping)",
        ),
        NoEffect(("source",), lambda s: s.metric != "probability", "shaping.metric is not probability"),
        NoEffect(("origin",), lambda s: s.decay == 0, "shaping.decay is 0"),
    )


class ShapingSettings(ShapingOptions):
    rho_negative: Annotated[float, Field(ge=1)]


class NoShaping(Section):
    name: Literal["none"] = "none"


Shaping = Annotated[Annotated[ShapingOptions, Tag("a3po")] | Annotated[NoShaping, Tag("none")], by_name("a3po")]
ResolvedShaping = Annotated[
    Annotated[ShapingSettings, Tag("a3po")] | Annotated[NoShaping, Tag("none")], by_name("a3po")
]


class _ProcessOptions(Section):
    """What a grader's scores of steps add to the advantages of their tokens (algorithm/process.py)."""

    name: str
    weight: NonNegativeFloat = option(1.0, "factor of a token's process advantage beside that of the outcome")
    polarity: Literal["outcome", "tokens"] = option(
        "outcome", "what shaping goes by: the verdict, or the sign of a token's process advantage"
    )
    without_effect = (
        NoEffect(
            ("weight",),
            lambda p: p.weight == 0 and p.polarity == "outcome",
            "at 0, and with process.polarity: outcome, there are no process rewards",
        ),
    )


class SpanRewards(_ProcessOptions):
    name: Literal["spans"] = option("spans", "a token's process advantage: the score of its step")


class RewardsToGo(_ProcessOptions):
    name: Literal["to_go"] = option("to_go", "a token's process advantage: the scores of all steps from its own on")


class NoProcess(Section):
    name: Literal["none"] = option(
        "none", "what scores of steps add to a token's advantage: nothing, its own step's, those of all steps to go"
    )


Process = Annotated[
    Annotated[NoProcess, Tag("none")] | Annotated[SpanRewards, Tag("spans")] | Annotated[RewardsToGo, Tag("to_go")],
    by_name("none"),
]


class TisOptions(Section):
    """Truncated importance sampling: every token's objective times min(pi_train_old / pi_rollout, cap)."""

    name: Literal["tis"] = option("tis", "how the objective makes up for the sampler's other log-probs; none: not")
    cap: PositiveFloat = option(2.0, "largest weight of truncated importance sampling")


class NoCorrection(Section):
    name: Literal["none"] = "none"


Correction = Annotated[Annotated[TisOptions, Tag("tis")] | Annotated[NoCorrection, Tag("none")], by_name("tis")]
