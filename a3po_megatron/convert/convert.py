"""HF checkpoint ↔ Megatron checkpoint (`torch_dist`), without ranks and without ever holding the model.

    import    HF folder → folder with every parameter of the undivided model, readable by Megatron at any layout
    export    such a folder, or one that a run saved at any layout → HF folder

Both follow one map (convert/stored.py). Bytes are moved, never computed with, in parts of at most `bucket_bytes`: what
a process holds is one part. Work is planned first and dealt to processes; each writes files of its own. A value that is
not finite, or a byte that is not what was written, ends the conversion, and nothing is left of it.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.hashed import Written, check_digest, read_digests, save_digests
from ..files.replace import check_free, whole_folder
from ..files.run_folder import RunFolder
from ..files.safetensors import (
    CODES,
    INDEX,
    OpenFiles,
    Stored,
    file_names,
    save_index,
    split_files,
    write_file,
)
from ..files.side_files import CONFIG, HF, copy_side_files, dtype_of, side_files
from ..files.torch_dist import INDEXES, Box, Kept, write_chunks, write_metadata
from ..files.torch_dist_reader import Reader
from ..model.cut import hf_tensors, padded_parameters, tensors
from ..model.facts import ModelFacts
from ..model.families.dense import MEGATRON_LAYER
from ..model.quantised import FIELDS
from ..model.read import read_facts, read_source
from ..run.folder import newest_whole
from ..run.manifest import check_saved
from ..weights.fp8 import name_of, read_values, rounded_to
from ..weights.load import all_finite, check_checkpoint
from .jobs import Count, deal, run_jobs
from .remarks import no_tokenizer, of_import
from .stored import Parameter, Span, stored_objects, stored_parameters, stored_shapes


@dataclass(frozen=True)
class Converted:
    """What a conversion did, and what its reader should know."""

    tensors: int
    bytes: int  # of the weights that were read
    files: int
    remarks: tuple[str, ...]


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
    (facts, fp8), named = read_source(source), dtype_of(source)
    whole = rounded_to(source, named) if fp8 else None
    places = check_checkpoint(source, facts, fp8, whole or torch.bfloat16)
    side_files(source)  # before anything is written: one that cannot be copied
    parameters = stored_parameters(facts)
    records = [record for p in parameters for record in _records(p, places, bucket_bytes)]
    _check_dtypes(records)
    total = sum(record.bytes for record in records)
    check_free(target, total)
    digests = read_digests(source)
    held = sorted({path for place in places.values() for path in place.paths()}) if digests else []
    count = progress(total + sum(path.stat().st_size for path in held))
    run_jobs([functools.partial(_check_files, share, digests) for share in deal(held, workers)], count)
    with whole_folder(target) as folder:
        jobs = [
            functools.partial(_write_records, folder, f"__{number}_0.distcp", share)
            for number, share in enumerate(_shares(records, workers))
        ]
        results: list[tuple[list[Kept], Written]] = run_jobs(jobs, count)
        items = [item for part, _ in results for item in part]
        objects = write_metadata(folder, stored_shapes(facts, parameters), items, stored_objects(facts, parameters))
        if whole is None:
            copy_side_files(source, folder / HF)
        else:
            copy_side_files(source, folder / HF, name_of(whole), without=FIELDS)
        save_digests(folder, [*(written for _, written in results), objects], INDEXES)
    stored = {name: places[name] for name in hf_tensors(facts)}
    remarks = of_import(source, facts, named if whole is None else name_of(whole), stored)
    return Converted(len(stored), total, len(results), tuple(remarks))


def _check_files(paths: Sequence[Path], digests: dict[str, Written], count: Count) -> None:
    for path in paths:
        check_digest(path, digests)
        count(path.stat().st_size)


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
    # One buffer for all chunks: memory that was never touched costs more than reading into it.
    buffer = bytearray(max(record.bytes for record in records))

    def chunks(files: OpenFiles) -> Iterator[tuple[Box, Tensor]]:
        for record in records:
            count_of = record.bytes // record.dtype.itemsize
            values = torch.frombuffer(buffer, dtype=record.dtype, count=count_of).view(record.shape)
            for tensor, stored, start, row, rows in record.sources:
                part = values[row : row + rows]
                read_values(files, stored, start, part)
                if not all_finite(part):
                    raise RequestError(f"{stored.path}: {tensor} holds a value that is not finite")
            yield record.box, values
            count(record.bytes)

    with OpenFiles() as files:
        return write_chunks(folder, name, chunks(files))


@dataclass(frozen=True)
class Wanted:
    """One HF tensor to be written, and the rows of the checkpoint that it is made of, in its own order."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype  # as it is stored
    parts: tuple[tuple[str, tuple[int, ...], Span], ...]  # key, leading indices, span
    fixed: bool  # it is kept in its dtype, whatever the model's is

    def written(self, dtype: torch.dtype | None) -> torch.dtype:
        """Returns its dtype in a folder of weights in `dtype`; None: as they are stored."""
        return self.dtype if self.fixed or dtype is None else dtype


