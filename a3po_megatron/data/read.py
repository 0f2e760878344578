"""Reads rows from files: JSONL, JSON, CSV and TSV (also .gz and .zst), Parquet and Arrow, a part at a time.

A file's first bytes say what it is; of a table in text its name does. A row comes with its place: its line, or in a
table with columns and in an array its number, both from 1.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import zstandard

from ..errors import RequestError
from ..files.sources import kind_of
from .kinds import what_else

Row = dict[str, Any]
GZIP, ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
PARQUET, ARROW, STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"
BATCH = 1024  # rows of a table that are held as Python's
CHUNK = 1 << 20  # characters of a JSON array that are read at once
LARGEST = 64 << 20  # characters of one row
NO_ROW = "expected an object with a problem and an answer"


def rows_of(path: Path, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    """(place, row) of every row of one file; of a table with columns only those in `columns` that it has.

    Raises RequestError with file and place for what is no row, and for a file that is something else.
    """
    try:
        yield from _rows(path, columns)
    except (OSError, EOFError, zlib.error, zstandard.ZstdError) as error:
        if (kind := _other(path)) is not None:
            raise RequestError(f"{path}: this {kind}") from error
        words = getattr(error, "strerror", None) or error
        raise RequestError(f"{path}: cannot read the prompts: {words}") from error
    except pyarrow.ArrowException as error:
        kind = "parquet" if _head(path).startswith(PARQUET) else "Arrow"
        raise RequestError(f"{path}: this {kind} file is damaged: {' '.join(str(error).split())[:200]}") from error


def has_lines(path: Path) -> bool:
    """Whether a row's place in a file is a line: several rows of an array may stand in one."""
    try:
        head = _head(path)
        if head.startswith((PARQUET, ARROW, STREAM)):
            return False
        with _opened(path, head) as file:
            return kind_of(path) in (".csv", ".tsv") or not _start(file).startswith(b"[")
    except (OSError, EOFError, zlib.error, zstandard.ZstdError):  # said by who reads it
        return True


def _start(file: Any) -> bytes:
    return file.peek(64)[:64].lstrip(b"\xef\xbb\xbf \t\r\n")


def _other(path: Path) -> str | None:
    try:
        return what_else(path)
    except OSError:
        return None


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(8)


def _rows(path: Path, columns: Sequence[str] | None) -> Iterator[tuple[int, Row]]:
    head = _head(path)
    if head.startswith(PARQUET):
        with pyarrow.parquet.ParquetFile(path, memory_map=True) as table:
            wanted = None if columns is None else [name for name in columns if name in table.schema_arrow.names]
            yield from _of_batches(table.iter_batches(BATCH, columns=wanted or None))
    elif head.startswith(ARROW):
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_file(source) as file:
            yield from _of_batches((file.get_batch(n) for n in range(file.num_record_batches)), columns)
    elif head.startswith(STREAM):
        with pyarrow.memory_map(str(path)) as source, pyarrow.ipc.open_stream(source) as stream:
            yield from _of_batches(stream, columns)
    else:
        yield from _of_text(path, head)


def _of_batches(batches: Any, columns: Sequence[str] | None = None) -> Iterator[tuple[int, Row]]:
    number = 0
    for batch in batches:
        if columns and (wanted := [name for name in columns if name in batch.schema.names]):
            batch = batch.select(wanted)
        for start in range(0, batch.num_rows, BATCH):
            for row in batch.slice(start, BATCH).to_pylist():
                number += 1
                yield number, row


def _of_text(path: Path, head: bytes) -> Iterator[tuple[int, Row]]:
    with _opened(path, head) as file:
        if kind_of(path) in (".csv", ".tsv"):
            yield from _of_table(path, file, "\t" if kind_of(path) == ".tsv" else ",")
        elif _start(file).startswith(b"["):
            yield from _of_array(path, file)
        else:
            yield from _of_lines(path, file)


def _opened(path: Path, head: bytes) -> Any:
    if head.startswith(GZIP):
        return io.BufferedReader(gzip.open(path), CHUNK)  # type: ignore[arg-type]
    if head.startswith(ZSTD):
        return io.BufferedReader(_Zstd(path), CHUNK)
    return path.open("rb", CHUNK)


