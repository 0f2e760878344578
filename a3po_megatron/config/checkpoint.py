"""Settings of `run/`: when a run saves, what it keeps, and when it must end."""

from __future__ import annotations

from typing import Literal

from .section import NonNegative, NonNegativeFloat, Positive, Section, option


class CheckpointOptions(Section):
    every_steps: Positive = option(50, "steps between checkpoints; one more at the end of a run or when interrupted")
    keep_last: Positive = option(2, "checkpoints that are kept; older ones are removed")
    keep_every: NonNegative = option(0, "also keep those whose step is a multiple of this; 0: no others")
    time_limit_seconds: NonNegativeFloat = option(0.0, "of one start, beside the Slurm job's, if any; 0: none")
    # Where kernels do not add in a fixed order, exact would find nothing again.
    replay: Literal["exact", "all"] | None = option(
        None,
        "what a replay takes from the journal: what the very same weights sampled (exact), or also what those did that "
        "differ in the last bits (all); null: exact on a CPU and with rollout.batch_invariant, else all",
    )
    export_hf_every: NonNegative = option(0, "steps between HF folders in hf/, and one at the end; 0: none")


class CheckpointSettings(CheckpointOptions):
    replay: Literal["exact", "all"]
