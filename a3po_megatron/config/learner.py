"""Settings of `learner/`: optimiser, learning-rate schedule, micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, option

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(Section):
    name: Literal["adam", "sgd"] = option("adam", "the optimizer; adam is AdamW")
    lr: PositiveFloat = option(1e-6, "learning rate, the highest of its schedule")
    betas: tuple[Beta, Beta] = option((0.9, 0.95), "of adam: decay of the first and the second moment")
    eps: PositiveFloat = option(1e-8, "of adam: added to the root of the second moment")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.0, "of sgd")
    weight_decay: NonNegativeFloat = option(0.01, "decoupled weight decay")
    clip_grad: NonNegativeFloat = option(1.0, "largest global gradient norm over all ranks; 0: off")
    distributed: bool = option(True, "shard the optimizer's state over the data-parallel ranks")
    schedule: Literal["constant", "cosine"] = option("constant", "of the learning rate, after the warm-up")
    warmup_steps: NonNegative = option(0, "RL steps from 0 to lr")
    min_lr: NonNegativeFloat = option(0.0, "of cosine: the rate that the last step comes close to")


class LearnerOptions(Section):
    micro_batch_tokens: Positive = option(
        16384, "prompt and response tokens that are packed into one micro-batch, at most"
    )
    precision: Literal["bf16", "fp8-blockwise", "fp8-tensorwise"] | None = option(
        None, "what matrix products are computed in; null: model.dtype"
    )
    bf16_layers: tuple[NonNegative, NonNegative] = option((0, 0), "with FP8: first and last layers that stay in bf16")
    offload: Literal["none", "optimizer", "all"] | None = option(
        None, "what leaves the device while the engine samples, besides gradients; null: as docs/backends.md says"
    )
