"""Megatron's `torch_dist` format, written and read as rows of tensors, without ranks.

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

import io
import itertools
import json
import math
import os
import pickle
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, Metadata
from torch.distributed.checkpoint.filesystem import CURRENT_DCP_VERSION, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.serialization import get_crc32_options, set_crc32_options

from ..errors import RequestError
from .folder import HashedFile, Written, digest_of, read_digests
from .safetensors import read_into

OBJECTS = "__objects.distcp"
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
    kept: list[Kept] = []
    checksums = get_crc32_options()
    set_crc32_options(False)  # the archive's own checksum, which nothing reads: the file is hashed as a whole
    try:
        with HashedFile(folder / name) as file:
            for box, values in chunks:
                begin = file.bytes
                stacked = values.view(*[1] * len(box.lead), *values.shape)
                torch.save(stacked, cast(IO[bytes], file))
                kept.append(Kept(box, tuple(values.shape), values.dtype, name, begin, file.bytes - begin))
    finally:
        set_crc32_options(checksums)
    return kept, file.written()


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
        tensor = tensors.setdefault(
            box.key, TensorStorageMetadata(TensorProperties(dtype=item.dtype), torch.Size(shape), [])
        )
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


@dataclass(frozen=True)
class _Chunk:
    file: str
    offset: int  # of its archive
    length: int
    shape: tuple[int, ...]  # below the leading indices it is listed under
    row: int
    column: int
    skip: int  # elements before this matrix, where a chunk holds several


class Reader:
    """Reads boxes of a checkpoint, however it was sharded when it was written."""

    def __init__(self, folder: Path) -> None:
        """Raises RequestError where the folder is no readable torch_dist checkpoint, or a file is not as written."""
        self.folder = folder
        self._metadata = _metadata(folder)
        self.shapes = {
            key: tuple(entry.size)
            for key, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._places: dict[str, list[tuple[MetadataIndex, _StorageInfo]]] = {}
        for index, place in self._metadata.storage_data.items():
            self._places.setdefault(index.fqn, []).append((index, place))
        self._chunks: dict[tuple[str, tuple[int, ...]], list[_Chunk]] = {}
        self._data: dict[tuple[str, int], int] = {}  # (file, archive) → where its elements begin
        self._files: dict[str, IO[bytes]] = {}
        self._indexed: set[str] = set()

    def dtype(self, key: str) -> torch.dtype:
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        return entry.properties.dtype

    def files(self) -> list[str]:
        """The files that hold chunks."""
        return sorted({place.relative_path for place in self._metadata.storage_data.values()})

    def check_file(self, name: str) -> None:
        """Raises RequestError if a file is missing, cut off, or not what was hashed while it was written."""
        path = self.folder / name
        if not path.is_file():
            raise RequestError(f"{path}: the file is missing")
        need = max(
            place.offset + place.length for place in self._metadata.storage_data.values() if place.relative_path == name
        )
        if path.stat().st_size < need:
            raise RequestError(f"{path}: it has {path.stat().st_size} bytes of the {need} that .metadata places in it")
        written = read_digests(self.folder).get(name)
        if written is not None and digest_of(path) != written:
            raise RequestError(f"{path}: its bytes are not those that were written (digests.json): it is damaged")

    def read(self, box: Box, into: Tensor, lead_dims: int) -> None:
        """Fills `into` [rows, ...] (contiguous, of the stored dtype) with a box.

        Raises RequestError if the checkpoint does not hold all of it.
        """
        if box.key not in self._indexed:
            self._index(box.key, lead_dims)
        found = 0
        for chunk in self._chunks.get((box.key, box.lead), ()):
            begin, end = max(box.row, chunk.row), min(box.row + box.rows, chunk.row + chunk.shape[0])
            if begin >= end:
                continue
            width = math.prod(chunk.shape[1:])
            start = self._begin(chunk) + (chunk.skip + (begin - chunk.row) * width) * into.dtype.itemsize
            target = into[begin - box.row : end - box.row]
            if into.dim() == 1 or width == into.shape[1]:
                read_into(self._open(chunk.file), start, target)
            else:
                part = torch.empty((end - begin, width), dtype=into.dtype)
                read_into(self._open(chunk.file), start, part)
                target[:, chunk.column : chunk.column + width].copy_(part)
            found += (end - begin) * width
        if found != into.numel():
            raise RequestError(
                f"{self.folder}: {box.key} {list(box.lead)} rows {box.row} to {box.row + box.rows}: {found} of "
                f"{into.numel()} elements are in the checkpoint"
            )

    def close(self) -> None:
        for file in self._files.values():
            file.close()

    def _index(self, key: str, lead_dims: int) -> None:
        """Lists the chunks of a key under every leading index that they cover."""
        self._indexed.add(key)
        entry = self._metadata.state_dict_metadata[key]
        assert isinstance(entry, TensorStorageMetadata)
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in entry.chunks}
        for index, place in self._places.get(key, ()):
            assert index.offset is not None
            offsets = tuple(index.offset)
            shape = sizes[offsets][lead_dims:]
            column = offsets[lead_dims + 1] if len(shape) > 1 else 0
            inside = itertools.product(*(range(size) for size in sizes[offsets][:lead_dims]))
            for number, step in enumerate(inside):
                lead = tuple(offsets[d] + step[d] for d in range(lead_dims))
                skip = number * math.prod(shape)
                chunk = _Chunk(place.relative_path, place.offset, place.length, shape, offsets[lead_dims], column, skip)
                self._chunks.setdefault((key, lead), []).append(chunk)

    def _begin(self, chunk: _Chunk) -> int:
        """Where in its file the elements of a chunk begin: torch.save stores them as they are, in a zip archive."""
        known = self._data.get((chunk.file, chunk.offset))
        if known is not None:
            return known
        file = self._open(chunk.file)
        try:
            with zipfile.ZipFile(_Part(file, chunk.offset, chunk.length)) as archive:
                (data,) = [item for item in archive.infolist() if "/data/" in item.filename]
                head = archive.fp and _pread(file, chunk.offset + data.header_offset, 30)
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise RequestError(f"{file.name}: no tensor archive at byte {chunk.offset}: {error}") from error
        assert head and data.compress_type == zipfile.ZIP_STORED
        begin = chunk.offset + data.header_offset + 30 + int.from_bytes(head[26:28], "little")
        begin += int.from_bytes(head[28:30], "little")
        self._data[chunk.file, chunk.offset] = begin
        return begin

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._files:
            try:
                self._files[name] = (self.folder / name).open("rb")
            except OSError as error:
                raise RequestError(f"{self.folder / name}: cannot read it: {error.strerror}") from error
        return self._files[name]


class _Part(io.RawIOBase):
    """One archive of a file, as a file."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, position: int, whence: int = 0) -> int:
        self._at = position + (0, self._at, self._length)[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = _pread(self._file, self._offset + self._at, min(len(buffer), self._length - self._at))
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


def _pread(file: IO[bytes], offset: int, count: int) -> bytes:
    return os.pread(file.fileno(), count, offset)


def _metadata(folder: Path) -> Metadata:
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise RequestError(f"{folder / name}: the file is missing: this is no torch_dist checkpoint")
    try:
        form = json.loads((folder / "metadata.json").read_text())
    except ValueError as error:
        raise RequestError(f"{folder / 'metadata.json'}: not valid JSON: {error}") from error
    if form.get("sharded_backend") != "torch_dist":
        raise RequestError(f"{folder / 'metadata.json'}: the format is {form.get('sharded_backend')!r}, not torch_dist")
    try:
        return FileSystemReader(folder).read_metadata()
    except Exception as error:  # a damaged pickle can raise anything
        raise RequestError(f"{folder / '.metadata'}: not readable: {error!r}") from error
