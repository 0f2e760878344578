"""A learner's weights as an HF folder, written while they are gathered: no rank holds more than a bucket of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RunFailed
from ..files.hashed import save_digests
from ..files.replace import whole_folder
from ..files.safetensors import INDEX, file_names, save_index, split_files, write_file
from ..files.side_files import copy_side_files
from ..model.cut import HfTensor
from ..telemetry.clock import CLOCK
from .load import all_finite
from .transfer import kept_in

SHARD_BYTES = 5_000_000_000


def export_stream(
    stream: Iterator[tuple[str, Tensor]],
    tensors: Sequence[HfTensor],  # in the order of the stream
    dtype: torch.dtype,  # of the model
    source: Path,  # an HF folder with the configuration and tokenizer of the model
    target: Path | None,  # None: this rank takes part in gathering, and writes nothing
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `target`, whole or not at all. Raises RunFailed if the stream is not exactly `tensors`."""
    if target is None:
        for _ in stream:
            CLOCK.beat()
        return
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    dtypes = {tensor.name: kept_in(tensor, dtype) for tensor in tensors}
    sizes = {tensor.name: tensor.numel * dtypes[tensor.name].itemsize for tensor in tensors}
    groups = split_files(sizes, shard_bytes)
    names = file_names(len(groups))
    with whole_folder(target) as folder:
        written = [
            write_file(
                folder,
                file,
                {name: shapes[name] for name in group},
                {name: dtypes[name] for name in group},
                _next(stream, group),
            )
            for file, group in zip(names, groups, strict=True)
        ]
        if more := next(stream, None):
            raise RunFailed(f"export: {more[0]} is no tensor of this model")
        if len(groups) > 1:
            where = {name: file for file, group in zip(names, groups, strict=True) for name in group}
            save_index(folder, where, sum(sizes.values()))
        copy_side_files(source, folder, str(dtype).removeprefix("torch."))
        save_digests(folder, written, [INDEX] if len(groups) > 1 else [])


def _next(stream: Iterator[tuple[str, Tensor]], names: list[str]) -> Iterator[Tensor]:
    for name in names:
        next_name, tensor = next(stream, ("nothing", None))
        if next_name != name or tensor is None:
            raise RunFailed(f"export: {name} was expected next, {next_name} came")
        if not all_finite(tensor):
            raise RunFailed(f"export: {name} holds a value that is not finite")
        yield tensor.cpu()
        CLOCK.beat()  # it has been written