@dataclass(frozen=True)
class _File:
    name: str
    tensors: list[Wanted]


@dataclass(frozen=True)
class ExportOptions:
    workers: int = 1
    bucket_bytes: int = 16 << 20  # what a process holds of the weights
    shard_bytes: int = 5_000_000_000  # the largest file, or one tensor where that is larger
    dtype: torch.dtype | None = None  # None: as it is stored
    drop_padding: bool = False  # rows beyond the vocabulary may hold weights


def export_checkpoint(
    source: Path, target: Path, options: ExportOptions, progress: Callable[[int], Count]
) -> Converted:
    """Megatron checkpoint → HF folder.

    Raises RequestError, naming file and tensor, for a source that is not whole, unaltered and finite; then nothing is
    written.
    """
    check_free(target)
    hf, dtype, workers = source / HF, options.dtype, options.workers
    if not (hf / CONFIG).is_file():
        raise RequestError(f"{hf / CONFIG}: the file is missing: it says what model the checkpoint holds")
    facts = read_facts(hf)
    side_files(hf)
    with Reader(source) as reader:
        chunked = [source / name for name in reader.check_folder()]
        wanted = wanted_tensors(facts, reader, options)
    files = _files(wanted, options.shard_bytes, dtype)
    total = sum(_bytes(tensor, None) for tensor in wanted)
    check_free(target, sum(_bytes(tensor, dtype) for tensor in wanted))
    digests = read_digests(source)
    held = chunked if digests else []
    count = progress(total + sum(path.stat().st_size for path in held))
    run_jobs([functools.partial(_check_files, share, digests) for share in deal(held, workers)], count)
    with whole_folder(target) as folder:
        jobs = [functools.partial(_write_files, source, folder, share, options) for share in deal(files, workers)]
        written: list[Written] = [file for part in run_jobs(jobs, count) for file in part]
        if len(files) > 1:
            where = {tensor.name: file.name for file in files for tensor in file.tensors}
            save_index(folder, where, sum(_bytes(tensor, dtype) for tensor in wanted))
        copy_side_files(hf, folder, None if dtype is None else str(dtype).removeprefix("torch."))
        save_digests(folder, sorted(written, key=lambda file: file.name), [INDEX] if len(files) > 1 else [])
    remarks = no_tokenizer(hf)
    if not digests:
        remarks.append(f"{source} has no digests.json: nothing says whether its bytes are those that were written")
    return Converted(len(wanted), total, len(files), tuple(remarks))


def newest_checkpoint(folder: Path) -> Path:
    """A checkpoint's folder itself, or the newest one in a run's folder. Raises RequestError where there is none."""
    run = RunFolder(folder)
    if (folder / "metadata.json").is_file() or not run.config.is_file():
        if not folder.is_dir():
            raise RequestError(f"{folder}: there is no such folder")
        return folder
    # All of it is read later, and held against its digests: a damaged one is refused then, and no older one taken.
    nothing = f"{folder}: this run has not saved any weights (checkpoint.every_steps)"
    try:
        checkpoint, _ = newest_whole(run.checkpoints, check_saved)
    except RequestError as error:  # what there is was never finished
        raise RequestError(f"{nothing}: {error}") from error
    if checkpoint is None:
        raise RequestError(nothing)
    return checkpoint


