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


class _Advantage(Section):
    name: str
    positive_scale: NonNegativeFloat = option(1.0, "factor on the advantages of correct rollouts (the x of PxNy)")
    negative_scale: NonNegativeFloat = option(1.0, "factor on the advantages of wrong rollouts (the y of PxNy)")


class AdvantageOptions(_Advantage):
    """A_i = (R_i - mean_G) / (std_G + eps), over the valid members of a group."""

    name: Literal["group"] = option(
        "group", "what a rollout is worth: within its group; leave_one_out; max_rl; signed: by its verdict alone"
    )
    ddof: Literal[0, 1] = option(1, "what is taken off the number of members in the standard deviation of a group")
    eps: PositiveFloat = option(1e-6, "added to the standard deviation of a group")
    normalise_std: bool = option(True, "divide by the standard deviation; false: A = R - mean (Dr.GRPO)")
    without_effect = (NoEffect(("ddof", "eps"), lambda a: not a.normalise_std, "advantage.normalise_std is false"),)


class LeaveOneOut(_Advantage):
    """A_i = R_i - the mean of the group's other members (RLOO)."""

    name: Literal["leave_one_out"] = option("leave_one_out", "what a rollout is worth: beside the others of its group")


class MaxRl(_Advantage):
    """A_i = (R_i - mean_G) / (mean_G + eps) (MaxRL)."""

    name: Literal["max_rl"] = option("max_rl", "what a rollout is worth: more in groups of which few are correct")
    eps: PositiveFloat = option(1e-6, "added to the mean of a group")


class Signed(_Advantage):
    """A_i = 1 if correct, -1 if wrong (PSR, NSR, W-REINFORCE: by the scales)."""

    name: Literal["signed"] = option("signed", "what a rollout is worth: its verdict")


Advantage = Annotated[
    Annotated[AdvantageOptions, Tag("group")]
    | Annotated[LeaveOneOut, Tag("leave_one_out")]
    | Annotated[MaxRl, Tag("max_rl")]
    | Annotated[Signed, Tag("signed")],
    by_name("group"),
]


class ShapingOptions(Section):
    """A3PO: rho(s) = max(rho - decay * (s - origin), 1) on the chosen tokens. rho = 1 is plain DAPO, bit for bit."""

    name: Literal["a3po"] = option(
        "a3po", "how tokens are weighted; none: all alike; others (docs/objectives.md): some are left out, or drawn"
    )
    fraction: Probability = option(0.2, "share of a rollout's response tokens that is chosen, at least one token")
    rho: PositiveFloat = option(
        2.0, "weight of the chosen tokens at the origin; 1: no shaping; below 1: they count less"
    )
    rho_negative: PositiveFloat | None = option(None, "the same in wrong rollouts; null: rho")
    schedule: Literal["linear", "cosine", "exponential", "constant"] = option(
        "linear", "how the weight goes to 1; cosine: as soon as linear; exponential: at first as fast; constant: not"
    )
    decay: NonNegativeFloat = option(0.005, "what the weight of a linear schedule loses in an RL step, until it is 1")
    origin: NonNegative = option(0, "RL step at which the decay starts")
    positives: Literal["unlikely", "likely"] = option("unlikely", "which tokens of correct rollouts are chosen")
    negatives: Literal["likely", "unlikely"] = option("likely", "which tokens of wrong rollouts are chosen")
    metric: Literal["probability", "entropy"] = option("probability", "what ranks the tokens of a rollout")
    source: Literal["training", "rollout"] = option("training", "whose log-probs rank the tokens: learner's, engine's")
    rounding: Literal["floor", "ceil"] = option("floor", "of fraction × the number of tokens")
    without_effect = (
        NoEffect(
            ("fraction", "schedule", "decay", "origin", "positives", "negatives", "metric", "source", "rounding"),
            lambda s: s.rho == 1 and (s.rho_negative or 1) == 1,
            "shaping.rho is 1 (no shaping)",
        ),
        NoEffect(("source",), lambda s: s.metric != "probability", "shaping.metric is not probability"),
        NoEffect(("schedule", "origin"), lambda s: s.decay == 0, "shaping.decay is 0"),
        NoEffect(("decay", "origin"), lambda s: s.schedule == "constant", "shaping.schedule is constant"),
        NoEffect(("positives",), lambda s: s.rho == 1, "shaping.rho is 1: in correct rollouts nothing is shaped"),
        NoEffect(("negatives",), lambda s: s.rho_negative == 1, "shaping.rho_negative is 1"),
    )


