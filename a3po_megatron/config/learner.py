"""Settings of `learner/`: optimiser, learning-rate schedule, micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .section import NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerOptions(Section):
    name: Literal["adam", "sgd"] = "adam"  # adam is AdamW
    lr: PositiveFloat = 1e-6
    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0  # sgd
    weight_decay: NonNegativeFloat = 0.01
    clip_grad: NonNegativeFloat = 1.0  # global gradient norm over all ranks; 0: off
    distributed: bool = True  # optimiser state sharded over data-parallel ranks
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: NonNegative = 0  # RL steps from 0 to lr
    min_lr: NonNegativeFloat = 0.0  # cosine: the rate that the last step comes close to


class LearnerOptions(Section):
    micro_batch_tokens: Positive = 16384  # prompt and response tokens packed into one micro-batch, at most
    # What matrix products are computed in; None: model.dtype (model/precision.py).
    precision: Literal["bf16", "fp8-blockwise", "fp8-tensorwise"] | None = None
    bf16_layers: tuple[NonNegative, NonNegative] = (0, 0)  # with FP8: first and last layers that stay in bf16
    # What leaves the device while the engine samples, besides gradients; None: as docs/backends.md says.
    offload: Literal["none", "optimizer", "all"] | None = None
