"""Megatron-Core 0.16.1 on any device: what is wrong in it, and what is too slow.

| patch | symptom without it | cause |
|---|---|---|
| `spread_states` | a checkpoint of the distributed optimizer (`fully_reshardable`) holds shifted values and zeros, with a warning only: weights and moments of the last pipeline stage of a model with tied embeddings, or of any model with several buckets whose sizes are no multiples of the padding | `distrib_optimizer.py`: `get_parameter_state_dp_zero` lays buckets end to end without their padding, `sharded_param_state_fully_reshardable` looks for parameters where they are with it (its comment: "this is a bug in the param ranges logic") |
| `spread_states` | one rank of each data-parallel group holds and writes the whole group's float32 weights and moments, 12 bytes a parameter, while the others wait, and every rank reads all of it when it goes on; with one data-parallel rank, a save stalls for 12 times as long as a copy of its bytes takes | the same function gathers every buffer to the group's first rank; it zeroes, copies, gathers, concatenates and copies again |
| `output_layer_without_apex` | `RuntimeError: ColumnParallelLinear was called with gradient_accumulation_fusion set to True but the custom CUDA extension fused_weight_gradient_mlp_cuda module is not found` | Megatron's output layer needs apex where Transformer Engine's layers sum their weight gradients; the learner's head (learner/fused_head.py) takes that layer's weight and never runs it |
| `prime`, `_install_optimizer_state` | asked for before the first step: `assert len(steps) == 1`, or without `step`; set: `KeyError: step`, an in-place write to a leaf; after a load Adam counts one step per parameter, so that the second step after a resume is silently wrong | `optimizer.py` and `distrib_optimizer.py` are written for fused Adam, give SGD nothing, and give all parameters one `step` tensor |
"""  # noqa: E501

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from .host_adam import HostAdam

_KEYS = ("param", "exp_avg", "exp_avg_sq")
GATHERED: list[torch.Tensor] = []  # what spread_states made since this was emptied: memory that nobody else writes to


