"""Settings of `algorithm/`: advantage, A3PO's shaping, the clipped objective, the correction for the sampler.

Defaults are the paper's where it states them (arXiv 2512.21625; its sources: docs/method.md) and DAPO's elsewhere.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, NonNegativeFloat, PositiveFloat, Probability, Section


class AdvantageOptions(Section):
    """A_i = (R_i - mean_G) / (std_G + eps), over the valid members of a group."""

    ddof: Literal[0, 1] = 1
    eps: PositiveFloat = 1e-6
    normalise_std: bool = True  # False: A_i = R_i - mean_G (Dr.GRPO)
    positive_scale: NonNegativeFloat = 1.0  # PxNy: advantages of correct rollouts times x …
    negative_scale: NonNegativeFloat = 1.0  # … and of wrong ones times y


class ShapingOptions(Section):
    """A3PO: rho(s) = max(rho - decay * (s - origin), 1) on the chosen tokens. rho = 1 is plain DAPO, bit for bit."""

    fraction: Probability = 0.2  # of a rollout's response tokens, at least one token
    rho: Annotated[float, Field(ge=1)] = 2.0
    rho_negative: Annotated[float, Field(ge=1)] | None = None  # None: the same as rho
    decay: NonNegativeFloat = 0.005  # per RL step
    origin: NonNegative = 0  # the step at which the decay starts
    metric: Literal["probability", "entropy"] = "probability"
    source: Literal["training", "rollout"] = "training"  # whose log-probs rank the tokens
    rounding: Literal["floor", "ceil"] = "floor"  # of fraction * n


class ObjectiveOptions(Section):
    """DAPO's clip-higher surrogate, token mean over the mini-batch of all ranks; no KL term, no entropy bonus."""

    clip_low: Annotated[float, Field(gt=0, lt=1)] = 0.2
    clip_high: PositiveFloat = 0.28
    dual_clip: Annotated[float, Field(gt=1)] | None = 3.0  # lower bound c * A for A < 0; None: off


class CorrectionOptions(Section):
    """Truncated importance sampling: every token's objective times min(pi_train_old / pi_rollout, cap)."""

    tis_cap: PositiveFloat | None = 2.0  # None: off
