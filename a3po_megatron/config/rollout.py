"""Settings of `rollout/`: the engines' layout, sampling, and how a step's groups are collected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NoEffect, NonNegative, PassedThrough, Positive, PositiveFloat, Probability, Section, option


class RolloutOptions(Section):
    tensor: Positive = option(1, "ranks of one engine (tensor parallelism)")
    expert: Positive = option(1, "ranks of an engine over which its experts are dealt: 1 or rollout.tensor")
    data: Positive | None = option(None, "engines; null: ranks / rollout.tensor")
    temperature: PositiveFloat = option(1.0, "of sampling")
    top_p: Probability = option(1.0, "share of probability that is sampled from; 1: all")
    top_k: Annotated[int, Field(ge=-1)] = option(-1, "most probable tokens that are sampled from; -1: all")
    max_tokens: Positive = option(1024, "response tokens; a rollout that reaches it ends with `length`")
    max_prompt_tokens: Positive = option(1024, "prompt tokens, at most")
    dynamic_sampling: bool = option(
        True, "leave out groups whose verdicts are all alike, and sample others; false: train on all (GRPO)"
    )
    max_batches: Positive = option(
        4, "times trainer.prompts_per_step prompts that a step may sample to find enough groups"
    )
    max_sequences: Positive | None = option(
        None, "rollouts that an engine decodes at once; null: as many as its cache holds, on a CPU 256"
    )
    kv_cache_bytes: Positive | None = option(
        None, "of the KV cache on each rank of an engine; null: what the plan leaves (a3po plan), on a CPU 256 MiB"
    )
    quantization: Literal["none", "fp8_per_block"] = option(
        "none", "what the engine computes its linear layers in, output layer aside; none: model.dtype. fp8: GPUs only"
    )
    bf16_layers: tuple[NonNegative, NonNegative] = option(
        (0, 0), "with quantization: first and last layers that are left out"
    )
    batch_invariant: bool = option(
        False, "vLLM's kernels whose results do not depend on the batch: slower, learner included"
    )
    routing_replay: bool = option(
        False, "mixtures of experts: the learner sends every token to the experts that the engine chose for it"
    )
    engine_args: PassedThrough = option({}, "further engine arguments of vLLM, checked by name")
    without_effect = (
        NoEffect(("bf16_layers",), lambda r: r.quantization == "none", "rollout.quantization is not set"),
    )

    @property
    def longest(self) -> int:
        """Tokens of the longest sample, prompt and response."""
        return self.max_prompt_tokens + self.max_tokens


class RolloutSettings(RolloutOptions):
    data: Positive
    max_sequences: Positive
    kv_cache_bytes: Positive
