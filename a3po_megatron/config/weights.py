"""Settings of `weights/`: the hand-over from learner to engine and its proof."""

from __future__ import annotations

from .section import NoEffect, NonNegative, Positive, PositiveFloat, Section, option

# The largest |log-prob difference| of a canary by model.dtype. Two engines that are both right differ by 0.011 in the
# mean in bf16 (Qwen3-4B; vime issue 64) and by more than ten times that at single tokens, of which a run sees tens of
# thousands; wrong weights move the mean by nats. float32: 5e-6 was measured on CPUs.
CANARY_BOUND = {"float32": 1e-4, "bfloat16": 1.0}
QUANTISED_BOUND = 4.0  # where learner or engine compute in FP8; a guess until a GPU has measured it


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
    witness_bound: PositiveFloat | None = option(
        None, "of the witness's largest difference; null: canary_bound, or as that would be without FP8 in the engine"
    )
    witness_at_start: bool = option(
        True, "also hold the learner against transformers, which loads an export of its weights"
    )
    witness_every: NonNegative = option(0, "the same at every N-th publish; 0: never again")
    without_effect = (
        NoEffect(
            ("canary_tokens", "canary_bound", "witness_bound", "witness_every"),
            lambda p: p.canary_prompts == 0,
            "publish.canary_prompts is 0 (off)",
        ),
    )


class PublishSettings(PublishOptions):
    canary_bound: PositiveFloat
    witness_bound: PositiveFloat
