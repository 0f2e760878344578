"""Rows of logits for the Triton kernels, and the plain functions' answers (tests/test_rows_triton.py, tests/gpu)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from a3po_megatron.learner import rows, rows_triton

COLUMNS = (1, 67, 4096, 4097, 9000)  # below, at and beyond a block, and no multiple of one


def logits(columns: int, scale: float) -> Tensor:
    """[5, columns] of which one row is all -inf but one, and one all -inf."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(5, columns, generator=generator) * scale
    x[3, 1:] = float("-inf")
    x[4] = float("-inf")
    return x


def differences(device: str) -> Iterator[tuple[str, float]]:
    """What was compared, and the largest difference from the plain functions on a CPU, relative to the values."""
    for columns in COLUMNS:
        for scale in (1.0, 40.0, 1e4):
            for with_entropy in (True, False):
                x = logits(columns, scale)
                targets = torch.tensor([0, columns - 1, columns // 2, 0, 0])
                here = torch.tensor([True, True, columns > 1, True, False])
                generator = torch.Generator().manual_seed(1)
                g, h = torch.randn(2, 5, generator=generator)
                wide = torch.full((5, columns + 3), 7.0)  # strided rows whose padding would win
                wide[:, :columns] = x
                there = wide.to(device)[:, :columns]
                name = f"{columns} columns, scale {scale:g}, entropy {with_entropy}"
                plain, found = torch.zeros(4, 5), torch.zeros(4, 5, device=device)
                plain[0] = float("-inf")
                rows.measure(x.clone(), here, targets, with_entropy, plain)
                rows_triton.measure(there, here.to(device), targets.to(device), with_entropy, found)
                used = 4 if with_entropy else 2
                yield f"{name}: statistics", _relative(found[:used].cpu(), plain[:used])
                yield f"{name}: target", _relative(found[3].cpu(), plain[3])
                # The last row has no probability in this slice: another rank's maximum and sum stand for it.
                plain[0, 4], plain[1, 4] = 0.0, 1.0
                _, entropy, peak, log_z = rows.combine(plain, here, None)
                kept, asked = (peak, log_z, entropy), h if with_entropy else None
                on = [value.to(device) for value in kept]
                want = rows.gradient(x.clone(), here, targets, kept, g, asked)
                got = rows_triton.gradient(
                    there,
                    here.to(device),
                    targets.to(device),
                    (on[0], on[1], on[2]),
                    g.to(device),
                    None if asked is None else asked.to(device),
                )
                yield f"{name}: gradient", _relative(got.cpu(), want)


def _relative(found: Tensor, wanted: Tensor) -> float:
    """NaN where one is finite and the other is not."""
    assert torch.equal(found.isinf(), wanted.isinf())
    clean = [torch.where(value.isinf(), 0.0, value) for value in (found, wanted)]
    return float((clean[0] - clean[1]).norm() / clean[1].norm().clamp(min=1e-3))