class _Zstd(io.RawIOBase):
    """Decompresses frame after frame. zstandard's own reader takes a file that is cut off for one that ends."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb")
        self._frame = zstandard.ZstdDecompressor().decompressobj()
        self._begun, self._rest = False, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            packed = (self._frame.unused_data if self._frame.eof else b"") or self._file.read(CHUNK // 8)
            if self._frame.eof:
                self._frame, self._begun = zstandard.ZstdDecompressor().decompressobj(), False
            if not packed:
                if self._begun:
                    raise EOFError("the file ends within a zstd frame")
                return 0
            self._begun = True
            self._rest = self._frame.decompress(packed)
        count = min(len(buffer), len(self._rest))
        buffer[:count], self._rest = self._rest[:count], self._rest[count:]
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


def _of_lines(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    good = 0
    for number, line in enumerate(file, start=1):
        if line.isspace():
            continue
        try:
            row = _row(line, first=number == 1)
        except RequestError as error:
            kind = None if good else _other(path)
            raise RequestError(f"{path}:{number}: {error}" if kind is None else f"{path}: this {kind}") from error
        good += 1
        yield number, row


def _row(line: bytes, first: bool) -> Row:
    try:
        row = _DECODER.decode(line.decode("utf-8-sig" if first else "utf-8"))
    except UnicodeDecodeError as error:
        raise RequestError(f"not UTF-8: {error.reason} at byte {error.start}") from error
    except ValueError as error:
        raise RequestError(f"not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError("nested too deeply") from error
    if not isinstance(row, dict):
        raise RequestError(NO_ROW)
    return row


def _once(pairs: list[tuple[str, Any]]) -> Row:
    """An object whose fields stand once: JSON itself would keep the last of two silently."""
    row = dict(pairs)
    if len(row) < len(pairs):
        raise ValueError(f"a field of {sorted(row)} stands twice")
    return row


def _no_number(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_no_number)


def _of_array(path: Path, file: IO[bytes]) -> Iterator[tuple[int, Row]]:
    """The elements of one JSON array, of which a chunk is held at a time."""
    text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    held, line, more, number = "", 1, True, 0

    def fill() -> None:
        nonlocal held, more
        try:
            part = text.read(CHUNK)
        except UnicodeDecodeError as error:
            raise RequestError(f"{path}: not UTF-8: {error.reason}, behind line {line}") from error
        held, more = held + part, bool(part)

    def skip(count: int) -> None:
        """Leaves out characters, and the blanks behind them."""
        nonlocal held, line
        while True:
            rest = held[count:].lstrip(" \t\r\n")
            line += held.count("\n", 0, len(held) - len(rest))
            held, count = rest, 0
            if held or not more:
                return
            fill()

    fill()
    skip(0)
    skip(1)  # the bracket
    while not held.startswith("]"):
        try:
            row, end = _DECODER.raw_decode(held)
        except (ValueError, RecursionError) as error:
            if more and len(held) < LARGEST and isinstance(error, json.JSONDecodeError):
                fill()
                continue
            raise RequestError(f"{path}:{line}: not valid JSON: {_in_file(error, line)}") from error
        if not isinstance(row, dict):
            raise RequestError(f"{path}:{line}: {NO_ROW}")
        number += 1
        yield number, row
        skip(end)
        if held.startswith(","):
            skip(1)
        elif not held.startswith("]"):
            what = f"{held[:20]!r}" if held else "the end of the file"
            raise RequestError(f"{path}:{line}: not valid JSON: expected a comma or the array's end, found {what}")
    skip(1)
    if held:
        raise RequestError(f"{path}:{line}: something stands behind the end of the array: {held[:20]!r}")


def _in_file(error: Exception, line: int) -> str:
    """A decoder's words, with the file's line instead of that within a row."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}: line {line + error.lineno - 1} column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _of_table(path: Path, file: IO[bytes], sign: str) -> Iterator[tuple[int, Row]]:
    """The rows of a table in text, whose first line names the fields."""
    csv.field_size_limit(LARGEST)
    reader = csv.reader(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), delimiter=sign, strict=True)
    names: list[str] = []
    line = 1
    try:
        for cells in reader:
            place, line = line, reader.line_num + 1
            if not cells:
                continue
            if not names:
                names = cells
                if len(set(names)) < len(names):
                    raise RequestError(f"{path}:{place}: a column's name stands twice: {', '.join(names)}")
                continue
            if len(cells) != len(names):
                raise RequestError(f"{path}:{place}: {len(cells)} cells, but {len(names)} columns: {', '.join(names)}")
            yield place, dict(zip(names, cells, strict=True))
    except UnicodeDecodeError as error:
        raise RequestError(f"{path}:{line}: not UTF-8: {error.reason}") from error
    except csv.Error as error:
        raise RequestError(f"{path}:{line}: not a valid table: {error}") from error
