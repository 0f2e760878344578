"""HF checkpoint ↔ Megatron checkpoint (`torch_dist`), without ranks and without ever holding the model.

    import    HF folder → folder with every parameter of the undivided model, readable by Megatron at any layout
    export    such a folder, or one that a run saved at any layout → HF folder

Both follow one map (model/stored.py). Bytes are moved, never computed with, in parts of at most `bucket_bytes`: what a
process holds is one part. Work is planned first and dealt to processes; each writes files of its own. A value that is
not finite, or a byte that is not what was written, ends the conversion, and nothing is left of it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from ..checkpoint.folder import Written, check_free, save_digests, whole_folder
from ..checkpoint.safetensors import Stored, file_names, read_rows, save_index, split_files, write_file
from ..checkpoint.torch_dist import Box, Kept, Reader, write_chunks, write_metadata
from ..errors import RequestError
from ..model.family import Family, read_family
from ..model.files import HF, copy_side_files
from ..model.layout import hf_tensors
from ..model.stored import Parameter, Span, stored_objects, stored_parameters, stored_shapes
from .jobs import Count, run_jobs
from .load import all_finite, check_checkpoint

PADDED = ("embedding.word_embeddings.weight", "output_layer.weight")  # their rows are padded by a layout


@dataclass(frozen=True)
class Converted:
    """What a conversion did."""

    tensors: int
    bytes: int  # of the weights that were read
    files: int


@dataclass(frozen=True)
class _Record:
    """One chunk to be written: a run of rows of a parameter and where they come from."""

    box: Box
    shape: tuple[int, ...]
    dtype: torch.dtype
    sources: tuple[tuple[str, Stored, int, int, int], ...]  # HF name, its place; row there, row here, number of rows

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


def import_checkpoint(
    source: Path, target: Path, workers: int, bucket_bytes: int, progress: Callable[[int], Count]
) -> Converted:
    """HF folder → Megatron checkpoint. `progress` is told the number of bytes and returns what counts them.

    Raises RequestError, naming file and tensor, for a source that is not whole and finite; then nothing is written.
    """
    check_free(target)
    family = read_family(source)
    places = check_checkpoint(source, family)
    parameters = stored_parameters(family)
    records = [record for p in parameters for record in _records(p, places, bucket_bytes)]
    _check_dtypes(records)
    total = sum(record.bytes for record in records)
    with whole_folder(target) as folder:
        shares = _shares(records, workers)
        jobs = [
            functools.partial(_write_records, folder, f"__{number}_0.distcp", share)
            for number, share in enumerate(shares)
        ]
        results: list[tuple[list[Kept], Written]] = run_jobs(jobs, workers, progress(total))
        kept = [item for part, _ in results for item in part]
        objects = write_metadata(folder, stored_shapes(family, parameters), kept, stored_objects(family, parameters))
        copy_side_files(source, folder / HF)
        save_digests(folder, [*(written for _, written in results), objects])
    return Converted(len(hf_tensors(family)), total, len(results))


def _records(parameter: Parameter, places: dict[str, Stored], bucket_bytes: int) -> Iterator[_Record]:
    """A parameter's chunks, each within the bucket (or one row, where that is larger)."""
    first = places[parameter.spans[0].tensor]
    for span in parameter.spans:
        if places[span.tensor].code != first.code:
            raise RequestError(
                f"{places[span.tensor].path}: {span.tensor} is stored as {places[span.tensor].code}, but Megatron "
                f"keeps it in one parameter with {parameter.spans[0].tensor}, which is {first.code}"
            )
    width = math.prod(parameter.shape[1:]) * first.dtype.itemsize
    step = max(1, bucket_bytes // width)
    for row in range(0, parameter.shape[0], step):
        rows = min(step, parameter.shape[0] - row)
        sources = tuple(
            (span.tensor, places[span.tensor], span.start + begin - span.row, begin - row, end - begin)
            for span, begin, end in _overlaps(parameter.spans, row, rows)
        )
        yield _Record(Box(parameter.key, parameter.lead, row, rows), (rows, *parameter.shape[1:]), first.dtype, sources)


def _overlaps(spans: Sequence[Span], row: int, rows: int) -> Iterator[tuple[Span, int, int]]:
    """The spans that lie in some rows of the parameter, with the first and the last of those rows."""
    for span in spans:
        begin, end = max(span.row, row), min(span.row + span.rows, row + rows)
        if begin < end:
            yield span, begin, end


def _check_dtypes(records: Sequence[_Record]) -> None:
    """A stacked tensor has one dtype."""
    first: dict[str, _Record] = {}
    for record in records:
        other = first.setdefault(record.box.key, record)
        if other.dtype != record.dtype:
            (name, stored, *_), (theirs, *_) = record.sources[0], other.sources[0]
            raise RequestError(
                f"{stored.path}: {name} is stored as {stored.code}, but Megatron stacks it with {theirs}, "
                f"which has another dtype ({other.dtype})"
            )


def _shares(records: Sequence[_Record], workers: int) -> list[list[_Record]]:
    """Runs of records of about the same number of bytes, one a worker; none is empty."""
    total, done = sum(record.bytes for record in records), 0
    shares: list[list[_Record]] = [[] for _ in range(workers)]
    for record in records:
        shares[min(workers - 1, done * workers // total)].append(record)
        done += record.bytes
    return [share for share in shares if share]


def _write_records(folder: Path, name: str, records: Sequence[_Record], count: Count) -> tuple[list[Kept], Written]:
    files: dict[Path, IO[bytes]] = {}

    # One buffer for all chunks: memory that was never touched costs more than reading into it.
    buffer = bytearray(max(record.bytes for record in records))

    def chunks() -> Iterator[tuple[Box, Tensor]]:
        for record in records:
            count_of = record.bytes // record.dtype.itemsize
            values = torch.frombuffer(buffer, dtype=record.dtype, count=count_of).view(record.shape)
            for tensor, stored, start, row, rows in record.sources:
                if stored.path not in files:
                    files[stored.path] = stored.path.open("rb")
                part = values[row : row + rows]
                read_rows(files[stored.path], stored, start, part)
                if not all_finite(part):
                    raise RequestError(f"{stored.path}: {tensor} holds a value that is not finite")
            yield record.box, values
            count(record.bytes)

    try:
        return write_chunks(folder, name, chunks())
    finally:
        for file in files.values():
            file.close()


@dataclass(frozen=True)
class _Wanted:
    """One HF tensor to be written, and the rows of the checkpoint that it is made of, in its own order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as it is stored
    parts: tuple[tuple[str, tuple[int, ...], Span], ...]  # key, leading indices, span


@dataclass(frozen=True)
class _File:
    name: str
    tensors: list[_Wanted]


def export_checkpoint(
    source: Path,
    target: Path,
    workers: int,
    bucket_bytes: int,
    shard_bytes: int,
    dtype: torch.dtype | None,  # None: as it is stored
    progress: Callable[[int], Count],
) -> Converted:
    """Megatron checkpoint → HF folder of files of at most `shard_bytes` (or one tensor, where that is larger).

    Raises RequestError, naming file and tensor, for a source that is not whole, unaltered and finite; then nothing is
    written.
    """
    check_free(target)
    hf = source / HF
    if not (hf / "config.json").is_file():
        raise RequestError(f"{hf / 'config.json'}: the file is missing: it says what model the checkpoint holds")
    family = read_family(hf)
    reader = Reader(source)
    wanted = _wanted(family, reader)
    reader.close()
    files = _files(wanted, shard_bytes, dtype)
    total = sum(_bytes(tensor, None) for tensor in wanted)
    count = progress(total)
    checks = [functools.partial(_check_file, source, name) for name in reader.files()]
    run_jobs(checks, workers, count)
    with whole_folder(target) as folder:
        jobs = [functools.partial(_write_tensors, source, folder, file, bucket_bytes, dtype) for file in files]
        written: list[Written] = run_jobs(jobs, workers, count)
        if len(files) > 1:
            where = {tensor.name: file.name for file in files for tensor in file.tensors}
            save_index(folder, where, sum(_bytes(tensor, dtype) for tensor in wanted))
        copy_side_files(hf, folder, None if dtype is None else str(dtype).removeprefix("torch."))
        save_digests(folder, written)
    return Converted(len(wanted), total, len(files))


def newest_checkpoint(folder: Path) -> Path:
    """A checkpoint's folder itself, or the newest one in a run's folder. Raises RequestError where there is none."""
    if (folder / "metadata.json").is_file() or not (folder / "config.yaml").is_file():
        if not folder.is_dir():
            raise RequestError(f"{folder}: there is no such folder")
        return folder
    whole = sorted((folder / "checkpoints").glob("step-*/manifest.json"))
    if not whole:
        raise RequestError(f"{folder}: this run has not saved any weights (checkpoint.every_steps)")
    return whole[-1].parent


def _wanted(family: Family, reader: Reader) -> list[_Wanted]:
    """Every HF tensor, after the checkpoint's keys and shapes were held against the configuration's."""
    parameters = stored_parameters(family)
    expected = stored_shapes(family, parameters)
    for key, shape in expected.items():
        found = reader.shapes.get(key)
        if found is None:
            raise RequestError(f"{reader.folder}: the checkpoint lacks {key}")
        padded = key in PADDED and len(found) == 2 and found[0] >= shape[0] and found[1] == shape[1]
        if found != shape and not padded:
            raise RequestError(f"{reader.folder}: {key} has shape {found}, {HF}/config.json implies {shape}")
        if padded:
            _check_padding(reader, key, shape[0])
    for key in reader.shapes.keys() - expected.keys():
        if key.startswith(("decoder.", "embedding.", "output_layer.")):
            raise RequestError(f"{reader.folder}: the checkpoint holds {key}, which config.json does not account for")
    parts: dict[str, list[tuple[str, tuple[int, ...], Span]]] = {}
    for parameter in parameters:
        for span in parameter.spans:
            parts.setdefault(span.tensor, []).append((parameter.key, parameter.lead, span))
    return [
        _Wanted(name, shape, reader.dtype(parts[name][0][0]), tuple(sorted(parts[name], key=lambda p: p[2].start)))
        for name, shape in hf_tensors(family).items()
    ]


def _check_padding(reader: Reader, key: str, vocab: int) -> None:
    """Rows beyond the vocabulary are zeros, and no weights that the configuration forgets."""
    rows, width = reader.shapes[key]
    values = torch.empty((rows - vocab, width), dtype=reader.dtype(key))
    reader.read(Box(key, (), vocab, rows - vocab), values, 0)
    if values.any():
        raise RequestError(
            f"{reader.folder}: {key} has {rows} rows, {HF}/config.json implies {vocab}, and those beyond hold weights"
        )


def _bytes(tensor: _Wanted, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * (dtype or tensor.dtype).itemsize


def _files(wanted: Sequence[_Wanted], shard_bytes: int, dtype: torch.dtype | None) -> list[_File]:
    groups = split_files({tensor.name: _bytes(tensor, dtype) for tensor in wanted}, shard_bytes)
    by_name = {tensor.name: tensor for tensor in wanted}
    names = file_names(len(groups))
    return [_File(name, [by_name[n] for n in group]) for name, group in zip(names, groups, strict=True)]


def _check_file(source: Path, name: str, _: Count) -> None:
    Reader(source).check_file(name)


def _write_tensors(
    source: Path, folder: Path, file: _File, bucket_bytes: int, dtype: torch.dtype | None, count: Count
) -> Written:
    reader, buffer = Reader(source), bytearray(bucket_bytes)

    def parts() -> Iterator[Tensor]:
        for tensor in file.tensors:
            for values in _read_tensor(reader, tensor, buffer):
                yield values if dtype is None else values.to(dtype)
                count(values.nbytes)

    try:
        shapes = {tensor.name: tensor.shape for tensor in file.tensors}
        dtypes = {tensor.name: dtype or tensor.dtype for tensor in file.tensors}
        return write_file(folder, file.name, shapes, dtypes, parts())
    finally:
        reader.close()


def _read_tensor(reader: Reader, tensor: _Wanted, buffer: bytearray) -> Iterator[Tensor]:
    """A tensor's rows in order, in parts that fit the buffer (or of one row); each is overwritten by the next."""
    width = math.prod(tensor.shape[1:])
    if width * tensor.dtype.itemsize > len(buffer):
        buffer = bytearray(width * tensor.dtype.itemsize)
    step = len(buffer) // (width * tensor.dtype.itemsize)
    for row in range(0, tensor.shape[0], step):
        rows = min(step, tensor.shape[0] - row)
        values = torch.frombuffer(buffer, dtype=tensor.dtype, count=rows * width).view(rows, *tensor.shape[1:])
        for key, lead, span in tensor.parts:
            begin, end = max(span.start, row), min(span.start + span.rows, row + rows)
            if begin < end:
                box = Box(key, lead, span.row + begin - span.start, end - begin)
                reader.read(box, values[begin - row : end - row], len(lead))
        if not all_finite(values):
            raise RequestError(f"{reader.folder}: {tensor.name} holds a value that is not finite")
        yield values
