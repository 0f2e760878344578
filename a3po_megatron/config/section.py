"""What every section of the settings is: frozen, with no unknown keys, and numbers that are finite.

`null` means one thing everywhere: the option follows from others, or is as it is by default. What is off says so, with
0, `none` or an empty text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    ValidationInfo,
    field_validator,
)


class NoEffect(NamedTuple):
    """Options of a section that change nothing where its other options are as `when` says."""

    options: tuple[str, ...]
    when: Callable[[Any], bool]  # of the section
    because: str


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)
    without_effect: ClassVar[tuple[NoEffect, ...]] = ()  # refused where they are given a value of their own

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `true` would pass as 1."""
        wants = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and wants not in (bool, Literal[False]):
            raise ValueError("Input should not be true or false")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError("Input should be text without null characters and halves of characters")
        return value


def option(default: Any, meaning: str) -> Any:
    """The default of an option, `...` where it must be given, and what it means in one line, for `a3po options`."""
    return Field(default, description=meaning)


def by_name(default: str) -> Discriminator:
    """Tells what a section is that may be one of several: what its `name` says, which need not be given."""
    return Discriminator(lambda value: value.get("name", default) if isinstance(value, dict) else value.name)


def or_off(*, least: float | None = None, above: float | None = None) -> AfterValidator:
    """For a number that is 0 where it is off."""

    def check(value: float) -> float:
        if value and ((least is not None and value < least) or (above is not None and value <= above)):
            wanted = f"at least {least:g}" if least is not None else f"greater than {above:g}"
            raise ValueError(f"Input should be {wanted}, or 0 for off")
        return value

    return AfterValidator(check)


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegativeFloat = Annotated[float, Field(ge=0)]
Probability = Annotated[float, Field(gt=0, le=1)]


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """Pass-through values are written down with the run: what JSON cannot hold would come back as something else."""
    json.dumps(values, allow_nan=False)
    return values


PassedThrough = Annotated[dict[str, Any], AfterValidator(_plain)]