def holders(begin: int, end: int, share: int) -> dict[int, slice]:
    """Returns which rank holds which elements of a parameter at [begin, end) of a bucket, of which each has `share`."""
    ranks = range(begin // share, (end - 1) // share + 1)
    return {rank: slice(max(rank * share - begin, 0), min((rank + 1) * share, end) - begin) for rank in ranks}


def owners(held: Sequence[Mapping[int, slice]], size: int) -> list[list[int]]:
    """Returns which of `size` ranks writes each of a parameter's states, from who holds which of its elements.

    A parameter that one rank holds stays there: nothing travels, and no rank holds more than its share. The few that
    lie across ranks go where there is least so far, the largest first. So no rank gets more than its share and one
    state of one parameter.
    """
    loads = [0] * size
    chosen = [list(ranks)[:1] * len(_KEYS) for ranks in held]
    split = []
    for number, parts in enumerate(held):
        numel = max(part.stop for part in parts.values())
        if len(parts) == 1:
            loads[chosen[number][0]] += numel * len(_KEYS)
        else:
            split.append((-numel, number))
    for negative, number in sorted(split):
        for which in range(len(_KEYS)):
            # Among equals one that holds a part of it: that part need not travel.
            chosen[number][which] = rank = min(range(size), key=lambda r: (loads[r], r not in held[number], r))
            loads[rank] -= negative
    return chosen


@torch.no_grad()
def spread_states(
    self: Any, model_sharded_state_dict: Any, is_loading: bool = False, metadata: Any = None
) -> dict[int, dict[str, Any]]:
    """Returns float32 parameters and moments as tensors of the parameters' shapes: to load, of those that this rank
    holds any part of, whole; to save, those that it writes. Parameters are numbered as Megatron numbers them.

    A collective over the data-parallel group. What another rank holds arrives straight where it belongs.
    """
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import is_main_replica
    from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

    sharded, _ = extract_sharded_tensors_and_factories(model_sharded_state_dict)
    # By the parameter itself: tensors hash by identity.
    described = {each.data: each for each in nested_values(sharded)}
    group = self.data_parallel_group_gloo
    size, me = group.size(), group.rank()
    parameters: list[Any] = []
    held: list[dict[int, slice]] = []
    for buffer in self.buffers:
        for parameter, (begin, end, bucket_id) in buffer.param_index_map.items():
            bucket = buffer.buckets[bucket_id]
            parameters.append(parameter)
            held.append(holders(begin - bucket.offset, end - bucket.offset, bucket.grad_data.numel() // size))
    # Where several groups hold a parameter, the one that has its main replica writes it: the others plan nothing.
    main = torch.tensor([is_main_replica(described[p].replica_id) for p in parameters], dtype=torch.uint8)
    dist.all_reduce(main, dist.ReduceOp.MAX, group)
    by_number: dict[int, dict[str, Any]] = {}
    if is_loading:
        for number, parts in enumerate(held):
            if me in parts:
                # Megatron refuses to load what does not have exactly one main copy (dist_checkpointing/validation.py).
                copy = 0 if main[number] and me == min(parts) else 1
                by_number[number] = {key: _as_parameter(described[parameters[number]], key, copy) for key in _KEYS}
        return by_number
    mine = [number for number in range(len(parameters)) if main[number]]
    plan = dict(zip(mine, owners([held[number] for number in mine], size), strict=True))
    waits: list[Any] = []
    for number in mine:
        form, parts = described[parameters[number]], held[number]
        states = self._get_main_param_and_optimizer_states(parameters[number]) if me in parts else {}
        for which, key in enumerate(_KEYS):
            owner, tag = plan[number][which], number * len(_KEYS) + which
            if owner == me:
                by_number.setdefault(number, {})[key] = _as_parameter(form, key, 0)  # the only copy that is written
                whole = by_number[number][key].data.view(-1)
                GATHERED.append(whole)
                for rank, part in parts.items():
                    if rank == me:
                        whole[part].copy_(states[key])
                    else:
                        waits.append(dist.irecv(whole[part], dist.get_global_rank(group, rank), group, tag))
            elif me in parts:
                # The group is gloo's: it sends host memory.
                piece = states[key].detach().to("cpu", torch.float32).contiguous()
                waits.append(dist.isend(piece, dist.get_global_rank(group, owner), group, tag))
    for wait in waits:
        wait.wait()
    return by_number


def _as_parameter(form: Any, key: str, copy: int) -> Any:
    """Makes room for one state of a parameter, described as the parameter is; of all copies, 0 is the main one."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    data = torch.empty(form.data.shape)
    changes: dict[str, Any] = {"key": f"optimizer.state.{key}.{form.key}", "data": data, "replica_id": copy}
    if not isinstance(form, ShardedTensorFactory):  # which has no dtype: it asks the data
        changes["dtype"] = data.dtype
    made = replace(form, **changes)
    made.validate_metadata_integrity()
    return made


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
    if isinstance(optimizer, HostAdam):
        optimizer.make_states()
        return
    if getattr(optimizer, "use_decoupled_grad", False):  # Transformer Engine's, when it is precision-aware
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                optimizer.initialize_state(parameter, store_param_remainders=False)
        return
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
                if "step" in state:  # Megatron gives all parameters one, which each would count up
                    state["step"] = state["step"].clone()

        kind.load_state_dict = loaded

    set_states_of_megatron = DistributedOptimizer._set_main_param_and_optimizer_states

    @torch.no_grad()
    def set_states(self: Any, model_param: Any, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        main = self.optimizer.param_groups[group]["params"][order]
        if isinstance(self.optimizer, HostAdam):
            self.optimizer.set_state(main, tensors)
            return
        if self.config.use_precision_aware_optimizer:
            set_states_of_megatron(self, model_param, tensors)
            return
        for name, value in {"param": main, **self.optimizer.state[main]}.items():
            if name != "step":  # which is of no element: `loaded` sets it
                value.copy_(tensors[name])

    for kind in (DistributedOptimizer, FP32Optimizer, Float16OptimizerWithFloat16Params):
        patch(kind)
    DistributedOptimizer._set_main_param_and_optimizer_states = set_states


def install() -> None:
    """Installs the patches once per process."""
    from megatron.core import optimizer
    from megatron.core.optimizer import distrib_optimizer
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

    optimizer.HybridDeviceOptimizer = distrib_optimizer.HybridDeviceOptimizer = HostAdam  # host_adam.py says why
    if DistributedOptimizer.sharded_param_state_fully_reshardable is not spread_states:
        DistributedOptimizer.sharded_param_state_fully_reshardable = spread_states
        _install_optimizer_state()
