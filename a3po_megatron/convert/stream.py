"""Weights as whole HF tensors, one after the other: of an HF folder, and of a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ..files.safetensors import OpenFiles
from ..files.torch_dist_reader import Reader
from ..model.cut import tensors
from ..model.facts import ModelFacts
from ..weights.load import check_checkpoint, parts_of
from ..weights.transfer import Allocate, kept_in
from .convert import ExportOptions, read_rows_of, wanted_tensors

BUFFER_BYTES = 16 << 20  # what is read of a checkpoint at once


def stream_of_folder(
    folder: Path, facts: ModelFacts, dtype: torch.dtype, allocate: Allocate, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of an HF folder in `dtype`, or in what they are kept in. Raises RequestError for a folder that
    does not hold what its config.json implies."""
    places = check_checkpoint(folder, facts)
    with OpenFiles() as files:
        for name, tensor in tensors(facts).items():
            stored = places[name]
            whole = allocate(name, tensor.shape, kept_in(tensor, dtype), device)
            for begin, rows in parts_of(stored, 0, stored.shape[0]):
                values = torch.empty((rows, *stored.shape[1:]), dtype=stored.dtype)
                files.read(stored, begin, values)
                whole[begin : begin + rows].copy_(values)
            yield name, whole


def stream_of_checkpoint(
    source: Path, facts: ModelFacts, dtype: torch.dtype, allocate: Allocate, device: torch.device
) -> Iterator[tuple[str, Tensor]]:
    """Yields the same of a Megatron checkpoint. Raises RequestError for one that is not whole."""
    buffer = bytearray(BUFFER_BYTES)
    with Reader(source) as reader:
        reader.check_folder()
        by_name = {wanted.name: wanted for wanted in wanted_tensors(facts, reader, ExportOptions())}
        for name, tensor in tensors(facts).items():
            whole = allocate(name, tensor.shape, kept_in(tensor, dtype), device)
            begin = 0
            for values in read_rows_of(reader, by_name[name], buffer):
                whole[begin : begin + len(values)].copy_(values)
                begin += len(values)
            yield name, whole
