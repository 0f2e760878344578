"""Settings of `algorithm/`: advantage, A3PO's shaping, the clipped objective, the correction for the sampler.

Defaults are the paper's where it states them (arXiv 2512.21625; its sources: docs/method.md) and DAPO's elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, NonNegativeFloat, PositiveFloat, Probability, Section, option


class AdvantageOptions(Section):
    """A_i = (R_i - mean_G) / (std_G + eps), over the valid members of a group."""

    ddof: Literal[0, 1] = option(1, "what is taken off the number of members in the standard deviation of a group")
    eps: PositiveFloat = option(1e-6, "added to the standard deviation of a group")
    normalise_std: bool = option(True, "divide by the standard deviation; false: A = R - mean (Dr.GRPO)")
    positive_scale: NonNegativeFloat = option(1.0, "factor on the advantages of correct rollouts (the x of PxNy)")
    negative_scale: NonNegativeFloat = option(1.0, "factor on the advantages of wrong rollouts (the y of PxNy)")


class ShapingOptions(Section):
    """A3PO: rho(s) = max(rho - decay * (s - origin), 1) on the chosen tokens. rho = 1 is plain DAPO, bit for bit."""

    fraction: Probability = option(0.2, "share of a rollout's response tokens that is chosen, at least one token")
    rho: Annotated[float, Field(ge=1)] = option(2.0, "weight of the chosen tokens at the origin; 1: no shaping")
    rho_negative: Annotated[float, Field(ge=1)] | None = option(None, "the same in wrong rollouts; null: rho")
    decay: NonNegativeFloat = option(0.005, "what the weight loses in an RL step, until it is 1")
    origin: NonNegative = option(0, "RL step at which the decay starts")
    metric: Literal["probability", "entropy"] = option("probability", "what ranks the tokens of a rollout")
    source: Literal["training", "rollout"] = option("training", "whose log-probs rank the tokens: learner's, engine's")
    rounding: Literal["floor", "ceil"] = option("floor", "of fraction × the number of tokens")


class ObjectiveOptions(Section):
    """DAPO's clip-higher surrogate, token mean over the mini-batch of all ranks; no KL term, no entropy bonus."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = option(0.2, "the ratio is clipped at 1 - clip_low")
    clip_high: PositiveFloat = option(0.28, "the ratio is clipped at 1 + clip_high")
    dual_clip: Annotated[float, Field(gt=1)] | None = option(3.0, "c of the lower bound c × A where A < 0; null: off")


class CorrectionOptions(Section):
    """Truncated importance sampling: every token's objective times min(pi_train_old / pi_rollout, cap)."""

    tis_cap: PositiveFloat | None = option(2.0, "largest weight of truncated importance sampling; null: off")
