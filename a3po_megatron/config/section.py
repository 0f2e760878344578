"""What every section of the settings is: frozen, with no unknown keys, and numbers that are finite."""

from __future__ import annotations

import json
import re
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """YAML's `true` would pass as 1."""
        wants = cls.model_fields[info.field_name].annotation if info.field_name else None
        if isinstance(value, bool) and wants is not bool:
            raise ValueError("Input should not be true or false")
        if isinstance(value, str) and re.search("[\0\ud800-\udfff]", value):
            raise ValueError("Input should be text without null characters and halves of characters")
        return value


def option(default: Any, meaning: str) -> Any:
    """The default of an option, `...` where it must be given, and what it means in one line, for `a3po options`."""
    return Field(default, description=meaning)


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
