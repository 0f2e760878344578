"""Settings of `model/`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import PassedThrough, Section


class ModelOptions(Section):
    path: str  # folder of an HF checkpoint; relative paths: beside the config file, else in the current directory
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the learner's parameters and activations


class MegatronOptions(Section):
    extra: PassedThrough = Field(default_factory=dict)  # further TransformerConfig fields, checked by name
