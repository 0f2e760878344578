"""Megatron's `torch_dist` format, written as rows of tensors, without ranks; files/torch_dist_reader.py reads it.

    metadata.json      which format this is (Megatron)
    common.pt          what is not sharded (Megatron): nothing here
    .metadata          key → global shape, chunks; chunk → file, offset (torch.distributed.checkpoint)
    __W_0.distcp       the chunks that writer W wrote, each a torch.save archive
    __objects.distcp   the one value, none, of the objects that Megatron's loader demands

A *chunk* is a box of a tensor. Megatron stacks the layers, and the experts of a layer, along leading dimensions, so a
chunk is addressed here as (key, leading indices) plus rows and columns of the matrix (or vector) below them.

Read against megatron-core 0.16.1 (dist_checkpointing/strategies/torch.py) and torch 2.13 (checkpoint/filesystem.py).
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from .hashed import HashedFile, Written

OBJECTS = "__objects.distcp"
INDEXES = (".metadata", "metadata.json", "common.pt")  # say what lies where; they are hashed too
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Box:
    """Rows of one matrix (or vector) of a stacked tensor, all columns."""

    key: str
    lead: tuple[int, ...]  # layer, expert: indices into the leading dimensions
    row: int
    rows: int


@dataclass(frozen=True)
class Kept:
    """A box and where it was written."""

    box: Box
    shape: tuple[int, ...]  # of what was written, leading dimensions aside
    dtype: torch.dtype
    file: str
    offset: int
    length: int


def write_chunks(folder: Path, name: str, chunks: Iterable[tuple[Box, Tensor]]) -> tuple[list[Kept], Written]:
    """Writes one file of chunks; each tensor is held no longer than it takes to write it."""
    entries: list[Kept] = []
    checksums = get_crc32_options()
    set_crc32_options(False)  # the archive's own checksum, which nothing reads: the file is hashed as a whole
    file = HashedFile(folder / name)
    try:
        with file:
            for box, values in chunks:
                begin = file.bytes
                # torch's reader cuts an archive's tensor along every dimension of the whole (checkpoint/filesystem.py).
                stacked = values.view(*[1] * len(box.lead), *values.shape)
                torch.save(stacked, cast(IO[bytes], file))
                entries.append(Kept(box, tuple(values.shape), values.dtype, name, begin, file.bytes - begin))
    except RuntimeError as error:
        if file.failure is not None:  # torch's archive writer replaces it by one of its own
            raise file.failure from error
        raise
    finally:
        set_crc32_options(checksums)
    return entries, file.written()


def indexes(folder: Path) -> list[Path]:
    """Returns those of INDEXES that a checkpoint has: since Megatron-Core 0.19 what is not sharded lies in a shard."""
    return [folder / name for name in INDEXES if name != "common.pt" or (folder / name).exists()]


def write_metadata(
    folder: Path, shapes: dict[str, tuple[int, ...]], kept: Sequence[Kept], objects: Iterable[str]
) -> Written:
    """Completes a checkpoint; `shapes` are the global ones, leading dimensions included, `objects` the keys of empty
    objects. Returns the file that it wrote for those."""
    tensors: dict[str, TensorStorageMetadata] = {}
    places: dict[MetadataIndex, _StorageInfo] = {}
    for item in kept:
        box, shape = item.box, shapes[item.box.key]
        offsets = torch.Size((*box.lead, box.row, *[0] * (len(shape) - len(box.lead) - 1)))
        sizes = torch.Size((*[1] * len(box.lead), *item.shape))
        whole = TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(shape), [])
        tensor = tensors.setdefault(box.key, whole)
        # The index's third field is a hint alone: where in the list of chunks to look first.
        places[MetadataIndex(box.key, offsets, len(tensor.chunks))] = _StorageInfo(item.file, item.offset, item.length)
        tensor.chunks.append(ChunkStorageMetadata(offsets, sizes))
    with HashedFile(folder / OBJECTS) as empty:
        torch.save([None], cast(IO[bytes], empty))
    entries: dict[str, Any] = {**tensors, **{key: BytesStorageMetadata() for key in objects}}
    for key in entries.keys() - tensors.keys():
        places[MetadataIndex(key)] = _StorageInfo(OBJECTS, 0, empty.bytes)
    metadata = Metadata(entries, planner_data={}, storage_data=places, version=CURRENT_DCP_VERSION)
    with (folder / ".metadata").open("wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT))
    return empty.written()
