"""Megatron's optimizer and learning rate, of the options."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from ..config import AdamOptions, CosineSchedule, Optimizer, Schedule, SgdOptions


def optimizer_of(
    chunks: list[DistributedDataParallel], options: Optimizer, dtype: torch.dtype, gloo: bool = True
) -> MegatronOptimizer:
    """`gloo`: there are groups for the host's tensors, which saving needs."""
    own: dict[str, Any] = {}
    if isinstance(options, AdamOptions):
        own = {"adam_beta1": options.betas[0], "adam_beta2": options.betas[1], "adam_eps": options.eps}
        if options.moment_dtype != "float32":
            moments = getattr(torch, options.moment_dtype)
            # Masters whole, not as what bf16 weights lack: a checkpoint holds what it holds without this.
            own |= {"use_precision_aware_optimizer": True, "store_param_remainders": False}
            own |= {"exp_avg_dtype": moments, "exp_avg_sq_dtype": moments}
        if options.on_host:  # compat/host_adam.py
            own |= {"use_precision_aware_optimizer": True, "optimizer_cpu_offload": True}
    elif isinstance(options, SgdOptions):
        own = {"sgd_momentum": options.momentum}
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer=options.name,
            lr=options.lr,
            weight_decay=options.weight_decay,
            **own,
            clip_grad=options.clip_grad,
            use_distributed_optimizer=options.distributed,
            params_dtype=dtype,
            bf16=dtype == torch.bfloat16,
        ),
        chunks,
        use_gloo_process_groups=gloo,
    )


def schedule_of(
    optimizer: MegatronOptimizer, options: Optimizer, schedule: Schedule, steps: int
) -> OptimizerParamScheduler:
    """RL step s (from 0) trains at the rate of s + 1, so that neither the first step of a warm-up nor the last of a
    decay has rate 0."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=schedule.min_lr if isinstance(schedule, CosineSchedule) else 0.0,
        lr_warmup_steps=schedule.warmup_steps,
        lr_decay_steps=steps + 1,
        lr_decay_style=schedule.name,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
