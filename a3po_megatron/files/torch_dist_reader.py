"""Reads Megatron's `torch_dist` format (files/torch_dist.py) as rows of tensors, however it was sharded, without ranks.

A checkpoint may come from anywhere: pickles are read without running anything that they name, and what two chunks, or
none, would fill is refused.
"""

from __future__ import annotations

import bisect
import io
import itertools
import json
import math
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import Metadata
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from ..errors import RequestError
from .hashed import check_digest, read_digests
from .safetensors import read_into
from .torch_dist import INDEXES, Box, indexes


@dataclass(frozen=True)
class _Chunk:
    file: str
    offset: int  # of its archive
    length: int
    whole: tuple[int, ...]  # shape of what the archive holds
    rows: int  # of the matrix (or vector) below the leading indices it is listed under
    row: int
    skip: int  # elements before this matrix, where a chunk holds several


@dataclass
class _Column:
    """The chunks of one matrix that lie below each other."""

    first: int  # column of the matrix
    width: int
    starts: list[int]  # row of each chunk, ascending
    chunks: list[_Chunk]


class Reader:
    """Reads boxes of a checkpoint, however it was sharded when it was written. Use it in a `with` block."""

    _OPEN_FILES = 32  # a checkpoint has as many as ranks, and a process may often have 1,024

    def __init__(self, folder: Path) -> None:
        """Raises RequestError where the folder is no readable torch_dist checkpoint."""
        self.folder = folder
        metadata = _metadata(folder)
        try:
            entries = metadata.state_dict_metadata.items()
            self._tensors = {key: entry for key, entry in entries if isinstance(entry, TensorStorageMetadata)}
            self.shapes = {key: tuple(entry.size) for key, entry in self._tensors.items()}
            self.dtypes = {key: entry.properties.dtype for key, entry in self._tensors.items()}
            self._places: dict[str, list[tuple[tuple[int, ...], _StorageInfo]]] = {}
            self._ends: dict[str, int] = {}
            for index, place in metadata.storage_data.items():
                self._places.setdefault(index.fqn, []).append((tuple(index.offset or ()), place))
                end = place.offset + place.length
                self._ends[place.relative_path] = max(end, self._ends.get(place.relative_path, 0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RequestError(f"{folder / '.metadata'}: not readable: {error!r}") from error
        self._columns: dict[tuple[str, tuple[int, ...]], list[_Column]] = {}
        self._begins: dict[tuple[str, int], int] = {}  # (file, archive) → where its elements begin
        self._files: dict[str, IO[bytes]] = {}
        self._indexed: set[str] = set()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def check_folder(self) -> list[str]:
        """Returns the files that hold chunks, once the small ones that say where they lie agree with their digests.

        Raises RequestError for a file that is missing, cut off, unknown to digests.json, or not as it was written.
        """
        stored = read_digests(self.folder)
        for path in [*indexes(self.folder), *(self.folder / name for name in INDEXES if name in stored)]:
            check_digest(path, stored)
        for name, need in self._ends.items():
            path = self.folder / name  # as .metadata calls it: it must not lead out of the folder
            if path.parent != self.folder or not path.is_file():
                raise RequestError(f"{path}: the file is missing")
            if path.stat().st_size < need:
                size = path.stat().st_size
                raise RequestError(f"{path}: it has {size} bytes of the {need} that .metadata places in it")
        return sorted(self._ends)

    def read(self, box: Box, into: Tensor) -> None:
        """Fills `into` [rows, ...] (contiguous, of the stored dtype) with a box.

        Raises RequestError if the checkpoint does not hold all of it, exactly once.
        """
        if box.key not in self._indexed:
            self._index(box.key, len(box.lead))
        elements = 0
        for column in self._columns.get((box.key, box.lead), ()):
            # The last chunk that begins at the box's first row or above it: those before it end above the box.
            number = max(0, bisect.bisect_right(column.starts, box.row) - 1)
            for chunk in column.chunks[number:]:
                begin, end = max(box.row, chunk.row), min(box.row + box.rows, chunk.row + chunk.rows)
                if chunk.row >= box.row + box.rows:
                    break
                if begin >= end:
                    continue
                start = self._begin(box.key, chunk)
                start += (chunk.skip + (begin - chunk.row) * column.width) * into.dtype.itemsize
                target = into[begin - box.row : end - box.row]
                # All columns of the target lie as they do in the file; some of them do not.
                if into.dim() == 1 or column.width == into.shape[1]:
                    read_into(self._open(chunk.file), start, target)
                else:
                    part = torch.empty((end - begin, column.width), dtype=into.dtype)
                    read_into(self._open(chunk.file), start, part)
                    target[:, column.first : column.first + column.width].copy_(part)
                elements += (end - begin) * column.width
        # No chunks overlap (`_index`): as many elements as were asked for are all of them.
        if elements != into.numel():
            raise RequestError(
                f"{self.folder}: {box.key} {list(box.lead)} rows {box.row} to {box.row + box.rows}: {elements} of "
                f"{into.numel()} elements are in the checkpoint"
            )

    def _index(self, key: str, lead: int) -> None:
        """Lists the chunks of a key under every leading index that they cover, `lead` of its dimensions being those.

        Raises RequestError where two chunks overlap: which of them counts would be chance.
        """
        self._indexed.add(key)
        sizes = {tuple(chunk.offsets): tuple(chunk.sizes) for chunk in self._tensors[key].chunks}
        by_tensor: dict[tuple[str, tuple[int, ...]], dict[tuple[int, int], list[_Chunk]]] = {}
        for offsets, place in self._places.get(key, ()):
            whole = sizes.get(offsets)
            if whole is None or len(whole) <= lead or len(offsets) != len(whole):
                raise RequestError(f"{self.folder}: {key}: .metadata places a chunk at {offsets} that it does not list")
            shape, below = whole[lead:], offsets[lead:]
            width, first = math.prod(shape[1:]), below[1] if len(below) > 1 else 0
            # A chunk may cover several leading indices (layers, experts): their matrices lie in it end to end.
            for number, step in enumerate(itertools.product(*(range(size) for size in whole[:lead]))):
                index = tuple(offset + inside for offset, inside in zip(offsets, step, strict=False))
                skip = number * math.prod(shape)
                chunk = _Chunk(place.relative_path, place.offset, place.length, whole, shape[0], below[0], skip)
                by_tensor.setdefault((key, index), {}).setdefault((first, width), []).append(chunk)
        for place_of, by_column in by_tensor.items():
            columns = []
            for (first, width), chunks in sorted(by_column.items()):
                chunks.sort(key=lambda chunk: chunk.row)
                columns.append(_Column(first, width, [chunk.row for chunk in chunks], chunks))
                if any(above.row + above.rows > chunk.row for above, chunk in itertools.pairwise(chunks)):
                    raise RequestError(f"{self.folder}: {key} {list(place_of[1])}: chunks overlap")
            if any(left.first + left.width > right.first for left, right in itertools.pairwise(columns)):
                raise RequestError(f"{self.folder}: {key} {list(place_of[1])}: chunks overlap")
            self._columns[place_of] = columns

    def _begin(self, key: str, chunk: _Chunk) -> int:
        """Returns where in its file a chunk's elements begin: torch.save stores them as they are, in a zip archive.

        Raises RequestError for an archive that does not hold just this chunk, its elements in their order.
        """
        known = self._begins.get((chunk.file, chunk.offset))
        if known is not None:
            return known
        file = self._open(chunk.file)
        where = f"{file.name}: {key}, at byte {chunk.offset}"
        try:
            with zipfile.ZipFile(_Part(file, chunk.offset, chunk.length)) as archive:
                (pickled,) = [item for item in archive.infolist() if item.filename.endswith("/data.pkl")]
                # Its checksum is not looked at: torch can be told to write none, as `write_chunks` does.
                text = os.pread(file.fileno(), pickled.file_size, self._data(file, chunk, pickled))
                tensor = _Described(io.BytesIO(text)).load()
                data = archive.getinfo(f"{pickled.filename.removesuffix('.pkl')}/{tensor.storage}")
            size = math.prod(chunk.whole) * self.dtypes[key].itemsize
            if not isinstance(tensor, _TensorOf) or data.compress_type != zipfile.ZIP_STORED:
                raise ValueError("it is no plain tensor")
            if (tensor.dtype, tensor.shape, data.file_size) != (self.dtypes[key], chunk.whole, size):
                raise ValueError(f"it holds {tensor.dtype} {tensor.shape} in {data.file_size} bytes")
            if tensor.offset or not _contiguous(tensor.shape, tensor.stride):
                raise ValueError(f"its elements are not in their order (strides {tensor.stride})")
        except (zipfile.BadZipFile, pickle.UnpicklingError, AttributeError, EOFError, KeyError, ValueError) as error:
            raise RequestError(f"{where}: not the archive of a chunk {chunk.whole}: {error}") from error
        self._begins[chunk.file, chunk.offset] = begin = self._data(file, chunk, data)
        return begin

    @staticmethod
    def _data(file: IO[bytes], chunk: _Chunk, item: zipfile.ZipInfo) -> int:
        """Returns where in the file an archive's item begins: after its local header, which has its own lengths."""
        # 30 bytes, the last four two lengths: of the name, and of the extra field with which torch aligns the data.
        head = os.pread(file.fileno(), 30, chunk.offset + item.header_offset)
        lengths = int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
        return chunk.offset + item.header_offset + 30 + lengths

    def _open(self, name: str) -> IO[bytes]:
        if name not in self._files:
            if len(self._files) >= self._OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
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
        data = os.pread(self._file.fileno(), min(len(buffer), self._length - self._at), self._offset + self._at)
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)


STORAGES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "IntStorage": torch.int32,  # not read, but named in the refusal
    "LongStorage": torch.int64,
}


