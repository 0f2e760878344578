"""Settings of `telemetry/`: what a run writes down, and when it counts as stuck."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NonNegative, PositiveFloat, Section


class TelemetryOptions(Section):
    tensorboard: bool = True
    rollouts: bool = True  # save every rollout's tokens and log-probs, compressed
    texts_per_step: NonNegative = 4  # groups per rank whose rollouts are saved with their texts, for the viewer
    stall_seconds: PositiveFloat = 300.0  # a rank may be without progress at least so long, and
    stall_factor: Annotated[float, Field(ge=2)] = 10.0  # so many times the longest silence of its phase so far