def wanted_tensors(facts: ModelFacts, reader: Reader, options: ExportOptions) -> list[Wanted]:
    """Every HF tensor, after the checkpoint's keys and shapes were held against the configuration's."""
    parameters = stored_parameters(facts)
    expected = stored_shapes(facts, parameters)
    for key, shape in expected.items():
        stored_shape = reader.shapes.get(key)
        if stored_shape is None:
            apart = any(other.startswith(MEGATRON_LAYER.format(0)) for other in reader.shapes)
            hint = ": its layers are saved apart (singleton_local_shards), which is not read" if apart else ""
            raise RequestError(f"{reader.folder}: the checkpoint lacks {key}{hint}")
        padded = (
            key in padded_parameters(facts)
            and len(stored_shape) == 2
            and stored_shape[0] > shape[0]
            and stored_shape[1] == shape[1]
        )
        if stored_shape != shape and not padded:
            raise RequestError(f"{reader.folder}: {key} has shape {stored_shape}, {HF}/{CONFIG} implies {shape}")
        if reader.dtypes[key] not in CODES:
            raise RequestError(f"{reader.folder}: {key} is stored as {reader.dtypes[key]}, which is not read")
        if padded and not options.drop_padding:
            _check_padding(reader, key, shape[0], options.bucket_bytes)
    for key in reader.shapes.keys() - expected.keys():
        if not re.match(r"(chained_\d+\.)?optimizer\.", key):
            raise RequestError(f"{reader.folder}: the checkpoint holds {key}, which {CONFIG} does not account for")
    parts: dict[str, list[tuple[str, tuple[int, ...], Span]]] = {}
    for parameter in parameters:
        for span in parameter.spans:
            parts.setdefault(span.tensor, []).append((parameter.key, parameter.lead, span))
    return [
        Wanted(
            name,
            tensor.shape,
            reader.dtypes[parts[name][0][0]],
            tuple(sorted(parts[name], key=lambda p: p[2].start)),
            tensor.dtype is not None,
        )
        for name, tensor in tensors(facts).items()
    ]


def _check_padding(reader: Reader, key: str, vocab: int, bucket_bytes: int) -> None:
    """Rows beyond the vocabulary are zeros, and no weights that the configuration forgets."""
    (end, width), dtype = reader.shapes[key], reader.dtypes[key]
    step = max(1, bucket_bytes // (width * dtype.itemsize))
    for row in range(vocab, end, step):
        values = torch.empty((min(step, end - row), width), dtype=dtype)
        reader.read(Box(key, (), row, len(values)), values)
        if values.any():
            raise RequestError(
                f"{reader.folder}: {key} has {end} rows, {HF}/{CONFIG} implies {vocab}, and those beyond hold weights; "
                "if they only pad the vocabulary (some programs initialise them like others), --drop-padding leaves "
                "them out"
            )


def _bytes(tensor: Wanted, dtype: torch.dtype | None) -> int:
    return math.prod(tensor.shape) * tensor.written(dtype).itemsize


def _files(wanted: Sequence[Wanted], shard_bytes: int, dtype: torch.dtype | None) -> list[_File]:
    groups = split_files({tensor.name: _bytes(tensor, dtype) for tensor in wanted}, shard_bytes)
    by_name = {tensor.name: tensor for tensor in wanted}
    names = file_names(len(groups))
    return [_File(name, [by_name[n] for n in group]) for name, group in zip(names, groups, strict=True)]


def _write_files(
    source: Path, folder: Path, files: Sequence[_File], options: ExportOptions, count: Count
) -> list[Written]:
    buffer = bytearray(options.bucket_bytes)
    with Reader(source) as reader:

        def parts(file: _File) -> Iterator[Tensor]:
            for tensor in file.tensors:
                for values in read_rows_of(reader, tensor, buffer):
                    cast = values.to(tensor.written(options.dtype))
                    if not all_finite(cast):
                        raise RequestError(f"{source}: {tensor.name} holds a value that is not finite as {cast.dtype}")
                    yield cast
                    count(values.nbytes)

        return [
            write_file(
                folder,
                file.name,
                {tensor.name: tensor.shape for tensor in file.tensors},
                {tensor.name: tensor.written(options.dtype) for tensor in file.tensors},
                parts(file),
            )
            for file in files
        ]


def read_rows_of(reader: Reader, tensor: Wanted, buffer: bytearray) -> Iterator[Tensor]:
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
                reader.read(box, values[begin - row : end - row])
        yield values