@dataclass(frozen=True)
class _TensorOf:
    """What a torch.save archive says of its tensor."""

    dtype: torch.dtype
    storage: str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _described(storage: tuple[torch.dtype, str], offset: int, shape: Any, stride: Any, *_: Any) -> _TensorOf:
    """Takes the arguments of torch's `_rebuild_tensor_v2`."""
    return _TensorOf(storage[0], storage[1], offset, tuple(shape), tuple(stride))


class _Described(pickle.Unpickler):
    """Reads the description of a saved tensor, and runs nothing that it names."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _described
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        if (module, name) == ("collections", "OrderedDict"):  # of backward hooks: there are none
            return dict
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        kind, dtype, key, *_ = pid
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to {kind!r}")
        return dtype, key


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    wanted = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != wanted:
            return False
        wanted *= size
    return True


class _Restricted(pickle.Unpickler):
    """Reads `.metadata`: a pickle, which could name any code; here only what torch and Megatron put into one."""

    _MODULES = ("torch.distributed.checkpoint.", "megatron.core.dist_checkpointing.")
    _NAMES = frozenset(
        {
            ("torch", "Size"),
            ("torch.serialization", "_get_layout"),
            ("collections", "OrderedDict"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype | torch.layout)
        if dtype or (module, name) in self._NAMES:
            return super().find_class(module, name)
        # A dotted name is followed attribute by attribute, and could so leave the module.
        if f"{module}.".startswith(self._MODULES) and "." not in name:
            entry = super().find_class(module, name)
            if isinstance(entry, type) and entry.__module__ == module:  # nothing that it only imported
                return entry
        raise pickle.UnpicklingError(f"it names {module}.{name}, which a checkpoint has no use for")


def _metadata(folder: Path) -> Metadata:
    for name in ("metadata.json", ".metadata"):
        if not (folder / name).is_file():
            raise RequestError(f"{folder / name}: the file is missing: this is no torch_dist checkpoint")
    form_file = folder / "metadata.json"
    try:
        form = json.loads(form_file.read_text())
        form_version = form["sharded_backend"], form.get("sharded_backend_version", 1)
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{form_file}: not the description of a checkpoint's format: {error!r}") from error
    if form_version != ("torch_dist", 1):
        raise RequestError(
            f"{form_file}: the format is {form_version[0]!r}, version {form_version[1]!r}; only torch_dist 1 is read"
        )
    try:
        with (folder / ".metadata").open("rb") as file:
            metadata = _Restricted(file).load()
    except Exception as error:  # a damaged pickle can raise anything
        raise RequestError(f"{folder / '.metadata'}: not readable: {error!r}") from error
    if not isinstance(metadata, Metadata):
        raise RequestError(f"{folder / '.metadata'}: it holds a {type(metadata).__name__}, no checkpoint's metadata")
    return metadata
