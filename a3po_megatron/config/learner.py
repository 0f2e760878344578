"""Settings of `learner/`: optimizer, learning-rate schedule, micro-batches."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, Tag

from .section import NoEffect, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section, by_name, option

Beta = Annotated[float, Field(ge=0, lt=1)]


class _Optimizer(Section):
    name: str
    lr: PositiveFloat = option(1e-6, "learning rate, the highest of its schedule")
    weight_decay: NonNegativeFloat = option(0.01, "decoupled weight decay")
    clip_grad: NonNegativeFloat = option(1.0, "largest global gradient norm over all ranks; 0: off")


class AdamOptions(_Optimizer):
    name: Literal["adam"] = option("adam", "the optimizer; adam is AdamW")
    betas: tuple[Beta, Beta] = option((0.9, 0.95), "decay of the first and the second moment")
    eps: PositiveFloat = option(1e-8, "added to the root of the second moment")
    distributed: bool = option(True, "shard the optimizer's state over the data-parallel ranks")
    moment_dtype: Literal["float32", "bfloat16"] = option(
        "float32", "of both moments (Megatron's precision-aware optimizer); bfloat16 saves 4 bytes a parameter"
    )
    on_host: bool = option(False, "masters and moments stay in host memory, and are updated there")


class SgdOptions(_Optimizer):
    name: Literal["sgd"] = option("sgd", "the optimizer")
    momentum: Annotated[float, Field(ge=0, lt=1)] = option(0.0, "of the gradient's running sum")
    distributed: Literal[False] = option(False, "Megatron's distributed optimizer is Adam's")


Optimizer = Annotated[Annotated[AdamOptions, Tag("adam")] | Annotated[SgdOptions, Tag("sgd")], by_name("adam")]


class _Schedule(Section):
    name: str
    warmup_steps: NonNegative = option(0, "RL steps from 0 to optimizer.lr")


class ConstantSchedule(_Schedule):
    name: Literal["constant"] = option("constant", "of the learning rate, after the warm-up")


class CosineSchedule(_Schedule):
    name: Literal["cosine"] = option("cosine", "of the learning rate, after the warm-up")
    min_lr: NonNegativeFloat = option(0.0, "the rate that the last step comes close to")


Schedule = Annotated[
    Annotated[ConstantSchedule, Tag("constant")] | Annotated[CosineSchedule, Tag("cosine")], by_name("constant")
]

Precision = Literal["fp32", "bf16", "fp8-blockwise", "fp8-tensorwise"]


class LearnerOptions(Section):
    """The throughput switches are off until they were measured on GPUs (docs/scaling.md)."""

    micro_batch_tokens: Positive | None = option(
        None,
        "prompt and response tokens that are packed into one micro-batch, at most; null: as the plan has room, on a "
        "CPU 16,384",
    )
    precision: Precision | None = option(None, "what matrix products are computed in; null: model.dtype")
    bf16_layers: tuple[NonNegative, NonNegative] = option((0, 0), "with FP8: first and last layers that stay in bf16")
    offload: Literal["none", "optimizer", "all"] | None = option(
        None, "what leaves the device while the engine samples, besides gradients; null: as the plan needs it"
    )
    recompute: Literal["none", "selective", "full"] | None = option(
        None,
        "activations that the backward computes again: none, those of MLPs or experts, or of whole layers; null: as "
        "little as the plan needs, on a CPU none",
    )
    overlap_grad_reduce: bool = option(False, "gradients are reduced while the backward goes on")
    overlap_param_gather: bool = option(
        False, "weights that data-parallel ranks updated are gathered while the next mini-batch's forward goes on"
    )
    expert_dispatcher: Literal["alltoall", "flex"] = option(
        "alltoall", "how tokens travel to experts; flex: by DeepEP's kernels"
    )
    fused_rope: bool = option(False, "rotary embeddings in one kernel; learner and engine drift apart further")
    fused_swiglu: bool = option(False, "SwiGLU in one kernel; likewise")
    old_logprobs: Literal["score", "rollout"] = option(
        "score", "what the objective clips against: the learner's own pass over the batch, or the engine's log-probs"
    )
    without_effect = (
        NoEffect(("bf16_layers",), lambda c: not (c.precision or "").startswith("fp8"), "learner.precision is not FP8"),
    )


class LearnerSettings(LearnerOptions):
    micro_batch_tokens: Positive
    recompute: Literal["none", "selective", "full"]
    precision: Precision
    offload: Literal["none", "optimizer", "all"]
