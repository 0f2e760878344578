"""Reads one run folder back (files/run_folder.py says where what lies).

    config.yaml       the resolved configuration, plain YAML
    provenance.json   versions, git, host, command
    metrics.jsonl     one object a step, flat `group/name` keys; null where a metric is undefined
    rollouts/         one object a rollout; a sample of them also with prompt, answer and pieces

A run may be going on, or may have been killed in the middle of a write: an incomplete *last* line is left out with a
note. Any other damage is refused with file and line, because a curve with silently missing steps is a wrong curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import yaml
import zstandard

from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder

Record = dict[str, Any]

ROLLOUT_KEYS = ("prompt_id", "sample", "outcome", "reward", "finish", "tokens", "logprobs")
# Where present: as long as `tokens`
PER_TOKEN = ("logprobs", "old_logprobs", "entropy", "weights", "process", "pieces")


@dataclass
class Run:
    folder: Path
    config: Record
    provenance: Record
    steps: list[int]  # ascending
    metrics: dict[str, list[float | None]]  # per metric one value a step; None: undefined or not written
    notes: list[str] = field(default_factory=list)  # what a reader of the report must know about this folder

    @property
    def name(self) -> str:
        return str(self.config.get("name") or self.folder.name)

    def option(self, dotted: str, default: Any = None) -> Any:
        """The option `section.key`, `default` where the configuration lacks it."""
        value: Any = self.config
        for part in dotted.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return default if value is None else value

    def values(self, metric: str) -> list[float]:
        """The defined values of `metric` in step order."""
        return [value for value in self.metrics.get(metric, []) if value is not None]


def read_run(folder: Path) -> Run:
    """Everything of a run folder but its rollouts. RequestError where it is not one, or a file in it is damaged."""
    if not folder.is_dir():
        raise RequestError(f"{folder}: no such run folder. Give the folder that `a3po train` wrote.")
    notes: list[str] = []
    run = RunFolder(folder)
    config, provenance = _config(run.config, notes), _provenance(run.provenance, notes)
    rows = _rows(run.metrics, notes)
    names = dict.fromkeys(name for row in rows.values() for name in row)
    metrics = {name: [row.get(name) for row in rows.values()] for name in names}
    return Run(folder, config, provenance, list(rows), metrics, notes)


def read_rollouts(path: Path, notes: list[str], *, with_pieces: bool = False) -> Iterator[Record]:
    """The rollouts of one file, one by one; with `with_pieces` only those saved with their texts.

    A long run's files are far larger than what a page shows of them, so that lines without pieces are not even parsed.
    """
    try:
        with path.open("rb") as file:
            wanted = b'"pieces"' if with_pieces else b""
            for number, record in _json_lines(_decompressed_lines(file, path, notes), path, notes, wanted):
                _check_rollout(record, path, number)
                yield record
    except zstandard.ZstdError as error:
        raise RequestError(f"{path}: not a readable zstandard file ({error}). Delete it to leave it out.") from error


def _decompressed_lines(file: BinaryIO, path: Path, notes: list[str]) -> Iterator[bytes]:
    """The lines of a file of zstandard frames. (`stream_reader` would end a cut-off frame without a word.)"""
    frame, pending = None, b""
    while chunk := file.read(1 << 20):
        while chunk:
            if frame is None or frame.eof:
                frame = zstandard.ZstdDecompressor().decompressobj()
            *lines, pending = (pending + frame.decompress(chunk)).split(b"\n")
            yield from lines
            chunk = frame.unused_data if frame.eof else b""
    if frame is not None and not frame.eof:
        notes.append(
            f"{path.name} is incomplete (the run was killed while writing it, or is still writing); what follows its "
            "last whole line is left out."
        )
    else:
        yield pending


def _json_lines(
    lines: Iterable[bytes], path: Path, notes: list[str], wanted: bytes = b""
) -> Iterator[tuple[int, Record]]:
    """Line number and object of each line that contains `wanted`. An unreadable last line is noted and left out."""
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if not line.strip() or wanted not in line:
            continue
        try:
            record = json.loads(line.decode())
        except ValueError as error:
            if any(rest.strip() for _, rest in numbered):
                raise RequestError(f"{path}, line {number}: not a JSON object ({error}).") from error
            notes.append(
                f"{path.name}, line {number}: the last line is incomplete (the run was killed while writing it, or is "
                "still writing); it is left out."
            )
            return
        if not isinstance(record, dict):
            raise RequestError(f"{path}, line {number}: not a JSON object, but {type(record).__name__}.")
        yield number, record


def _rows(path: Path, notes: list[str]) -> dict[int, dict[str, float | None]]:
    """Per step its metrics, steps ascending."""
    if not path.is_file():
        raise RequestError(f"{path}: missing, so there is nothing to report. Is this the folder of a run?")
    rows: dict[int, dict[str, float | None]] = {}
    with path.open("rb") as file:
        for number, record in _json_lines(file, path, notes):
            step = record.pop("step", None)
            if type(step) is not int:
                raise RequestError(f"{path}, line {number}: `step` must be a whole number, not {step!r}.")
            if step in rows:
                notes.append(f"{path.name}, line {number}: step {step} stands there twice; the later row is used.")
            rows[step] = {name: _number(value, f"{path}, line {number}: {name}") for name, value in record.items()}
    if not rows:
        raise RequestError(f"{path}: no step has been recorded yet, so there is nothing to report.")
    return dict(sorted(rows.items()))


def _number(value: Any, where: str) -> float | None:
    """The value of a metric; NaN and infinity count as undefined."""
    if value is None:
        return None
    if not isinstance(value, int | float):
        raise RequestError(f"{where} must be a number or null, not {value!r}.")
    return value if math.isfinite(value) else None


def _config(path: Path, notes: list[str]) -> Record:
    if not path.is_file():
        notes.append(f"{path.name} is missing: name, model and settings of this run are not known.")
        return {}
    try:
        config = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise RequestError(f"{path}{line}: not readable YAML ({getattr(error, 'problem', error)}).") from error
    if not isinstance(config, dict):
        raise RequestError(f"{path}: must hold sections of options, not {type(config).__name__}.")
    return config


def _provenance(path: Path, notes: list[str]) -> Record:
    if not path.is_file():
        notes.append(f"{path.name} is missing: versions and host of this run are not known.")
        return {}
    try:
        provenance = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        line = getattr(error, "lineno", 1)
        raise RequestError(f"{path}, line {line}: not readable JSON ({error}).") from error
    if not isinstance(provenance, dict):
        raise RequestError(f"{path}: must hold one JSON object, not {type(provenance).__name__}.")
    return provenance


def _check_rollout(record: Record, path: Path, number: int) -> None:
    if missing := [key for key in ROLLOUT_KEYS if key not in record]:
        raise RequestError(f"{path}, line {number}: the rollout lacks {', '.join(missing)}.")
    if not isinstance(record["tokens"], list):
        raise RequestError(f"{path}, line {number}: `tokens` must be a list.")
    length = len(record["tokens"])
    for key in PER_TOKEN:
        values = record.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != length):
            size = len(values) if isinstance(values, list) else repr(values)
            raise RequestError(f"{path}, line {number}: `{key}` must have one entry a token ({length}), not {size}.")
