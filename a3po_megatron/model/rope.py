"""The rotary part of an HF config → its facts, as transformers 5.19 and vllm 0.32 read them.

It stands in two forms: transformers 4's (`rope_theta`, `rope_scaling`) and transformers 5's (`rope_parameters`).
Where both are filled, transformers takes `rope_scaling`: here they must agree. A member that is null is one that is
absent, except where transformers or vLLM would compute with the null, or fail on it: there it is refused by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

DEFAULT_THETA = 10000.0  # transformers' RotaryEmbeddingConfigMixin.default_theta, of all families here
_ORIGINAL = "original_max_position_embeddings"
LLAMA3 = ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)
YARN = ("factor", _ORIGINAL, "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's rope: low frequencies divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int


@dataclass(frozen=True)
class Yarn:
    """YaRN (arXiv 2309.00071): frequencies of less than `beta_slow` turns within the original context are divided by
    `factor`, those of more than `beta_fast` kept, others blended; queries and keys grow by `attention_factor`."""

    factor: float
    original_max_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True  # the ends of the blend lie at whole dimensions

    @property
    def context(self) -> int:
        """The positions that vLLM prepares for it."""
        return int(self.factor * self.original_max_positions)


@dataclass(frozen=True)
class Rope:
    theta: float
    scaling: RopeScaling | Yarn | None


def read_rope(config: dict[str, Any], where: str, max_positions: int) -> Rope:
    """The facts of a parsed config.json; `where` names it in errors, `max_positions` is its max_position_embeddings.

    Raises RequestError for two forms that contradict each other, a type or a member that is not known, and one that is
    missing or no number.
    """
    forms = [(name, config[name]) for name in ("rope_scaling", "rope_parameters") if config.get(name)]
    for name, values in forms:
        if not isinstance(values, dict):
            raise RequestError(f"{where}: {name} = {values!r} is not supported: expected an object")
    ropes = [
        Rope(_theta(config, where, name, value), _scaling(where, name, value, max_positions)) for name, value in forms
    ]
    if not ropes:
        return Rope(_theta(config, where, "rope_parameters", {}), None)
    if ropes[0].theta != ropes[-1].theta:
        raise RequestError(
            f"{where}: rope_theta is contradictory: {ropes[0].theta:g} with {forms[0][0]}, {ropes[-1].theta:g} with "
            f"{forms[-1][0]} (where neither names it, it is {DEFAULT_THETA:g})"
        )
    if ropes[0].scaling != ropes[-1].scaling:
        raise RequestError(f"{where}: rope_scaling and rope_parameters contradict each other")
    return ropes[0]


def vllm_parameters(theta: float, yarn: RopeScaling | Yarn | None) -> dict[str, Any] | None:
    """YaRN's members as vLLM takes them, of which none may be null; None where config.json will do."""
    if not isinstance(yarn, Yarn):
        return None
    return {
        "rope_type": "yarn",
        "rope_theta": theta,
        "factor": yarn.factor,
        _ORIGINAL: yarn.original_max_positions,
        "attention_factor": yarn.attention_factor,
        "beta_fast": yarn.beta_fast,
        "beta_slow": yarn.beta_slow,
        "truncate": yarn.truncate,
    }


