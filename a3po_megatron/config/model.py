"""Settings of `model/`."""

from __future__ import annotations

from typing import Literal

from .section import PassedThrough, Section, option


class ModelOptions(Section):
    path: str = option(..., "folder of an HF checkpoint")
    dtype: Literal["float32", "bfloat16"] | None = option(
        None, "of the learner's parameters and activations; null: bfloat16 on GPUs, float32 on a CPU"
    )


class ModelSettings(ModelOptions):
    dtype: Literal["float32", "bfloat16"]


class MegatronOptions(Section):
    extra: PassedThrough = option({}, "further fields of Megatron's TransformerConfig, checked by name")
