"""Settings of the loop itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NonNegative, Positive, Section, option


class TrainerOptions(Section):
    steps: Positive = option(300, "RL steps of the whole run")
    seed: NonNegative = option(0, "of the order of prompts and of every rollout")
    prompts_per_step: Positive = option(512, "groups that a step trains on")
    rollouts_per_prompt: Annotated[int, Field(ge=2)] = option(8, "rollouts of a group")
    mini_batches: Positive = option(16, "optimizer steps per RL step")
    max_empty_steps: Positive = option(3, "steps in a row without a single group with spread; then the run ends")
    max_rejected_updates: Positive = option(
        3, "optimizer steps in a row that were not finite, hence not applied; then the run ends"
    )
