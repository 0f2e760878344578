"""Settings of `checkpoint/`: when a run saves its weights."""

from __future__ import annotations

from .section import Positive, Section


class CheckpointOptions(Section):
    every_steps: Positive = 50  # a Megatron checkpoint in checkpoints/, and one at the end of the run
    export_hf_every: Positive | None = None  # an HF folder in hf/, and one at the end; None: none
