"""Checksums that prove two sets of weights equal, however they are cut.

    checksum(tensor) = Σ  bits(element) · (splitmix64(i) | 1)   modulo 2^64,   i = the element's index in the HF tensor

`bits` is the element's bit pattern after the cast to the engine's dtype. The sum is exact, does not depend on order and
adds over shards, so every rank sums what it owns and one integer per tensor travels. Multipliers are odd, hence one
changed element always changes the sum; they depend on the index, hence moved rows do too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model.layout import Piece
from .reshard import Timings

CHUNK = 1 << 22  # elements hashed at once: bounds the int64 work space to 100 MB
_BITS = {4: torch.int32, 2: torch.int16, 1: torch.int8}


@dataclass(frozen=True)
class Receipt:
    """What one publish proved."""

    version: int  # of the weights now in the engine
    strength: str  # engine: read back · requantised: compared after the same quantisation · stream: as consumed
    tensors: int  # that this rank's engine took
    bytes: int  # of them
    received_bytes: int  # that came from other ranks
    seconds: float  # all in all, without the canary
    timings: Timings
    canary: float | None  # largest |log-prob difference| learner − engine on the canary; None: switched off
    witness: float | None = None  # the same, learner − transformers on an export; None: not asked this time


def _splitmix64(index: Tensor) -> Tensor:
    """Steele, Lea and Flood's mixer on int64 (arithmetic shifts made logical by masks)."""
    z = index * -7046029254386353131  # 0x9E3779B97F4A7C15
    z = (z ^ ((z >> 30) & 0x3FFFFFFFF)) * -4658895280553007687  # 0xBF58476D1CE4E5B9
    z = (z ^ ((z >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685  # 0x94D049BB133111EB
    return z ^ ((z >> 31) & 0x1FFFFFFFF)


@torch.no_grad()
def checksum(values: Tensor, index: Tensor) -> int:
    """Sum for `values` at HF indices `index` (same shape, int64), as a signed 64-bit integer."""
    size = values.element_size()
    bits = values.contiguous().view(_BITS[size]).to(torch.int64) & ((1 << 8 * size) - 1)
    return int((bits * (_splitmix64(index) | 1)).sum())


def tensor_checksum(tensor: Tensor) -> int:
    """The checksum of a whole HF tensor."""
    flat = tensor.reshape(-1)
    total = 0
    for begin in range(0, flat.numel(), CHUNK):
        part = flat[begin : begin + CHUNK]
        total += checksum(part, torch.arange(begin, begin + part.numel(), device=part.device))
    return _wrap(total)


def shard_checksums(
    pieces: Iterable[Piece], parameters: Mapping[tuple[int, str], Tensor], dtype: torch.dtype, names: list[str]
) -> Tensor:
    """This rank's share of every tensor's checksum, [len(names)] int64: over the elements that it owns."""
    totals = dict.fromkeys(names, 0)
    for piece in pieces:
        if piece.owner:
            totals[piece.tensor] += _piece_checksum(piece, parameters[piece.key].detach(), dtype)
    return torch.tensor([_wrap(totals[name]) for name in names], dtype=torch.int64)


def _piece_checksum(piece: Piece, parameter: Tensor, dtype: torch.dtype) -> int:
    values = parameter.narrow(piece.dim, piece.offset, piece.length)
    if values.dim() == 1:
        values = values[:, None]
    columns = piece.shape[1] if len(piece.shape) > 1 else 1  # of the HF tensor
    row, column = (piece.start, 0) if piece.dim == 0 else (0, piece.start)
    rows = max(1, CHUNK // values.shape[1])
    total = 0
    for begin in range(0, values.shape[0], rows):
        part = values[begin : begin + rows].to(dtype)
        down = torch.arange(row + begin, row + begin + part.shape[0], device=part.device)
        across = torch.arange(column, column + part.shape[1], device=part.device)
        total += checksum(part, down[:, None] * columns + across)
    return total


def _wrap(value: int) -> int:
    """A Python integer as the signed 64-bit integer that it is modulo 2^64."""
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value
