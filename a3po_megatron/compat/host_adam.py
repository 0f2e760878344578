"""AdamW whose masters and moments never leave the host, in the place of Megatron-Core 0.16.1's HybridDeviceOptimizer.

| symptom without it | cause |
|---|---|
| nothing can be saved before the first step, and the first load takes a step of random gradients | it has no states until it steps; `dummy_step` |
| 4 bytes a parameter of pinned memory, for gradients alone | `cpu_copy_map_grad` has one for each parameter |
| without a GPU `KeyError` in the first step, so that no test can hold it | `_set_sub_optimizer_grads` knows only parameters that it took from a GPU |

    p          a shard of the weights on the device, bf16 or float32, which the step writes
    master     p in float32, on the host, beside exp_avg and exp_avg_sq, float32, too
    step       gradient → host, AdamW there by torch's fused kernel, master → p in p's dtype

What travels passes through two slots of pinned memory, each as long as the longest parameter: while one parameter is
updated, the next one's gradient comes. Gradients are read from `decoupled_grad`, as Megatron's precision-aware
optimizers do: norm and clipping happen on the device, before.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

STATES = ("exp_avg", "exp_avg_sq")


class HostAdam(torch.optim.Optimizer):
    def __init__(
        self,
        params: Any,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        weight_decay: float,
        **_: Any,  # what Megatron's own would be told of devices
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        # A fused Adam, which a checkpoint may be taken up by, asks each group for this.
        defaults["bias_correction"] = True
        # torch refuses parameters that are no leaves: Megatron's shards of float32 buffers are views.
        super().__init__([torch.nn.Parameter(torch.empty(0))], defaults)
        self.param_groups = [{**defaults, **group, "params": list(group["params"])} for group in params]
        self._slots: list[_Slot] = []

    def make_states(self) -> None:
        """Masters of the weights as they are, moments of 0: before the first step or load."""
        for _, parameter in self._parameters():
            if parameter not in self.state:
                # Ordinary memory: what travels passes through the slots.
                master = torch.empty(parameter.shape, dtype=torch.float32).copy_(parameter.detach())
                zeros = {name: torch.zeros(parameter.shape) for name in STATES}
                self.state[parameter] = {"step": torch.tensor(0.0), "master_param": master, **zeros}

    @property
    def sub_optimizers(self) -> list[torch.optim.Optimizer]:
        """Those that Megatron asks for the count of steps: torch's own, of which there is none here."""
        return []

    def _sync_hdo_state_to_sub_optimizers(self) -> None:
        """Megatron's call after a load: there is nobody else to tell."""

    def update_fp32_param_by_new_param(self) -> None:
        """Megatron's call when weights were written by someone else."""
        for _, parameter in self._parameters():
            self.state[parameter]["master_param"].copy_(parameter.detach())

    def set_state(self, parameter: Tensor, tensors: dict[str, Tensor]) -> None:
        """Takes over what a checkpoint holds of a shard: `param`, `exp_avg`, `exp_avg_sq`, float32."""
        state = self.state[parameter]
        for name, value in {"param": state["master_param"], **{name: state[name] for name in STATES}}.items():
            value.copy_(tensors[name])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the groups' settings; states come by `set_state`."""
        for group, loaded in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({name: value for name, value in loaded.items() if name != "params"})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        work = [(group, p) for group, p in self._parameters() if getattr(p, "decoupled_grad", None) is not None]
        if not work:
            return
        if not self._slots:
            largest = max(parameter.numel() for _, parameter in work)
            self._slots = [_Slot(largest, work[0][1].device) for _ in range(2)]
        self._slots[0].fetch(work[0][1])
        for number, (group, parameter) in enumerate(work):
            slot, other = self._slots[number % 2], self._slots[(number + 1) % 2]
            if number + 1 < len(work):
                other.fetch(work[number + 1][1])
            state = self.state[parameter]
            adamw(
                [state["master_param"]],
                [slot.gradient(parameter)],
                [state["exp_avg"]],
                [state["exp_avg_sq"]],
                [],  # AMSGrad's
                [state["step"]],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            slot.send(state["master_param"], parameter)
        # Where Transformer Engine is installed, Megatron stores the count of steps of the groups.
        steps = int(self.state[work[0][1]]["step"])
        for group in self.param_groups:
            group["step"] = steps

    def _parameters(self) -> Iterator[tuple[dict[str, Any], Tensor]]:
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, parameter


class _Slot:
    """Room on the host for one parameter's gradient on its way down, and its weights on their way up."""

    def __init__(self, elements: int, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._down = torch.empty(elements, dtype=torch.float32, pin_memory=self._on_gpu)
        self._up = torch.empty(4 * elements, dtype=torch.uint8, pin_memory=self._on_gpu)
        self._stream = torch.cuda.Stream() if self._on_gpu else None
        self._arrived: Any = None

    def fetch(self, parameter: Any) -> None:
        """Begins to copy the parameter's gradient; the slot's weights of before are on the device by then."""
        gradient = parameter.decoupled_grad.detach()
        room = self._down[: gradient.numel()].view(gradient.shape)
        if self._stream is None:
            room.copy_(gradient)
            return
        self._stream.wait_stream(torch.cuda.current_stream())  # whoever wrote the gradient
        with torch.cuda.stream(self._stream):
            room.copy_(gradient, non_blocking=True)
            self._arrived = self._stream.record_event()

    def gradient(self, parameter: Tensor) -> Tensor:
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._down[: parameter.numel()].view(parameter.shape)

    def send(self, master: Tensor, parameter: Tensor) -> None:
        """Writes the weights, rounded on the host, so that half as much travels."""
        if self._stream is None:
            parameter.data.copy_(master)
            return
        self._stream.synchronize()  # what this slot sent before has left it
        rounded = self._up[: parameter.nbytes].view(parameter.dtype).view(parameter.shape).copy_(master)
        with torch.cuda.stream(self._stream):
            parameter.data.copy_(rounded, non_blocking=True)
        torch.cuda.current_stream().wait_stream(self._stream)
