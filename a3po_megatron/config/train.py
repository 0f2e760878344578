"""Settings of the loop itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NonNegative, Positive, Section


class TrainerOptions(Section):
    steps: Positive = 300
    seed: NonNegative = 0
    prompts_per_step: Positive = 512
    rollouts_per_prompt: Annotated[int, Field(ge=2)] = 8
    mini_batches: Positive = 16  # optimiser steps per RL step
    max_empty_steps: Positive = 3  # steps in a row without a single group with spread, then the run ends
    max_rejected_updates: Positive = (
        3  # optimiser steps in a row that were not finite, hence not applied; then the run ends
    )
