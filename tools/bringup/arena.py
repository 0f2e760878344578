"""Experiment 3: the learner's tensors out of device memory and back (model/arena.py).

blocks    an optimizer's masters and moments, plain PyTorch: GB/s each way, the next step bit for bit, bytes left,
          20 cycles; beside it tensor by tensor through pageable memory, as Megatron's own offload goes
learner   the same of a whole learner on Transformer Engine, parameters and gradients too
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.model.arena import Gathered

from .measure import free_bytes, settle
from .report import Report

CYCLES = 20
# What may stay on the device of blocks that are away: the allocator rounds segments to 2 MiB, nothing else is theirs.
LEFT_BYTES = 4 << 20
# Of a whole learner: its three kinds of blocks, and what small tensors share segments of 20 MiB with others.
LEARNER_LEFT_BYTES = 64 << 20
# Between the second and the last cycle nothing may grow. Free memory is the whole device's, in pages of 2 MiB.
GROWN_BYTES = 4 << 20


class Stepper:
    """AdamW over float32 masters, with gradients drawn by step number: two of these take the same steps."""

    def __init__(self, sizes: Sequence[int], device: torch.device) -> None:
        generator = torch.Generator(device).manual_seed(0)
        self.device = device
        self.masters = [torch.nn.Parameter(torch.randn(size, generator=generator, device=device)) for size in sizes]
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-3)
        self.steps = 0
        self.step()  # the first one makes the moments

    def step(self) -> None:
        generator = torch.Generator(self.device).manual_seed(100 + self.steps)
        for master in self.masters:
            master.grad = torch.randn(master.shape, generator=generator, device=self.device)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.steps += 1

    def members(self) -> list[Tensor]:
        states = [self.optimizer.state[master] for master in self.masters]
        return [t for m, s in zip(self.masters, states, strict=True) for t in (m, s["exp_avg"], s["exp_avg_sq"])]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def cycle(block: Gathered, device: torch.device) -> tuple[float, float]:
    """Seconds away and back, each until the last byte is there."""
    settle(device)
    start = time.perf_counter()
    block.away()
    settle(device)
    middle = time.perf_counter()
    block.back()
    block.ready()
    settle(device)
    return middle - start, time.perf_counter() - middle


def pageable(members: Sequence[Tensor], device: torch.device) -> tuple[float, float]:
    """The same journey tensor by tensor through pageable memory."""
    settle(device)
    start = time.perf_counter()
    there = [member.detach().to("cpu", copy=True) for member in members]
    settle(device)
    middle = time.perf_counter()
    for member, value in zip(members, there, strict=True):
        member.data.copy_(value)
    settle(device)
    return middle - start, time.perf_counter() - middle


def blocks_on(report: Report, device: torch.device, sizes: Sequence[int], cycles: int = CYCLES) -> None:
    stays, moves = Stepper(sizes, device), Stepper(sizes, device)
    report.number("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    cuda = device.type == "cuda"
    slow = pageable(moves.members(), device)
    block = Gathered(moves.members(), device)
    block.back()
    block.ready()
    report.number("bytes", block.bytes)
    here = free_bytes() if cuda else 0
    block.away()
    if cuda:
        report.claim("bytes left on the device while away", block.bytes - (free_bytes() - here), LEFT_BYTES)
    block.back()
    block.ready()
    times, free, same = [], [], []
    for _ in range(cycles):
        times.append(cycle(block, device))
        for each in (stays, moves):
            each.step()
        same.append(equal(stays.members(), moves.members()))
        free.append(free_bytes() if cuda else 0)
    report.holds(f"the next step equal to the last bit, {cycles} times", all(same))
    if cuda and len(free) > 2:
        report.claim(f"device bytes lost over {cycles} cycles", free[1] - free[-1], GROWN_BYTES)
    rates = {
        "away": block.bytes / sorted(t[0] for t in times)[len(times) // 2] / 1e9,
        "back": block.bytes / sorted(t[1] for t in times)[len(times) // 2] / 1e9,
    }
    tensorwise = {"away": block.bytes / slow[0] / 1e9, "back": block.bytes / slow[1] / 1e9}
    report.number("GB/s, one block, pinned", rates)
    report.number("GB/s, tensor by tensor, pageable", tensorwise)
    report.number("times as fast", {way: rates[way] / tensorwise[way] for way in rates})
    # Read while away: the host's view is the tensor.
    block.away()
    report.holds(
        "readable while away, the same values",
        equal([m.cpu() for m in stays.members()], [m.cpu() for m in moves.members()]),
    )
    block.back()
    block.ready()
    report.headline(f"{rates['away']:.1f} GB/s away, {rates['back']:.1f} GB/s back, {block.bytes / 1e9:.1f} GB")


def blocks(report: Report) -> None:
    # 3 × 1.34 GB in tensors of a layer's shapes, as a rank of 8 holds of a 3 B model.
    blocks_on(report, torch.device("cuda"), [6144 * 2048, 2048 * 2048, 2048 * 2048, 2048, 151936 * 64] * 10)


def whole_learner(report: Report, make: Callable[[], Any], device: torch.device, cycles: int = CYCLES) -> None:
    """Two learners take the same steps from the same gradients; one of them leaves the device in between."""
    cuda = device.type == "cuda"
    stays, moves = make(), make()
    begun = [parameter.detach().clone() for parameter in stays.parameters().values()]
    left, free, same, seconds = [], [], [], []
    for number in range(cycles):
        for each in (stays, moves):
            fill_gradients(each, number)
            each.schedule.step(increment=1)
            each.arena.ready()
            each.optimizer.step()
        same.append(equal([*stays.parameters().values()], [*moves.parameters().values()]))
        here = free_bytes() if cuda else 0
        settle(device)
        start = time.perf_counter()
        leave(moves)
        settle(device)
        seconds.append(time.perf_counter() - start)
        if cuda:
            left.append(leaving(moves) - (free_bytes() - here))
        come_back(moves)
        settle(device)
        free.append(free_bytes() if cuda else 0)
    middle = sorted(seconds)[len(seconds) // 2]
    report.holds(f"the next step equal to the last bit, {cycles} times", all(same))
    changed = [not torch.equal(a, b) for a, b in zip(begun, stays.parameters().values(), strict=True)]
    report.holds("the steps change every tensor", all(changed))
    update(stays)
    update(moves)
    wanted, found = (torch.cat([b.grad_data.flatten() for b in buffers(each)]) for each in (stays, moves))
    # A parameter that lost its hook on the way leaves zeros: 1. Attention's backward may sum in any order, in bf16.
    report.claim("gradients of an update afterwards", float((found - wanted).norm() / wanted.norm()), 1e-2)
    report.number("bytes of the learner that leave", leaving(moves))
    report.number("seconds away, first and median", [seconds[0], middle])
    if cuda:
        # The first journey gathers what lies about in torch's pools, whose segments others may share.
        report.number("bytes left while away, first and last cycle", [left[0], left[-1]])
        report.claim("bytes left on the device while away", left[-1], LEARNER_LEFT_BYTES)
        report.claim(f"device bytes lost over {cycles} cycles", free[1] - free[-1], GROWN_BYTES)
    report.headline(f"{cycles} steps bit for bit; {leaving(moves) / 1e9:.1f} GB away in {middle:.3f} s")


def leaving(learner: Any) -> int:
    """Bytes of gradients, optimizer and parameters that a learner's arena moves, once it has moved them."""
    arena = learner.arena
    blocks = [*arena._weights, *([arena._states] if arena._states is not None else [])]
    return sum(block.bytes for block in blocks) + sum(size for _, size in arena._gradients)


