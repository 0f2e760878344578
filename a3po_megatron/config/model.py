"""Settings of `model/`."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .section import PassedThrough, Section


class ModelOptions(Section):
    path: str  # folder of an HF checkpoint; relative paths: beside the config file, else in the current directory
    # Of the learner's parameters and activations; None: bfloat16 on GPUs, float32 on a CPU.
    dtype: Literal["float32", "bfloat16"] | None = None

    def known_dtype(self) -> Literal["float32", "bfloat16"]:
        """A run's, which is filled in when it starts."""
        assert self.dtype is not None, "Config.on fills it in"
        return self.dtype


class MegatronOptions(Section):
    extra: PassedThrough = Field(default_factory=dict)  # further TransformerConfig fields, checked by name
