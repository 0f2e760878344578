"""Settings of `telemetry/`: what a run writes down."""

from __future__ import annotations

from .section import NonNegative, Section


class TelemetryOptions(Section):
    tensorboard: bool = True
    rollouts: bool = True  # save every rollout's tokens and log-probs, compressed
    texts_per_step: NonNegative = 4  # groups per rank whose rollouts are saved with their texts, for the viewer
