"""Megatron-Core 0.16.1 on any device: what is wrong in it, and what is too slow.

| patch | symptom without it | cause |
|---|---|---|
| `gather_states` | a checkpoint of the distributed optimizer (`fully_reshardable`) holds shifted values and zeros, with a warning only: weights and moments of the last pipeline stage of a model with tied embeddings, or of any model with several buckets whose sizes are no multiples of the padding | `distrib_optimizer.py`: `get_parameter_state_dp_zero` lays buckets end to end without their padding, `sharded_param_state_fully_reshardable` looks for parameters where they are with it (its comment: "this is a bug in the param ranges logic") |
| `gather_states` | a save stalls for 12 times as long as a copy of its bytes takes, measured with one data-parallel rank | the same function zeroes, copies, gathers, concatenates and copies again |
| `output_layer_without_apex` | `RuntimeError: ColumnParallelLinear was called with gradient_accumulation_fusion set to True but the custom CUDA extension fused_weight_gradient_mlp_cuda module is not found` | Megatron's output layer needs apex where Transformer Engine's layers sum their weight gradients; the learner's head (learner/fused_head.py) takes that layer's weight and never runs it |
| `prime`, `_install_optimizer_state` | asked for before the first step: `assert len(steps) == 1`, or without `step`; set: `KeyError: step`, an in-place write to a leaf; after a load Adam counts one step per parameter, so that the second step after a resume is silently wrong | `optimizer.py` and `distrib_optimizer.py` are written for fused Adam, give SGD nothing, and give all parameters one `step` tensor |
"""  # noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

_KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED: list[torch.Tensor] = []  # what gather_states made since this was emptied: memory that nobody else writes to


@torch.no_grad()
def gather_states(
    self: Any, use_gloo_comm: bool = True, empty_data: bool = False, return_on_all_ranks: bool = False
) -> dict[Any, Any] | None:
    """Float32 parameters and moments of every buffer, whole, as the buffer lies, padding included (its values are
    nobody's); on the first rank of the data-parallel group, or, without data, on all.

    What every rank holds is written straight to where it belongs.
    """
    if not (empty_data or (use_gloo_comm and not return_on_all_ranks)):
        raise NotImplementedError("only distrib_optim_fully_reshardable_mem_efficient is supported")
    group = self.data_parallel_group_gloo
    size, rank, first = group.size(), group.rank(), dist.get_global_rank(group, 0)
    state: dict[Any, Any] = {"buckets_coalesced": True}
    for number, by_dtype in enumerate(self.gbuf_ranges):
        buffer = self.buffers[number]
        ((dtype, buckets),) = by_dtype.items()
        whole = rank == 0 or empty_data
        world: dict[str, Any] = {key: torch.empty(buffer.numel if whole else 0) for key in _KEYS}
        GATHERED.extend(() if empty_data else world.values())
        begin = 0
        for ranges, bucket in zip(buckets if not empty_data else [], buffer.buckets, strict=False):
            share = bucket.grad_data.numel() // size
            states = [
                (r["gbuf_local"], self._get_main_param_and_optimizer_states(p)) for p, r in ranges["param_map"].items()
            ]
            for key in _KEYS:
                places = [world[key][begin + share * other : begin + share * (other + 1)] for other in range(size)]
                mine = places[0] if whole else torch.empty(share)
                for span, values in states:
                    mine[span.start : span.end].copy_(values[key])
                if size > 1:
                    dist.gather(mine, places if whole else None, first, group)
            begin += bucket.grad_data.numel()
        state[number] = {dtype: world | {"numel_unpadded": buffer.numel}}
    return state if rank == 0 or empty_data else None


@contextlib.contextmanager
def output_layer_without_apex() -> Iterator[None]:
    """Within the block an output layer may be built that could not be run."""
    from megatron.core.tensor_parallel import layers

    available = layers._grad_accum_fusion_available
    layers._grad_accum_fusion_available = True
    try:
        yield
    finally:
        layers._grad_accum_fusion_available = available


def prime(optimizer: Any) -> None:
    """Gives every parameter of one of Megatron's optimizers the state that it would get at its first step."""
    for each in getattr(optimizer, "chained_optimizers", [optimizer]):
        if each.optimizer is not None:  # Megatron's stub on a rank without parameters
            _make_states(each.optimizer)
            each.init_state_fn = lambda *_: None  # done; Megatron's leaves out `step`, and SGD has none


def _make_states(optimizer: Any) -> None:
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")
    if "momentum" in optimizer.defaults:  # SGD, torch's or a fused one
        names = ("momentum_buffer",) if optimizer.defaults["momentum"] else ()
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state.update({name: torch.zeros_like(parameter) for name in names if name not in state})
            if _counts(optimizer):
                state.setdefault("step", torch.tensor(0.0))


def _counts(optimizer: Any) -> bool:
    """Whether it counts the steps of each parameter: torch's Adam does, a fused one those of a group."""
    return isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW)


def _install_optimizer_state() -> None:
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer

    def patch(kind: Any) -> None:
        load_state_dict = kind.load_state_dict

        def loaded(self: Any, state_dict: Any) -> None:
            for state in state_dict.get("optimizer", state_dict).get("state", {}).values():
                if _counts(self.optimizer) and isinstance(state, dict) and "exp_avg" in state:
                    state.setdefault("step", torch.tensor(0.0))  # `step` of 0 is not stored
            load_state_dict(self, state_dict)
            for state in self.optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()

        kind.load_state_dict = loaded

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        for name, value in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":
                value.copy_(tensors[name])

    for kind in (DistributedOptimizer, FP32Optimizer, Float16OptimizerWithFloat16Params):
        patch(kind)
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def install() -> None:
    """Installs the patches once per process."""
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    if DistributedOptimizer.get_parameter_state_dp_zero is not gather_states:
        DistributedOptimizer.get_parameter_state_dp_zero = gather_states
        _install_optimizer_state()
