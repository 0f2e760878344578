"""Settings of `telemetry/`: what a run writes down, and when it counts as stuck."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NoEffect, NonNegative, PositiveFloat, Section, option


class TelemetryOptions(Section):
    tensorboard: bool = option(True, "write events for TensorBoard")
    wandb_project: str = option("", "of Weights & Biases, where metrics and settings are sent; empty: nowhere")
    wandb_entity: str = option("", "user or team that the project belongs to; empty: as W&B has it by default")
    wandb_mode: Literal["online", "offline"] = option(
        "online", "offline: into the run folder, for `wandb sync` to send later"
    )
    rollouts: bool = option(True, "save every rollout's tokens and log-probs, compressed")
    texts_per_step: NonNegative = option(4, "groups per rank whose rollouts are saved with their texts, for the viewer")
    stall_seconds: PositiveFloat = option(300.0, "a rank counts as stuck after so long without progress, at least")
    stall_factor: Annotated[float, Field(ge=2)] = option(
        10.0, "a rank counts as stuck after so many times the longest silence of its phase so far, at least"
    )
    profile_steps: tuple[NonNegative, ...] = option((), "RL steps that are profiled, into profile/; empty: none")
    profile_kind: Literal["torch", "memory", "nsys"] = option(
        "torch", "a trace of rank 0's operations; snapshots of its GPU's memory; marks for nsys, which starts the run"
    )
    without_effect = (
        NoEffect(("wandb_entity", "wandb_mode"), lambda t: not t.wandb_project, "telemetry.wandb_project is empty"),
        NoEffect(("texts_per_step",), lambda t: not t.rollouts, "telemetry.rollouts is false"),
        NoEffect(("profile_kind",), lambda t: not t.profile_steps, "telemetry.profile_steps is empty"),
    )
