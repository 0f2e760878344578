"""Tensors that are stored in FP8, with the scales that belong to them.

    value[i, j] = float32(code[i, j]) × float32(scale[i // rows, j // columns])       then rounded to the model's dtype

as transformers' Fp8Dequantize computes it (integrations/finegrained_fp8.py). That one derives the block from the sizes
of the scales, which is another one where the last block of a row or column is cut short: here, as in vLLM, the block is
the one that config.json names. Scales are float32 or bfloat16, or powers of 2 by their exponent (F8_E8M0, or U8).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.safetensors import CODES, OpenFiles, Stored
from ..model.quantised import Fp8

CODE = "F8_E4M3"
SCALES = ("_scale_inv", "_scale")  # of NAME.weight: NAME.weight_scale_inv; both are multiplied with
UNUSED = (".input_scale", ".activation_scale")  # of activations, which stay as they are here
SCALE_CODES = ("F32", "BF16", "F8_E8M0", "U8")


@dataclass(frozen=True)
class Quantised(Stored):
    """A tensor of which `path` and `offset` say where its codes are; `code` and `dtype` are those of its values."""

    scale: Stored
    block: tuple[int, int]  # rows and columns that share a scale

    def paths(self) -> tuple[Path, ...]:
        return self.path, self.scale.path


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def rounded_to(folder: Path, named: str | None) -> torch.dtype:
    """What FP8 is rounded to: the dtype that config.json names, as transformers takes it; else bfloat16."""
    dtypes = {name_of(dtype): dtype for dtype in CODES}
    if named not in (None, *dtypes):
        raise RequestError(f"{folder}/config.json: dtype = {named!r}: FP8 can be rounded to {', '.join(dtypes)}")
    return dtypes[named or "bfloat16"]


def pair_scales(found: dict[str, Stored], fp8: Fp8, dtype: torch.dtype, folder: Path) -> dict[str, Stored]:
    """The tensors of a folder, those in FP8 together with their scales, as tensors of `dtype`.

    Raises RequestError, naming the tensor, for codes without scales, scales without codes or of another shape than the
    blocks make, and a folder without any FP8.
    """
    paired: dict[str, Stored] = {}
    scales: set[str] = set()
    for name, stored in found.items():
        if stored.code != CODE:
            continue
        scale = next((name + ending for ending in SCALES if name + ending in found), None)
        if scale is None:
            raise RequestError(f"{stored.path}: {name} is stored as {CODE}, without its scale ({name}{SCALES[0]})")
        scales.add(scale)
        paired[name] = _paired(name, stored, scale, found[scale], fp8, dtype)
    if not paired:
        raise RequestError(
            f"{folder}: config.json says that weights are in fp8 (quantization_config), but none is stored as {CODE}: "
            "remove that field if they are whole"
        )
    rest = {
        name: stored
        for name, stored in found.items()
        if name not in paired and name not in scales and not name.endswith(UNUSED)
    }
    for name, stored in rest.items():
        for ending in SCALES:
            if name.endswith(f".weight{ending}"):
                raise RequestError(
                    f"{stored.path}: {name} is the scale of a tensor that is not stored as {CODE}: what its values are "
                    "cannot be said"
                )
    return paired | rest


def _paired(name: str, stored: Stored, scale: str, scales: Stored, fp8: Fp8, dtype: torch.dtype) -> Quantised:
    if len(stored.shape) != 2:
        raise RequestError(
            f"{stored.path}: {name} has shape {stored.shape} in {CODE}: only matrices are read (experts must be apart)"
        )
    if scales.code not in SCALE_CODES:
        raise RequestError(f"{scales.path}: {scale} is stored as {scales.code}: expected {', '.join(SCALE_CODES)}")
    block = fp8.block or stored.shape
    grid = tuple(-(-size // by) for size, by in zip(stored.shape, block, strict=True))
    one = fp8.block is None and scales.shape in ((), (1,))
    if scales.shape != grid and not one:
        raise RequestError(
            f"{scales.path}: {scale} has shape {scales.shape}, but {name} {stored.shape} has {grid[0]} × {grid[1]} "
            f"blocks of {block[0]} × {block[1]} (quantization_config.weight_block_size)"
        )
    whole = Stored(scales.path, scales.code, grid, scales.offset)
    return Quantised(stored.path, CODES[dtype], stored.shape, stored.offset, whole, (block[0], block[1]))


def read_values(files: OpenFiles, stored: Stored, start: int, values: Tensor) -> None:
    """Fills `values` (contiguous, of `stored.dtype`) with a tensor's rows from `start` on."""
    if not isinstance(stored, Quantised):
        files.read(stored, start, values)
        return
    (rows, columns), end = stored.block, start + len(values)
    codes = torch.empty(values.shape, dtype=torch.float8_e4m3fn)
    files.read(Stored(stored.path, CODE, stored.shape, stored.offset), start, codes)
    first = start // rows
    scales = torch.empty((-(-end // rows) - first, stored.scale.shape[1]), dtype=stored.scale.dtype)
    files.read(stored.scale, first, scales)
    by_column = _factors(scales).repeat_interleave(columns, dim=1)[:, : values.shape[1]]
    for number in range(first, first + len(scales)):
        here = slice(max(number * rows, start) - start, min((number + 1) * rows, end) - start)
        values[here] = (codes[here].float() * by_column[number - first]).to(values.dtype)


def _factors(scales: Tensor) -> Tensor:
    if scales.dtype == torch.uint8:
        return (scales.float() - 127).exp2()
    return scales.float()
