"""Settings of `checkpoint/`: when a run saves, what it keeps, and when it must end."""

from __future__ import annotations

from typing import Literal

from .section import Positive, PositiveFloat, Section


class CheckpointOptions(Section):
    every_steps: Positive = 50  # a checkpoint in checkpoints/, and one at the end of the run or when it is interrupted
    keep_last: Positive = 2  # older ones are removed,
    keep_every: Positive | None = None  # but for those whose step is a multiple of this; None: no others
    time_limit_seconds: PositiveFloat | None = None  # of one start; None: the Slurm job's, if any
    # What a replay takes from the journal: what the very same weights sampled, or, where kernels do not add in a fixed
    # order, also what those sampled that differ from them in the last bits. None: exact on a CPU, and on a GPU with
    # rollout.batch_invariant; else all, since nothing would be found again.
    replay: Literal["exact", "all"] | None = None
    export_hf_every: Positive | None = None  # an HF folder in hf/, and one at the end; None: none