def buffers(learner: Any) -> list[Any]:
    return [b for chunk in learner.chunks for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]


def leave(learner: Any) -> None:
    learner.arena.gradients_away()
    learner.arena.optimizer_away()
    learner.arena.parameters_away()


def come_back(learner: Any) -> None:
    learner.arena.parameters_back()
    learner.arena.gradients_back()
    learner.arena.optimizer_back()


def fill_gradients(learner: Any, number: int) -> None:
    """The same values into every gradient buffer of equal learners."""
    for buffer in buffers(learner):
        generator = torch.Generator(buffer.grad_data.device).manual_seed(number)
        buffer.grad_data.normal_(std=1e-3, generator=generator)


def update(learner: Any) -> None:
    """A real one, forward and backward, on rollouts of its own scores."""
    from .rank import CLIPPED, LENGTHS, batch_of, draw_sequences

    sequences = draw_sequences(learner.facts.vocab, LENGTHS)
    old = torch.cat(learner.logprobs(sequences))
    learner.update(batch_of(sequences, old, torch.linspace(-1, 1, len(sequences))), CLIPPED)


def learner(report: Report) -> None:
    from .rank import HALF_BILLION, alone, make_learner, make_model

    cluster, folder = alone(), make_model(HALF_BILLION)
    report.number("PYTORCH_CUDA_ALLOC_CONF", os.environ.get("PYTORCH_CUDA_ALLOC_CONF"))
    whole_learner(report, lambda: make_learner(cluster, folder), torch.device("cuda"))
