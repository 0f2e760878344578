"""Experiment 0: what the arena (model/arena.py) and the head (learner/fused_head.py) are built on, in seconds.

addmm in place    sums += left right, bf16 operands, sums in float32, where the sums are input and output at once
registered        1 GiB of host memory that the device copies from and to, and that is given free again
resized           a storage that goes to 0 bytes and back below tensors that view it
"""

from __future__ import annotations

import time

import torch

from a3po_megatron.learner.fused_head import _add_product
from a3po_megatron.model.arena import Block

from .measure import free_bytes, relative, settle
from .report import Report

SIZE = 1 << 30
# Float32 sums of products that are exact in it: some 1e-7 of a sum of 512; rounding the sums to bf16 would be 2^-9.
SUMS = 1e-5
SLACK = 4 << 20  # the allocator's pages of 2 MiB


def basics_on(report: Report, device: torch.device, size: int = SIZE) -> None:
    cuda = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)
    left, right = (torch.randn(shape, generator=generator, device=device) for shape in ((384, 512), (512, 256)))
    sums = torch.randn(384, 256, generator=generator, device=device)
    weight, before = right.bfloat16(), sums.double()
    left = left.bfloat16().float()  # what the head rounds to on CUDA, so that both sides multiply the same numbers
    _add_product(sums, left, weight, weight)
    error = relative(sums, before + left.double() @ weight.double())
    report.claim("addmm in place, operands bf16, sums float32: error", error, SUMS)

    values = torch.randint(0, 256, (size,), dtype=torch.uint8, device=device, generator=generator)
    kept, view = values[::4097].cpu().clone(), values[size // 2 :].view(torch.int32)
    middle = view[:1024].cpu().clone()
    began = time.perf_counter()
    block = Block(values.untyped_storage())
    report.number("seconds to register the host's twin", time.perf_counter() - began)
    here = free_bytes() if cuda else 0
    settle(device)
    began = time.perf_counter()
    block.away()
    settle(device)
    spent = time.perf_counter() - began
    report.holds("the storage is empty while it is away", block.storage.nbytes() == 0)
    if cuda:
        report.claim("bytes that stay on the device", size - (free_bytes() - here), SLACK)
    # An allocator likes to hand the same memory out again: what was there must not pass for what was copied.
    other = torch.full((size,), 7, dtype=torch.uint8, device=device)
    del other
    block.back()
    block.ready()
    report.holds("the tensor is as it was", torch.equal(values[::4097].cpu(), kept))
    report.holds("so is a view of another dtype", torch.equal(view[:1024].cpu(), middle))
    view[0] += 1
    changed = values[size // 2 : size // 2 + 4].view(torch.int32)
    report.holds("view and tensor share their memory still", bool(torch.equal(changed, view[:1])))
    report.number("GB/s away", size / spent / 1e9)
    report.headline(f"sums err by {error:.0e}; {size / 2**30:.2f} GiB away at {size / spent / 1e9:.1f} GB/s")


def basics(report: Report) -> None:
    basics_on(report, torch.device("cuda"))
