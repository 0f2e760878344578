"""The rows of a data set in columns: 1.8 million take as many bytes as their text, and can lie on a disk.

problem   text, or a conversation as JSON       gold   text, or a list of alternatives as JSON
grader    its name, or nothing: as configured
form      bits: 1 = problem is JSON, 2 = gold is    id     null: <file name>/<place>
file      which of the files                     place  its line or number there, from 1
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from blake3 import blake3

from ..batch import Gold
from .fields import Problem, Turn

SCHEMA = pyarrow.schema(
    [
        ("id", pyarrow.string()),
        ("problem", pyarrow.string()),
        ("gold", pyarrow.string()),
        ("grader", pyarrow.string()),
        ("form", pyarrow.uint8()),
        ("file", pyarrow.uint32()),
        ("place", pyarrow.uint64()),
    ]
)
BATCH = 16384
CONVERSATION, ALTERNATIVES = 1, 2


class Row(NamedTuple):
    id: str | None
    problem: Problem
    gold: Gold
    grader: str  # its name; empty: as configured
    file: int
    place: int


class Writer:
    """Writes rows to a sink as an Arrow file, a batch at a time."""

    def __init__(self, sink: Any) -> None:
        self._file = pyarrow.ipc.new_file(sink, SCHEMA)
        self._held: list[Row] = []
        self.rows = 0

    def add(self, row: Row) -> None:
        self._held.append(row)
        self.rows += 1
        if len(self._held) == BATCH:
            self._flush()

    def close(self) -> None:
        self._flush()
        self._file.close()

    def _flush(self) -> None:
        ids, problems, golds, graders, files, places = (
            zip(*self._held, strict=True) if self._held else ((),) * len(Row._fields)
        )
        forms = [
            (0 if isinstance(problem, str) else CONVERSATION) | (0 if isinstance(gold, str) else ALTERNATIVES)
            for problem, gold in zip(problems, golds, strict=True)
        ]
        columns = ids, map(_text, problems), map(_text, golds), graders, forms, files, places
        arrays = [pyarrow.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
        self._file.write_batch(pyarrow.record_batch(arrays, schema=SCHEMA))
        self._held = []


def _text(value: Problem | Gold) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


class Rows:
    """Rows of an Arrow file, in memory or mapped, by number."""

    def __init__(self, source: Any, chosen: np.ndarray | None = None) -> None:
        file = pyarrow.ipc.open_file(source)
        self._batches = [file.get_batch(number) for number in range(file.num_record_batches)]
        total = sum(batch.num_rows for batch in self._batches)
        self._chosen = np.arange(total) if chosen is None else chosen  # [n] numbers of rows in the file, ascending

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, number: int) -> Row:
        batch, place = divmod(int(self._chosen[number]), BATCH)
        id_, problem, gold, grader, form, file, line = (
            column[place].as_py() for column in self._batches[batch].columns
        )
        return _row(id_, problem, gold, grader, form, file, line)

    def __iter__(self) -> Iterator[Row]:
        """All rows, in their order; a batch of them is held as Python's objects."""
        for start in range(0, len(self._chosen), BATCH):
            numbers = self._chosen[start : start + BATCH]
            for number in np.unique(numbers // BATCH):
                places = pyarrow.array(numbers[numbers // BATCH == number] % BATCH)
                columns = self._batches[int(number)].take(places).columns
                yield from map(_row, *(column.to_pylist() for column in columns))

    def only(self, kept: np.ndarray) -> Rows:
        """Those whose entry in `kept` ([n] bool) is true."""
        fewer = object.__new__(Rows)
        fewer._batches, fewer._chosen = self._batches, self._chosen[kept]
        return fewer

    def problem_bytes(self) -> tuple[np.ndarray, np.ndarray]:
        """[n] bytes of each problem in UTF-8, of a conversation more than any limit; [n] whether it is ASCII."""
        problems = self.column("problem")
        sizes = pyarrow.compute.binary_length(problems).to_numpy().astype(np.int64)
        sizes[self.column("form").to_numpy() & CONVERSATION != 0] = np.iinfo(np.int64).max
        return sizes, pyarrow.compute.string_is_ascii(problems).to_numpy()

    def digest(self) -> str:
        """Of which rows these are of their file."""
        return blake3(self._chosen.tobytes()).hexdigest()

    def column(self, name: str) -> pyarrow.ChunkedArray:
        whole = pyarrow.chunked_array([batch.column(name) for batch in self._batches], SCHEMA.field(name).type)
        return whole if len(whole) == len(self._chosen) else whole.take(pyarrow.array(self._chosen))


def _row(id_: str | None, problem: str, gold: str, grader: str, form: int, file: int, place: int) -> Row:
    conversation = tuple(Turn(*turn) for turn in json.loads(problem)) if form & CONVERSATION else problem
    return Row(id_, conversation, tuple(json.loads(gold)) if form & ALTERNATIVES else gold, grader, file, place)
