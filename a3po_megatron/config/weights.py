"""Settings of `weights/`: the hand-over from learner to engine and its proof."""

from __future__ import annotations

from .section import NonNegative, Positive, PositiveFloat, Section


class PublishOptions(Section):
    bucket_bytes: Positive = 256 << 20  # at most this many bytes travel in one collective (or one tensor, if larger)
    canary_prompts: NonNegative = 4  # every engine continues these; the learner must give the same log-probs; 0: off
    canary_tokens: Positive = 16  # of each continuation, at most
    # Of the largest difference; their mean may be a twentieth of it. None: 1e-4 in fp32, 1 in bf16, 4 where learner or
    # engine compute in FP8.
    canary_bound: PositiveFloat | None = None
    witness_at_start: bool = True  # also hold the learner against transformers, which loads an export of its weights
    witness_every: NonNegative = 0  # … and at every N-th publish; 0: never again
