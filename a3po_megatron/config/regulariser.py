"""Settings of `algorithm/regulariser.py`: what is added to any objective (docs/objectives.md).

The paper has neither (arXiv 2512.21625, appendix B), and all of it is off by default.
"""

from __future__ import annotations

from typing import Literal

from .section import NoEffect, NonNegativeFloat, Section, option


class RegulariserOptions(Section):
    kl: NonNegativeFloat = option(0.0, "weight of the divergence from the run's first weights; 0: off")
    estimator: Literal["k1", "k2", "k3"] = option("k3", "of that divergence, per token (Schulman)")
    place: Literal["loss", "reward"] = option(
        "loss", "of that divergence: added to the loss, or taken off a rollout's reward before its advantage"
    )
    entropy: NonNegativeFloat = option(0.0, "weight of the mean entropy, taken off the loss; 0: no bonus")
    entropy_target: NonNegativeFloat = option(
        0.0, "nats; the bonus counts in steps whose mean entropy is not above it; 0: in all steps"
    )
    entropy_step: NonNegativeFloat = option(
        0.0, "what the bonus's weight gains by a step below the target, and loses by one above it, not below 0"
    )
    without_effect = (
        NoEffect(("estimator", "place"), lambda r: r.kl == 0, "regulariser.kl is 0"),
        NoEffect(
            ("entropy_target",),
            lambda r: r.entropy == r.entropy_step == 0,
            "regulariser.entropy and regulariser.entropy_step are 0: there is no bonus",
        ),
        NoEffect(("entropy_step",), lambda r: r.entropy_target == 0, "regulariser.entropy_target is 0"),
    )

    @property
    def has_bonus(self) -> bool:
        """Whether there is an entropy bonus in any step."""
        return self.entropy > 0 or (self.entropy_step > 0 and self.entropy_target > 0)