class ShapingSettings(ShapingOptions):
    rho_negative: PositiveFloat


class ForkTokens(Section):
    """Only the tokens of highest entropy of a step's batch are trained on (arXiv 2506.01939)."""

    name: Literal["fork_tokens"] = option("fork_tokens", "how tokens are weighted")
    fraction: Probability = option(0.2, "share of all response tokens of a step that is trained on")


class ClipCov(Section):
    """A few tokens whose log-prob and advantage go together most have no gradient (Clip-Cov, arXiv 2505.22617)."""

    name: Literal["clip_cov"] = option("clip_cov", "how tokens are weighted")
    fraction: Probability = option(2e-4, "share of all response tokens of a step that is left out, at least one")
    low: float = option(1.0, "they are drawn from those with a covariance above this")
    high: float = option(5.0, "and below this")


class KlCov(Section):
    """The tokens whose log-prob and advantage go together most are drawn to the old policy (KL-Cov, arXiv
    2505.22617)."""

    name: Literal["kl_cov"] = option("kl_cov", "how tokens are weighted")
    fraction: Probability = option(2e-4, "share of all response tokens of a step that is drawn, at least one")
    kl: PositiveFloat = option(1.0, "weight of |log pi - log pi_old| of these tokens in the loss")


class LpReg(Section):
    """Unlikely tokens of bad rollouts are drawn to a less noisy policy (Lp-Reg, arXiv 2510.03222)."""

    name: Literal["lp_reg"] = option("lp_reg", "how tokens are weighted")
    fraction: Probability = option(0.01, "share of a step's tokens of negative advantage, the least likely ones")
    min_p: Annotated[float, Field(gt=0, lt=1)] = option(
        0.02, "what is less likely than this times the likeliest token has no part in the less noisy policy"
    )
    kl: PositiveFloat = option(1.0, "weight of the divergence (k3) of these tokens from that policy in the loss")


class NoShaping(Section):
    name: Literal["none"] = "none"


Shaping = Annotated[
    Annotated[ShapingOptions, Tag("a3po")]
    | Annotated[ForkTokens, Tag("fork_tokens")]
    | Annotated[ClipCov, Tag("clip_cov")]
    | Annotated[KlCov, Tag("kl_cov")]
    | Annotated[LpReg, Tag("lp_reg")]
    | Annotated[NoShaping, Tag("none")],
    by_name("a3po"),
]
ResolvedShaping = Annotated[
    Annotated[ShapingSettings, Tag("a3po")]
    | Annotated[ForkTokens, Tag("fork_tokens")]
    | Annotated[ClipCov, Tag("clip_cov")]
    | Annotated[KlCov, Tag("kl_cov")]
    | Annotated[LpReg, Tag("lp_reg")]
    | Annotated[NoShaping, Tag("none")],
    by_name("a3po"),
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


class IcePop(Section):
    """Every token's objective times pi_train_old / pi_rollout, and none where that is out of bounds."""

    name: Literal["icepop"] = option("icepop", "how the objective makes up for the sampler's other log-probs")
    low: NonNegativeFloat = option(0.5, "smallest ratio of a token that counts")
    high: PositiveFloat = option(5.0, "largest ratio of a token that counts")


class SequenceMask(Section):
    """Rollouts whose log-probs at the sampler are too far from the learner's are not trained on."""

    name: Literal["sequence_mask"] = option(
        "sequence_mask", "how the objective makes up for the sampler's other log-probs"
    )
    mean_low: NonNegativeFloat = option(0.99, "smallest geometric mean of a rollout's ratios pi_train_old / pi_rollout")
    mean_high: PositiveFloat = option(1.01, "largest geometric mean")
    token_low: NonNegativeFloat = option(1e-4, "smallest ratio of any of its tokens; 0: off")
    token_high: NonNegativeFloat = option(0.0, "largest ratio of any of its tokens; 0: off")
    cap: NonNegativeFloat = option(2.0, "truncated importance sampling of the rest, as with tis; 0: off")


class NoCorrection(Section):
    name: Literal["none"] = "none"


Correction = Annotated[
    Annotated[TisOptions, Tag("tis")]
    | Annotated[IcePop, Tag("icepop")]
    | Annotated[SequenceMask, Tag("sequence_mask")]
    | Annotated[NoCorrection, Tag("none")],
    by_name("tis"),
]
