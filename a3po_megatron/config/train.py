"""Settings of the loop itself."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .section import NoEffect, NonNegative, Positive, Section, option


class TrainerOptions(Section):
    steps: Positive = option(300, "RL steps of the whole run")
    seed: NonNegative = option(0, "of the order of prompts and of every rollout")
    prompts_per_step: Positive = option(512, "groups that a step trains on")
    rollouts_per_prompt: Annotated[int, Field(ge=2)] = option(8, "rollouts of a group")
    mini_batches: Positive = option(16, "optimizer steps per RL step, however many groups it found")
    mini_batch_prompts: NonNegative = option(
        0, "instead: groups of an optimizer step, of which fewer groups make fewer; 0: mini_batches counts"
    )
    mask_truncated: bool = option(
        False, "responses that were cut off are not trained on (DAPO's overlong filtering); they count in their group"
    )
    max_empty_steps: Positive = option(3, "steps in a row without a single group with spread; then the run ends")
    max_rejected_updates: Positive = option(
        3, "optimizer steps in a row that were not finite, hence not applied; then the run ends"
    )
    without_effect = (
        NoEffect(
            ("mini_batches",),
            lambda t: bool(t.mini_batch_prompts) and t.mini_batches != t.updates(t.prompts_per_step),
            "trainer.mini_batch_prompts says how large a mini-batch is",
        ),
    )

    def updates(self, groups: int) -> int:
        """Optimizer steps that a step with so many groups makes: of mini_batch_prompts groups, as nearly as they go."""
        wanted = (groups + self.mini_batch_prompts // 2) // self.mini_batch_prompts if self.mini_batch_prompts else 0
        return max(1, min(wanted or self.mini_batches, groups))