def is_positive(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value < float("inf")


def _theta(config: dict[str, Any], where: str, name: str, values: dict[str, Any]) -> float:
    """The base of one form: its own, else the config's, else the families' default."""
    bases = {
        label: holder["rope_theta"]
        for label, holder in ((f"{name}.rope_theta", values), ("rope_theta", config))
        if "rope_theta" in holder
    }
    if not bases:
        return DEFAULT_THETA
    first = next(iter(bases))  # what transformers takes
    if bases[first] is None:
        raise RequestError(
            f"{where}: {first} = None is no base: transformers and vLLM fail on it; leave it out for {DEFAULT_THETA:g}"
        )
    known = [theta for theta in bases.values() if theta is not None]
    for theta in known:
        if not is_positive(theta):
            raise RequestError(f"{where}: rope_theta = {theta!r} is no positive number")
        if theta != known[0]:
            raise RequestError(f"{where}: rope_theta is contradictory: {known}")
    return float(known[0])


def _scaling(where: str, name: str, given: dict[str, Any], max_positions: int) -> RopeScaling | Yarn | None:
    for key in ("rope_type", "type"):
        if key in given and given[key] is None:
            raise RequestError(f"{where}: {name}.{key} = None is no type: vLLM fails on it; leave it out")
    kinds = {str(given[key]) for key in ("rope_type", "type") if key in given} or {"default"}
    if len(kinds) > 1:
        raise RequestError(f"{where}: {name} has two types: {', '.join(sorted(kinds))}")
    kind = kinds.pop()
    values = {key: value for key, value in given.items() if key not in ("rope_type", "type", "rope_theta")}
    if values.get("partial_rotary_factor") in (1, 1.0):
        del values["partial_rotary_factor"]
    if "partial_rotary_factor" in values:
        raise RequestError(
            f"{where}: {name}.partial_rotary_factor = {values['partial_rotary_factor']!r} is not supported for rope of "
            f"type {kind!r}: rope on a part of each head"
        )
    readers = {"default": _plain, "llama3": _llama3, "yarn": _yarn}
    if kind not in readers:
        raise RequestError(
            f"{where}: {name} of type {kind!r} is not supported; only unscaled, llama3 and yarn rope are"
        )
    return readers[kind](f"{where}: {name}", values, max_positions)


def _refuse_others(where: str, kind: str, values: dict[str, Any], known: tuple[str, ...]) -> None:
    """Members that this kind of rope has no use for must at least be null."""
    for key, value in values.items():
        if key not in known and value is not None:
            holds = f"; it holds {', '.join(known)}" if known else ""
            raise RequestError(f"{where}.{key} is not supported for rope of type {kind!r}{holds}")


def _plain(where: str, values: dict[str, Any], max_positions: int) -> None:
    _refuse_others(where, "default", values, ())


def _llama3(where: str, values: dict[str, Any], max_positions: int) -> RopeScaling:
    _refuse_others(where, "llama3", values, LLAMA3)
    scaling = RopeScaling(*(_number(where, "llama3", values, key) for key in LLAMA3))
    if not scaling.high_freq_factor > scaling.low_freq_factor:
        raise RequestError(f"{where}.high_freq_factor must be above low_freq_factor")
    return scaling


def _yarn(where: str, values: dict[str, Any], max_positions: int) -> Yarn:
    _refuse_others(where, "yarn", values, (*YARN, "truncate"))
    factor = _number(where, "yarn", values, "factor")
    if factor < 1:
        raise RequestError(f"{where}.factor = {factor!r} is below 1: yarn makes a context longer")
    # Both transformers and vLLM take the model's own context where it is absent, and fail where it is null.
    original = _number(where, "yarn", {_ORIGINAL: max_positions} | values, _ORIGINAL)
    if type(original) is not int:
        raise RequestError(f"{where}.{_ORIGINAL} = {original!r} is no number of positions")
    truncate = values.get("truncate", True)
    if type(truncate) is not bool:  # null would mean false, to both
        raise RequestError(f"{where}.truncate = {truncate!r} is neither true nor false")
    optional = {
        key: None if values.get(key) is None else _number(where, "yarn", values, key)
        for key in ("attention_factor", "beta_fast", "beta_slow")
    }
    fast, slow = optional["beta_fast"] or 32, optional["beta_slow"] or 1
    if fast < slow:
        raise RequestError(f"{where}.beta_fast = {fast:g} must not be below beta_slow = {slow:g}")
    attention = optional["attention_factor"] or _attention_factor(where, values, factor)
    return Yarn(float(factor), original, float(attention), float(fast), float(slow), truncate)


def _attention_factor(where: str, values: dict[str, Any], factor: float) -> float:
    """transformers' modeling_rope_utils.py: a mscale of null or 0 is as good as none."""
    scales = [values.get(key) or 0 for key in ("mscale", "mscale_all_dim")]
    for key, scale in zip(("mscale", "mscale_all_dim"), scales, strict=True):
        if type(scale) not in (int, float) or not 0 <= scale < float("inf"):
            raise RequestError(f"{where}.{key} = {scale!r} is no number of 0 or more")

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return grown(scales[0]) / grown(scales[1]) if all(scales) else grown(1)


def _number(where: str, kind: str, values: dict[str, Any], key: str) -> Any:
    if key not in values:
        raise RequestError(f"{where}.{key} is missing for rope of type {kind!r}")
    if not is_positive(values[key]):
        raise RequestError(f"{where}.{key} = {values[key]!r} is no positive number")
    return values[key]
