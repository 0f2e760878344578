"""The safetensors format: headers read and held against the file, bytes read where they lie, files written in a stream.

    8 bytes: length of the header (little endian) | JSON: name → dtype, shape, [begin, end) | the tensors' bytes

The library maps files into memory; here bytes are read straight into their destination, so that what a conversion holds
is its buffers and nothing else. Format: https://github.com/huggingface/safetensors (README, "Format").
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Self, cast

import torch
from blake3 import blake3
from torch import Tensor

from ..errors import RequestError
from .hashed import HashedFile, Written
from .hf_folder import check_pointer, explain

DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Quantised values and their scales (weights/fp8.py): read, never written.
QUANTISED = {"F8_E4M3": torch.float8_e4m3fn, "F8_E8M0": torch.float8_e8m0fnu, "U8": torch.uint8}
CODES = {dtype: code for code, dtype in DTYPES.items()}
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
MAX_HEADER = 100 << 20  # the library's own limit
SAMPLE = 1 << 12  # bytes of a tensor that tell it from another one


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies."""

    path: Path
    code: str  # dtype, in the format's words
    shape: tuple[int, ...]
    offset: int  # of its first byte, in the file

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code] if self.code in DTYPES else QUANTISED[self.code]

    def paths(self) -> tuple[Path, ...]:
        """The files that it takes to read it."""
        return (self.path,)

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def read_header(path: Path) -> dict[str, Stored]:
    """Name → place of every tensor in a file. Raises RequestError for one that is cut off or not safetensors."""

    def refuse(what: str) -> RequestError:
        return RequestError(f"{path}: not a readable safetensors file: {what}")

    try:
        check_pointer(path)
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if length < 0 or length > MAX_HEADER or 8 + length > size:
                raise refuse(f"it has {size} bytes, less than its header says")
            header = json.loads(file.read(length))
    except OSError as error:
        raise refuse(error.strerror or repr(error)) from error
    except (ValueError, RecursionError) as error:
        raise refuse(f"its header is not JSON: {error}") from error
    try:
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        spans, tensors = {}, {}
        for name, entry in entries.items():
            begin, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            if any(type(number) is not int or number < 0 for number in (begin, end, *shape)):
                raise TypeError(f"{name}: sizes must be whole numbers")
            spans[name] = begin, end
            tensors[name] = Stored(path, str(entry["dtype"]), shape, 8 + length + begin)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise refuse(f"its header is malformed: {error!r}") from error
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        stored = tensors[name]
        if begin != position or end < begin:
            raise refuse(f"{name} does not begin where the tensor before it ends")
        if (stored.code in DTYPES or stored.code in QUANTISED) and end - begin != math.prod(
            stored.shape
        ) * stored.dtype.itemsize:
            raise refuse(f"{name} has {end - begin} bytes, its shape {stored.shape} {stored.code} takes another number")
        position = end
    if 8 + length + position != size:
        raise refuse(f"it has {size} bytes, its header accounts for {8 + length + position}")
    return tensors


def sampled_digest(folder: Path) -> str:
    """A digest by which other weights of an HF folder are noticed: of every tensor's name, form and first bytes. It
    reads some MiB of a model of any size."""
    digest = blake3()
    with contextlib.ExitStack() as stack:
        files: dict[Path, IO[bytes]] = {}
        for name, stored in sorted(locate(folder).items()):
            if stored.path not in files:
                files[stored.path] = stack.enter_context(stored.path.open("rb"))
            files[stored.path].seek(stored.offset)
            digest.update(json.dumps([name, stored.code, stored.shape]).encode())
            digest.update(files[stored.path].read(min(SAMPLE, stored.bytes)))
    return str(digest.hexdigest())


