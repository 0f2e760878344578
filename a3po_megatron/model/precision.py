"""What the learner's matrix products are computed in: Megatron's settings, and what they demand of shapes and hardware.

    fp32, bf16       as the parameters
    fp8-blockwise    e4m3; activations and gradients scaled by 1 × 128 values, weights by 128 × 128, scales in float32
    fp8-tensorwise   e4m3; one scale a tensor, from its current maximum

Only Transformer Engine's linear layers compute in FP8: embedding, output layer, norms, router and attention stay as
they are, and so do the parameters (bf16, with float32 masters), so that publish and checkpoints do not change.

Scales of powers of 2, Transformer Engine's default, are not those that vLLM and FP8 checkpoints use: float32 scales are
asked for by NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1, which it reads when it is imported (2.11, common/recipe).
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from ..config import LearnerOptions, ModelOptions, ParallelOptions
from ..errors import RequestError
from .facts import ModelFacts

FP32_SCALES = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
RECIPES = {"fp8-blockwise": "blockwise", "fp8-tensorwise": "tensorwise"}
# Tokens that a rank's share must divide by. Transformer Engine wants leading dimensions % 8 and cuBLASLt % 16; with
# sequence parallelism a blockwise column-parallel layer gathers quantised rows, whole blocks of them (2.11,
# module/linear.py: assert_dim_for_all_gather).
GRAIN = {"fp8-blockwise": 128, "fp8-tensorwise": 16}
TE_WINDOW = ((2, 9), (2, 12))  # megatron-core 0.16.1's own, upper end excluded
HOPPER = (9, 0)
BLOCKWISE_CUDA = (12, 9)  # Transformer Engine 2.11, pytorch/quantization.py


@dataclass(frozen=True)
class Hardware:
    """What is there to compute with; None: not there."""

    capability: tuple[int, int] | None  # of the weakest GPU
    cuda: tuple[int, ...] | None  # that torch is built for
    transformer_engine: tuple[int, ...] | None  # its version
    gpus: int = 1
    memory: int = 0  # bytes of the smallest GPU


def is_fp8(precision: str | None) -> bool:
    return precision in RECIPES


def megatron_settings(options: LearnerOptions, experts: bool) -> dict[str, Any]:
    """Fields of TransformerConfig that the precision decides."""
    if not is_fp8(options.precision):
        return {}
    start, end = options.bf16_layers
    settings: dict[str, Any] = {
        "fp8": "e4m3",
        "fp8_recipe": RECIPES[str(options.precision)],
        "fp8_param": False,
        "fp8_dot_product_attention": False,
        # Transformer Engine keeps a quantised copy of every weight over the micro-batches of a schedule: a forward
        # outside of one (score, canary) would use that of the weights before, and the first micro-batch's backward
        # would overwrite main_grad. Without the copies every forward quantises what is there.
        "disable_parameter_transpose_cache": True,
        "first_last_layers_bf16": bool(start or end),
        "num_layers_at_start_in_bf16": start,
        "num_layers_at_end_in_bf16": end,
    }
    if experts:
        settings["moe_router_padding_for_quantization"] = True  # every expert's tokens, to a multiple of 16
    return settings


def token_grain(precision: str | None) -> int:
    """Of which the tokens of a packed micro-batch on one rank must be a multiple (schedule/packing.py)."""
    return GRAIN.get(precision or "", 1)


def check_precision(
    options: LearnerOptions, model: ModelOptions, parallel: ParallelOptions, facts: ModelFacts, mini_batches: int
) -> None:
    """Raises RequestError for a precision that this model, layout or training recipe cannot have."""
    precision = options.precision
    wanted = "float32" if precision == "fp32" else "bfloat16"
    if precision is not None and model.dtype != wanted:
        raise RequestError(f"learner.precision: {precision} needs model.dtype: {wanted}, and it is {model.dtype}")
    if not is_fp8(precision):
        return
    if precision == "fp8-tensorwise" and mini_batches > 1:
        raise RequestError(
            f"learner.precision: fp8-tensorwise scales a pack by its largest value, and with trainer.mini_batches = "
            f"{mini_batches} a rollout is scored in another pack than it is trained in: its ratio would not be 1 "
            "before anything was learnt; use fp8-blockwise, which scales every token by itself, or one mini-batch"
        )
    ffn = facts.ffn if facts.experts is None else facts.experts.ffn
    cut = parallel.tensor if facts.experts is None else parallel.expert_tensor or parallel.tensor
    sizes = {
        "hidden_size": (facts.hidden, 1),
        "num_attention_heads × head_dim": (facts.heads * facts.head_dim, parallel.tensor),
        "num_key_value_heads × head_dim": (facts.kv_heads * facts.head_dim, parallel.tensor),
        "intermediate_size" if facts.experts is None else "moe_intermediate_size": (ffn, cut),
    }
    for name, (size, by) in sizes.items():
        # A blockwise column-parallel layer under sequence parallelism gathers whole blocks of the hidden size as well.
        blocks = precision == "fp8-blockwise" and parallel.sequence and name == "hidden_size"
        multiple = 128 if blocks else 16
        if size // by % multiple:
            share = f"{size} / {by} = {size // by}" if by > 1 else f"{size}"
            raise RequestError(
                f"learner.precision: {precision} needs the model's {name} on a rank to be a multiple of {multiple}, "
                f"and it is {share}"
            )
    stages = parallel.pipeline * parallel.virtual
    for end, count in zip(("first", "last"), options.bf16_layers, strict=True):
        if count > facts.layers // stages:
            raise RequestError(
                f"learner.bf16_layers: the {end} stage holds {facts.layers // stages} layers, fewer than {count}"
            )


def check_hardware(precision: str | None, hardware: Hardware, ranks: int = 1) -> None:
    """Raises RequestError where GPUs, torch or Transformer Engine cannot do what is asked of this machine's ranks."""
    if hardware.capability is None:
        if is_fp8(precision):
            raise RequestError(f"learner.precision: {precision} needs a GPU, and there is none here")
        return
    if hardware.cuda is None:
        raise RequestError(
            "there is a GPU, but torch is built for the CPU: see docs/h200.md, or set CUDA_VISIBLE_DEVICES= (empty) to "
            "train on the CPU"
        )
    if ranks > hardware.gpus:
        raise RequestError(
            f"the layout has {ranks} ranks (parallel.tensor × context × pipeline × data), and this machine "
            f"{hardware.gpus} GPUs: a rank takes one"
        )
    version, (low, high) = hardware.transformer_engine, TE_WINDOW
    if version is None:
        raise RequestError(
            "there is a GPU, and no Transformer Engine for it: see docs/h200.md, or set CUDA_VISIBLE_DEVICES= (empty) "
            "to train on the CPU"
        )
    if not low <= version[:2] < high:
        raise RequestError(
            f"transformer-engine {'.'.join(map(str, version))}: megatron-core 0.16.1 works with "
            f"{low[0]}.{low[1]} up to below {high[0]}.{high[1]} (constraints/h200.txt)"
        )
    if not is_fp8(precision):
        return
    if hardware.capability < HOPPER:
        here = "sm_{}{}".format(*hardware.capability)
        raise RequestError(f"learner.precision: {precision} needs a Hopper GPU (sm_90), and this one is {here}")
    if precision == "fp8-blockwise" and hardware.cuda < BLOCKWISE_CUDA:
        here = "CUDA {}.{}".format(*hardware.cuda)
        raise RequestError(f"learner.precision: fp8-blockwise needs CUDA 12.9, and torch is built for {here}")
    if precision == "fp8-blockwise" and os.environ.get(FP32_SCALES) != "1":
        raise RequestError(
            f"learner.precision: fp8-blockwise needs {FP32_SCALES}=1, and it is {os.environ.get(FP32_SCALES)!r}: the "
            "scales would be powers of 2, which are not those that the engine quantises with"
        )
