"""Settings of `algorithm/objectives/`: what is maximised, and its numbers (docs/objectives.md).

A name is a preset: the defaults of each are its paper's. How terms are added up is an axis of its own where there is a
choice: an objective of tokens is a sum over them, divided as `normaliser` says; one of sequences has a term a rollout.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import NoEffect, Positive, PositiveFloat, Section, by_name, option, or_off

Normaliser = Literal["tokens", "sequences", "constant"]
Below1 = Annotated[float, Field(gt=0, lt=1)]
UpTo1 = Annotated[float, Field(gt=0, le=1)]  # 1 bounds a ratio by 0, which it always is

_NORMALISER = "mean over the tokens of all rollouts; over each one's, then rollouts; sum over rollouts × constant"
_LOW, _HIGH = "the ratio is clipped at 1 - clip_low", "the ratio is clipped at 1 + clip_high"


class TokenObjective(Section):
    """A sum over tokens, each with its own advantage and A3PO's weight."""

    name: str
    normaliser: Normaliser = option("tokens", _NORMALISER)
    constant: Positive | None = option(None, "tokens that every rollout counts for; null: rollout.max_tokens")
    without_effect = (
        NoEffect(("constant",), lambda o: o.normaliser != "constant", "objective.normaliser is not constant"),
    )


class SequenceObjective(Section):
    """A mean over rollouts of one term each: their tokens have neither advantages nor weights of their own."""

    name: str


class ClippedOptions(TokenObjective):
    """DAPO's clip-higher surrogate; no KL term, no entropy bonus."""

    name: Literal["clipped"] = option("clipped", "what is maximised (docs/objectives.md)")
    clip_low: UpTo1 = option(0.2, f"{_LOW}; 1: not from below")
    clip_high: PositiveFloat = option(0.28, _HIGH)
    dual_clip: Annotated[float, Field(ge=0), or_off(above=1)] = option(
        3.0, "c of the lower bound c × A where A < 0; 0: off"
    )


class GspoOptions(SequenceObjective):
    name: Literal["gspo"] = "gspo"
    clip_low: Below1 = option(3e-4, _LOW)
    clip_high: PositiveFloat = option(4e-4, _HIGH)


class GspoTokenOptions(TokenObjective):
    name: Literal["gspo_token"] = "gspo_token"
    normaliser: Normaliser = option("sequences", _NORMALISER)
    clip_low: Below1 = option(3e-4, _LOW)
    clip_high: PositiveFloat = option(4e-4, _HIGH)


class LuspoOptions(SequenceObjective):
    name: Literal["luspo"] = "luspo"
    clip_low: Below1 = option(2e-3, _LOW)
    clip_high: PositiveFloat = option(2.5e-3, _HIGH)


class GmpoOptions(SequenceObjective):
    name: Literal["gmpo"] = "gmpo"
    log_clip_low: PositiveFloat = option(0.4, "where A < 0, the log of a token's ratio is clipped at -log_clip_low")
    log_clip_high: PositiveFloat = option(0.4, "where A > 0, the log of a token's ratio is clipped at log_clip_high")


class CispoOptions(TokenObjective):
    name: Literal["cispo"] = "cispo"
    clip_high: PositiveFloat = option(4.0, _HIGH)


class SapoOptions(TokenObjective):
    name: Literal["sapo"] = "sapo"
    normaliser: Normaliser = option("sequences", _NORMALISER)
    temperature_positive: PositiveFloat = option(1.0, "of the gate on the ratio where A > 0; the higher, the narrower")
    temperature_negative: PositiveFloat = option(1.05, "of the gate on the ratio elsewhere")


class VespoOptions(TokenObjective):
    name: Literal["vespo"] = "vespo"
    k_positive: PositiveFloat = option(2.0, "k of the weight w^k × exp(λ (1 - w)) where A ≥ 0")
    lambda_positive: PositiveFloat = option(3.0, "λ of that weight where A ≥ 0")
    k_negative: PositiveFloat = option(3.0, "k of that weight elsewhere")
    lambda_negative: PositiveFloat = option(2.0, "λ of that weight elsewhere")


class ReinforceOptions(TokenObjective):
    name: Literal["reinforce"] = "reinforce"


ObjectiveOptions = Annotated[
    Annotated[ClippedOptions, Tag("clipped")]
    | Annotated[GspoOptions, Tag("gspo")]
    | Annotated[GspoTokenOptions, Tag("gspo_token")]
    | Annotated[LuspoOptions, Tag("luspo")]
    | Annotated[GmpoOptions, Tag("gmpo")]
    | Annotated[CispoOptions, Tag("cispo")]
    | Annotated[SapoOptions, Tag("sapo")]
    | Annotated[VespoOptions, Tag("vespo")]
    | Annotated[ReinforceOptions, Tag("reinforce")],
    by_name("clipped"),
]