def locate(folder: Path) -> dict[str, Stored]:
    """Every tensor of an HF folder. Raises RequestError for a missing or damaged file and an index that is wrong."""
    index = folder / INDEX
    if not index.exists():
        if not (folder / SINGLE).exists():
            raise explain(folder / SINGLE, INDEX)
        return read_header(folder / SINGLE)
    if (folder / SINGLE).exists():
        raise RequestError(f"{folder}: there are both {SINGLE} and {INDEX}: remove the one that is not meant")
    try:
        check_pointer(index)
        files = {name: folder / str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{index}: not a readable safetensors index: {error!r}") from error
    for name, path in files.items():
        if path.parent != folder:
            raise RequestError(f"{index}: {name} is said to be in {path}, which is not in this folder")
        if not path.exists():
            lost = {path.name for path in files.values() if not path.exists()}
            more = f", as are {len(lost) - 1} more files" if len(lost) > 1 else ""
            raise RequestError(
                f"{index}: {name} is said to be in {path.name}, which is missing{more}: download it again"
            )
    headers = {path: read_header(path) for path in sorted(set(files.values()))}
    for name, path in files.items():
        if name not in headers[path]:
            raise RequestError(f"{path}: {name} is said to be in this file ({INDEX}), which does not hold it")
    for path, header in headers.items():
        if strays := [name for name in header if files.get(name) != path]:
            raise RequestError(f"{index}: {path.name} holds {strays[0]}, which the index does not place there")
    return {name: headers[path][name] for name, path in files.items()}


def read_rows(file: IO[bytes], stored: Stored, start: int, rows: Tensor) -> None:
    """Fills `rows` (contiguous, of the stored dtype) with the tensor's rows from `start` on."""
    stride = math.prod(stored.shape[1:]) * stored.dtype.itemsize
    read_into(file, stored.offset + start * stride, rows)


class OpenFiles:
    """Files of weights that stay open while rows of many tensors are read from them, at most `limit` at once."""

    def __init__(self, limit: int = 16) -> None:
        self._limit = limit
        self._files: dict[Path, IO[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()

    def read(self, stored: Stored, start: int, rows: Tensor) -> None:
        """Fills `rows` (contiguous, of the stored dtype) with the tensor's rows from `start` on."""
        if stored.path not in self._files:
            if len(self._files) >= self._limit:
                self._files.pop(next(iter(self._files))).close()
            self._files[stored.path] = stored.path.open("rb")
        read_rows(self._files[stored.path], stored, start, rows)


def read_into(file: IO[bytes], offset: int, values: Tensor) -> None:
    """Fills a contiguous tensor with the file's bytes from `offset` on. Raises RequestError if they are not there."""
    assert values.is_contiguous()
    view = bytes_of(values)
    done = 0
    while done < len(view):
        count = os.preadv(file.fileno(), [view[done:]], offset + done)
        if count == 0:
            raise RequestError(f"{file.name}: it ended {len(view) - done} bytes too early while it was read")
        done += count


def write_file(
    folder: Path,
    name: str,
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    parts: Iterable[Tensor],
) -> Written:
    """Writes one safetensors file from `parts`: all tensors' elements in order, in pieces of any size.

    Raises RuntimeError if the parts do not amount to exactly the tensors.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor, shape in shapes.items():
        assert dtypes[tensor] in CODES, f"{tensor} is {dtypes[tensor]}"
        begin, end = end, end + math.prod(shape) * dtypes[tensor].itemsize
        header[tensor] = {"dtype": CODES[dtypes[tensor]], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with HashedFile(folder / name) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for part in parts:
            file.write(bytes_of(part.contiguous()))
    if file.bytes != 8 + len(text) + end:
        raise RuntimeError(f"{name}: {file.bytes - 8 - len(text)} bytes were written, its tensors have {end}")
    return file.written()


def bytes_of(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor."""
    return memoryview(cast(Any, values.view(-1).view(torch.uint8).numpy()))


def file_names(count: int) -> list[str]:
    """The names of a checkpoint's files, as transformers chooses them."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]


def split_files(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Tensors in their order, in files of at most `limit` bytes of them (or one tensor, where that is larger)."""
    groups: list[list[str]] = []
    size = limit
    for name, more in sizes.items():
        if not groups or size + more > limit:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += more
    return groups


def save_index(folder: Path, files: Mapping[str, str], total_bytes: int) -> None:
    """Tensor → file, where a checkpoint has several files."""
    content = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(files.items()))}
    (folder / INDEX).write_text(json.dumps(content, indent=2) + "\n")
