"""Settings of `telemetry/alerts.py`: what a run counts as a failure while it goes on, and which failures end it.

An alert is off where all of its thresholds are 0. What each one means, and where its default comes from, stands in
docs/alerts.md.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NoEffect, NonNegativeFloat, Probability, Section, option, or_off

AlertName = Literal[
    "entropy_collapse", "reward_hacking", "mismatch", "inert_shaping", "no_spread", "length_explosion", "clipping"
]
# Per alert, the thresholds that switch it off where they are 0, all of them.
THRESHOLDS: dict[str, tuple[str, ...]] = {
    "entropy_collapse": ("entropy_share",),
    "reward_hacking": ("hacking_fall", "hacking_length", "hacking_repetition"),
    "mismatch": ("mismatch_kl", "mismatch_logprob"),
    "inert_shaping": ("inert_rate",),
    "no_spread": ("spread_rate",),
    "length_explosion": ("length_share", "truncated_rate"),
    "clipping": ("clip_rate",),
}
Below1 = Annotated[float, Field(ge=0, lt=1)]  # a share of 1 cannot be exceeded: such a threshold would do nothing


class AlertsOptions(Section):
    window: Annotated[int, Field(ge=2)] = option(20, "steps that every alert looks back over")
    entropy_share: Below1 = option(
        0.2, "entropy_collapse: entropy below so much of what the run began with, unsolved; 0: off"
    )
    entropy_correct: Probability = option(0.7, "a correct rate from which on low entropy is no collapse")
    hacking_fall: Below1 = option(
        0.05, "reward_hacking: a benchmark's correct rate falls by so much while the reward rises; 0: off"
    )
    hacking_length: Annotated[float, or_off(above=1)] = option(
        5.0, "or responses become so many times longer, or shorter, than at the beginning; 0: off"
    )
    hacking_repetition: Below1 = option(0.3, "or rollout/repetition_rate grows by so much over the beginning's; 0: off")
    mismatch_kl: NonNegativeFloat = option(0.01, "mismatch: mismatch/kl_k3 above this, nats per token; 0: off")
    mismatch_logprob: NonNegativeFloat = option(0.1, "or mismatch/logprob_abs_mean above this, nats; 0: off")
    inert_rate: Below1 = option(0.75, "inert_shaping: more of a side's shaped tokens have no gradient to scale; 0: off")
    spread_rate: Annotated[float, Field(ge=0, le=1)] = option(
        0.05, "no_spread: fewer of the sampled groups have mixed verdicts; 0: off"
    )
    length_share: Below1 = option(
        0.9, "length_explosion: mean response length above so much of rollout.max_tokens; 0: off"
    )
    truncated_rate: Below1 = option(0.5, "or more of the responses are cut off; 0: off")
    clip_rate: Below1 = option(0.2, "clipping: more of the tokens are clipped in every step; 0: off")
    stop: tuple[AlertName, ...] = option((), "alerts that end the run, with a checkpoint and exit code 1")
    without_effect = (
        NoEffect(("entropy_correct",), lambda a: not a.is_on("entropy_collapse"), "alerts.entropy_share is 0 (off)"),
        NoEffect(("window",), lambda a: not any(map(a.is_on, THRESHOLDS)), "every alert is off"),
        NoEffect(
            ("stop",),
            lambda a: not all(map(a.is_on, a.stop)),
            "an alert that it names is off: all its thresholds are 0",
        ),
    )

    def is_on(self, name: str) -> bool:
        """Returns whether an alert can come at all."""
        return any(getattr(self, threshold) for threshold in THRESHOLDS[name])
