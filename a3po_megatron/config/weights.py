"""Settings of `weights/`: the hand-over from learner to engine and its proof."""

from __future__ import annotations

from .section import NonNegative, Positive, PositiveFloat, Section, option


class PublishOptions(Section):
    bucket_bytes: Positive = option(
        256 << 20, "at most this many bytes travel in one collective (or one tensor, if larger)"
    )
    canary_prompts: NonNegative = option(
        4, "prompts that every engine continues, and the learner must give the same log-probs; 0: off"
    )
    canary_tokens: Positive = option(16, "of each continuation, at most")
    canary_bound: PositiveFloat | None = option(
        None,
        "of the largest difference, and 20 times that of their mean; null: 1e-4 in fp32, 1 in bf16, 4 where learner or "
        "engine compute in FP8",
    )
    witness_at_start: bool = option(
        True, "also hold the learner against transformers, which loads an export of its weights"
    )
    witness_every: NonNegative = option(0, "the same at every N-th publish; 0: never again")
