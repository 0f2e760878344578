"""Reads one run folder back (files/run_folder.py says where what lies).

    config.yaml       the resolved configuration, plain YAML
    provenance.json   versions, git, host, command
    metrics.jsonl     one object a step, flat `group/name` keys; null where a metric is undefined
    timeline.jsonl    one object a step, of its ranks (telemetry/timeline.py); a run begun before there was one lacks it
    rollouts/         one row a rollout (telemetry/rollouts.py); a sample of them also with prompt, answer and pieces

A run may be going on, or may have been killed in the middle of a write: an incomplete *last* line of either is left
out with a note. Any other damage is refused with file and line, because a curve with silently missing steps is a
wrong curve.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import yaml

from a3po_megatron.errors import RequestError
from a3po_megatron.files.run_folder import RunFolder

from ..telemetry.catalogue import PARTS

Record = dict[str, Any]

ROLLOUT_KEYS = ("prompt_id", "sample", "outcome", "reward", "finish", "tokens", "logprobs")
# Where present: as long as `tokens`
PER_TOKEN = ("logprobs", "old_logprobs", "entropy", "weights", "process", "pieces")
OF_TEXTS = ("prompt", "answer", "text", "pieces")  # of the rollouts that were saved with their texts


@dataclass
class Run:
    folder: Path
    config: Record
    provenance: Record
    steps: list[int]  # ascending
    metrics: dict[str, list[float | None]]  # per metric one value a step; None: undefined or not written
    timeline: dict[int, Record] = field(default_factory=dict)  # step → its row, ascending; of a run begun before: empty
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
    return Run(folder, config, provenance, list(rows), metrics, _timeline(run.timeline, notes), notes)


def read_rollouts(path: Path, columns: Sequence[str] | None = None, *, with_pieces: bool = False) -> Iterator[Record]:
    """The rollouts of one file, one by one; with `with_pieces` only those saved with their texts.

    `columns`: beside ROLLOUT_KEYS, those that are wanted, as far as they are there; None: all. A long run's files are
    far larger than what a page shows of them: no other column, and no row group without pieces, is read. Raises
    RequestError for a file that is damaged.
    """
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [key for key in ROLLOUT_KEYS if key not in there]:
                raise RequestError(f"{path}: its rollouts lack {', '.join(missing)}.")
            wanted = [name for name in there if columns is None or name in columns or name in ROLLOUT_KEYS]
            row = 0
            for number in range(file.num_row_groups):
                facts = file.metadata.row_group(number)
                if with_pieces and _without_pieces(facts):
                    row += facts.num_rows
                    continue
                for record in file.read_row_group(number, wanted).to_pylist():
                    row += 1
                    if not with_pieces or record.get("pieces") is not None:
                        yield _checked(record, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        said = " ".join(str(error).split())
        raise RequestError(f"{path}: not a readable Parquet file ({said}). Delete it to leave it out.") from error


def _without_pieces(facts: pyarrow.parquet.RowGroupMetaData) -> bool:
    """Whether a row group says of itself that no row of it has any."""
    for number in range(facts.num_columns):
        column = facts.column(number)
        if column.path_in_schema.partition(".")[0] == "pieces":
            known = column.statistics
            return known is not None and known.has_null_count and known.null_count == column.num_values
    return True


def _json_lines(lines: Iterable[bytes], path: Path, notes: list[str]) -> Iterator[tuple[int, Record]]:
    """Line number and object of each line. An unreadable last line is noted and left out."""
    numbered = enumerate(lines, 1)
    for number, line in numbered:
        if not line.strip():
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


def _timeline(path: Path, notes: list[str]) -> dict[int, Record]:
    """Per step what its ranks did, steps ascending."""
    rows: dict[int, Record] = {}
    if not path.is_file():
        return rows
    with path.open("rb") as file:
        for number, record in _json_lines(file, path, notes):
            ranks = record.get("ranks")
            lists = [ranks, *(record.get(name) for name in PARTS)]
            numbers = [record.get(name) for name in ("step", "world", "slowest", "fastest")]
            whole = isinstance(ranks, list) and ranks and all(type(value) is int for value in [*numbers, *ranks])
            if not whole or not all(_is_numbers(values, len(ranks or [])) for values in lists):
                raise RequestError(f"{path}, line {number}: not a row of a timeline. Delete the file to leave it out.")
            rows[record["step"]] = record
    return dict(sorted(rows.items()))


def _is_numbers(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(value) in (int, float) for value in values)


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


def _checked(record: Record, where: str) -> Record:
    """A rollout in the form that it has in the run, without texts where it was saved without."""
    if not isinstance(record["tokens"], list):
        raise RequestError(f"{where}: `tokens` must be a list.")
    length = len(record["tokens"])
    for key in PER_TOKEN:
        values = record.get(key)
        if values is not None and (not isinstance(values, list) or len(values) != length):
            size = len(values) if isinstance(values, list) else repr(values)
            raise RequestError(f"{where}: `{key}` must have one entry a token ({length}), not {size}.")
    for key in ("segments", "steps"):
        if record.get(key) is not None:
            record[key] = [tuple(part.values()) for part in record[key]]
    if (answer := record.get("answer")) is not None and len(answer) == 1:
        record["answer"] = answer[0]
    return {key: value for key, value in record.items() if key not in OF_TEXTS or value is not None}
