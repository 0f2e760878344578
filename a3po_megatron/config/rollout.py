"""Settings of `rollout/`: the engines' layout, sampling, and how a step's groups are collected."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, PassedThrough, Positive, PositiveFloat, Probability, Section


class RolloutOptions(Section):
    tensor: Positive = 1
    expert: Positive = 1
    data: Positive | None = None  # engines; None: ranks / tensor
    temperature: PositiveFloat = 1.0
    top_p: Probability = 1.0
    top_k: Annotated[int, Field(ge=-1)] = -1  # -1: off
    max_tokens: Positive = 1024  # response tokens; a rollout that reaches it ends with `length`
    max_prompt_tokens: Positive = 1024
    max_rounds: Positive = 4  # dynamic sampling: rounds a step may take to find enough groups with spread
    max_sequences: Positive = 256  # rollouts an engine decodes at once
    kv_cache_bytes: Positive = 256 << 20  # of one engine
    # What the engine computes its linear layers in, output layer aside; None: model.dtype. GPUs only.
    quantization: Literal["fp8_per_block"] | None = None
    bf16_layers: tuple[NonNegative, NonNegative] = (0, 0)  # with quantization: first and last layers that are left out
    batch_invariant: bool = False  # vLLM's kernels whose results do not depend on the batch: slower, learner included
    # Mixtures of experts: the learner sends every token to the experts that the engine chose for it.
    routing_replay: bool = False
    engine_args: PassedThrough = Field(default_factory=dict)  # further vLLM engine arguments, checked by name
