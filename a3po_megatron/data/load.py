"""Loads all rows of a data set, each problem once, and says what it left out.

Rows are merged as they are read, so that a data set which repeats its rows takes the memory of one copy. Two rows are
the same if their problems and their gold answers are, but for blanks at the ends and for what stands around a gold
answer (a box, the reasoning before ####). One problem with two gold answers is an error, or both rows are left out.
"""

from __future__ import annotations

import functools
import json
from array import array
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.compute
from blake3 import blake3

from ..batch import Gold
from ..config import ARITHMETIC, DataOptions
from ..errors import RequestError
from ..files.cache import Cache, name_of
from ..files.sources import files_of, names_of, paths_of
from ..reward.grader import GRADERS, grader_of
from ..reward.math import gold_text
from . import fields, read
from .fields import Fields, Problem
from .kinds import what_else
from .table import ALTERNATIVES, Row, Rows, Writer

FORMAT = 2  # of what is kept: another number, and everything is read anew
LARGE_BYTES = 32 << 20  # from here on the rows of a data set are kept in the cache
SHOWN = 80  # characters of a problem in a message
SHOWN_CONFLICTS = 10


class Conflict(NamedTuple):
    """A row, and an earlier one with the same problem and another gold answer."""

    file: int
    place: int
    first_file: int
    first_place: int
    gold: str  # of the later row, shortened, as the problem is
    problem: str


@dataclass
class Counts:
    """What was read, and what became of it."""

    read: int = 0
    repeated: int = 0  # rows that another row stands for
    conflicting: int = 0  # rows left out because their problem has another gold answer elsewhere
    fields: list[Fields] = field(default_factory=list)  # of each file
    conflicts: list[Conflict] = field(default_factory=list)  # the first of them

    def remarks(self) -> list[str]:
        said = []
        if self.repeated:
            said.append(f"{self.repeated} of {self.read} rows stand more than once and were merged (data.duplicates)")
        if self.conflicting:
            said.append(f"{self.conflicting} of {self.read} rows were left out: their problems have two gold answers")
        return said


@dataclass
class Loaded:
    rows: Rows
    files: list[Path]
    names: list[str]  # of the files, in ids
    bounds: list[int]  # source s has the rows bounds[s] … bounds[s + 1] - 1
    counts: Counts
    lined: list[bool]  # whether places in a file are lines
    key: str  # a digest of the files' content and of how it was read
    large: bool  # what is found out about the rows is kept in the cache

    def where(self, row: Row) -> str:
        return place_name(self.files[row.file], row.place, self.lined[row.file])

    def conflicts(self) -> list[str]:
        """What there is to say of the first conflicts."""
        return [_conflict(each, self.files, self.lined) for each in self.counts.conflicts]

    def id(self, row: Row) -> str:
        if row.id is None:
            return f"{self.names[row.file]}/{row.place}"
        return row.id if len(self.files) == 1 else f"{self.names[row.file]}/{row.id}"

    def only(self, kept: np.ndarray) -> Loaded:
        """Without the rows whose entry ([n] bool) is false."""
        before = np.concatenate([[0], np.cumsum(kept)])
        bounds = [int(before[bound]) for bound in self.bounds]
        return replace(self, rows=self.rows.only(kept), bounds=bounds)

    def graders(self) -> list[str]:
        """The names of graders that rows have; empty: of those that name none."""
        return list(self.rows.column("grader").unique().to_pylist())

    def golds(self, grader: str | None = None) -> list[str]:
        """Every gold answer, once; of a list each. `grader`: of the rows alone that name it."""
        form, column = self.rows.column("form"), self.rows.column("gold")
        if grader is not None:
            mine = pyarrow.compute.equal(self.rows.column("grader"), grader)
            form, column = form.filter(mine), column.filter(mine)
        whole = form.to_numpy() & ALTERNATIVES == 0
        lists = column.filter(pyarrow.array(~whole)).unique().to_pylist()
        golds = column.filter(pyarrow.array(whole)).unique().to_pylist()
        return list(dict.fromkeys([*golds, *(gold for each in lists for gold in json.loads(each))]))


def load(options: DataOptions, cache: Cache) -> Loaded:
    """Raises RequestError with file and place for the first row that is none, for duplicates and conflicts as the
    options have it, and for a source without rows."""
    sources = paths_of(options.path)
    if len(sources) != 1 and str(ARITHMETIC) in map(str, sources):
        raise RequestError(f"data.path: {ARITHMETIC} makes prompts without end and stands alone")
    files = [files_of(source) for source in sources]
    flat = [path for each in files for path in each]
    if not flat:
        raise RequestError("data.path names no file")
    names = names_of(flat)
    large = sum(path.stat().st_size for path in flat if path.is_file()) >= LARGE_BYTES
    key = _key(options, files) if large else name_of(*flat)
    if not large or (tables := _found(key, cache) or _made(options, files, names, key, cache)) is None:
        sink, reader = pyarrow.BufferOutputStream(), _Reader(options, files, names)
        reader.write(sink)
        tables = Rows(sink.getvalue()), reader.told()
    rows, told = tables
    lists = {
        "fields": [Fields(*each) for each in told["counts"]["fields"]],
        "conflicts": [Conflict(*each) for each in told["counts"]["conflicts"]],
    }
    counts = Counts(**{**told["counts"], **lists})
    loaded = Loaded(rows, flat, names, told["bounds"], counts, told["lined"], key, large)
    if told["left_out"]:
        stay = np.ones(len(rows), bool)
        stay[told["left_out"]] = False
        loaded = loaded.only(stay)
    return loaded


def _found(key: str, cache: Cache) -> tuple[Rows, dict[str, Any]] | None:
    """What an earlier start kept of the same files."""
    rows, told = cache.find(f"{key}.arrow"), cache.find(f"{key}.json")
    return (Rows(pyarrow.memory_map(str(rows))), json.loads(told.read_bytes())) if rows and told else None


def _made(
    options: DataOptions, files: list[list[Path]], names: list[str], key: str, cache: Cache
) -> tuple[Rows, dict[str, Any]] | None:
    """Reads the files into the cache; none where it takes nothing."""
    reader = _Reader(options, files, names)
    if cache.put(f"{key}.arrow", reader.write) is None:
        return None
    cache.put(f"{key}.json", lambda file: file.write(json.dumps(reader.told()).encode()))
    return _found(key, cache)


def _key(options: DataOptions, files: list[list[Path]]) -> str:
    parts: list[object] = [FORMAT]
    parts += [options.problem_field, options.answer_field, options.id_field, options.grader_field]
    parts += [options.duplicates, options.conflicts]
    for source in files:
        parts.append(len(source))
        for path in source:
            digest = blake3(max_threads=blake3.AUTO)
            if path.stat().st_size:
                digest.update_mmap(path)
            parts += [path.name, digest.hexdigest()]
    return name_of(*parts)


class _Reader:
    """One reading of all files."""

    def __init__(self, options: DataOptions, files: list[list[Path]], names: list[str]) -> None:
        self.options, self.files, self.names = options, files, names
        self.counts = Counts()
        self._seen: dict[int, int] = {}  # digest of a problem → number of its first row
        self._golds = array("Q")  # of each row that was written: the digest of its gold answer
        self._place, self._file = array("Q"), array("L")
        self._first = array("Q")  # number of the first row with the same problem
        self._lined: list[bool] = []  # whether places in a file are lines
        self._ends: list[int] = []  # rows written when each source ended
        self._ids: dict[int, int] = {}  # digest of a given id → number of its row
        self._named = array("B")  # of each row that was written: whether it has an id
        self._conflicts: dict[int, Conflict] = {}  # by the number of the first row
        self._repeats: list[str] = []

    def write(self, sink: object) -> None:
        """All rows, to a file. Raises RequestError for what is wrong; the first problem that there is is named."""
        writer = Writer(sink)
        try:
            for row in self._rows():
                self._add(writer, row)
        except RequestError:
            self._refuse()
            raise
        finally:
            writer.close()
        self._refuse()
        self._check_ids()
        if not writer.rows:
            files = [path for each in self.files for path in each]
            raise RequestError(f"{files[0]}: the file holds no prompts")

    def told(self) -> dict[str, Any]:
        """What there is to say beside the rows, as JSON."""
        first = np.frombuffer(self._first, np.uint64).astype(np.int64)
        left_out = np.flatnonzero(np.isin(first, np.fromiter(self._conflicts, np.int64, len(self._conflicts))))
        shown = list(self._conflicts.values())[:SHOWN_CONFLICTS]
        counts = asdict(self.counts) | {"conflicting": self.counts.conflicting + len(left_out), "conflicts": shown}
        return {"counts": counts, "bounds": [0, *self._ends], "lined": self._lined, "left_out": left_out.tolist()}

    def _rows(self) -> Iterator[Row]:
        number = 0
        for source in self.files:
            for path in source:
                yield from self._rows_of(number, path)
                number += 1
            self._ends.append(len(self._first))

    def _rows_of(self, file: int, path: Path) -> Iterator[Row]:
        options, names = self.options, None
        self._lined.append(read.has_lines(path))
        for place, row in read.rows_of(path, self._columns()):
            self.counts.read += 1
            try:
                named = names or fields.fields_of(row, options.problem_field, options.answer_field, options.id_field)
                problem, gold = fields.problem_of(row, named.problem), fields.answer_of(row, named.answer)
                grader = grader_of_row(row, options.grader_field)
            except RequestError as error:
                missing = names is None and fields.value_at(row, named.problem) is fields.MISSING
                kind = what_else(path) if missing else None
                words = f"{path}: this {kind}" if kind else f"{self._where(file, place)}: {error}"
                raise RequestError(words) from error
            if names is None:
                self.counts.fields.append(named)
            names = named
            yield Row(fields.id_of(row, names.id), problem, gold, grader, file, place)

    def _columns(self) -> list[str] | None:
        """Of tables: those that can be asked for; none are left out while the layout is not known."""
        options = self.options
        if not (options.problem_field and options.answer_field):
            known = [path for layout in fields.LAYOUTS for path in layout]
        else:
            known = []
        paths = [
            path
            for path in (options.problem_field, options.answer_field, options.id_field, options.grader_field)
            if path
        ]
        return [name for path in (*known, *paths) for name in dict.fromkeys((path, str(fields.steps(path)[0])))]

    def _add(self, writer: Writer, row: Row) -> None:
        key, gold = _digest(_plain(row.problem)), _digest_of_gold(row.gold)
        first = self._seen.setdefault(key, writer.rows)
        if first < writer.rows:
            if self._golds[first] != gold:
                places = row.file, row.place, self._file[first], self._place[first]
                self._conflicts.setdefault(first, Conflict(*places, _shown(row.gold), _shown(row.problem)))
                if self.options.duplicates != "all":
                    self.counts.conflicting += 1
                    return
            elif self.options.duplicates == "merge":
                self.counts.repeated += 1
                return
            elif self.options.duplicates == "error":
                where = self._where(row.file, row.place)
                stands = f"the problem stands {self._earlier(first, row)} already"
                self._repeats.append(f"{where}: {stands}: {_shown(row.problem)}")
                return
        if row.id is not None:
            other = self._ids.setdefault(_digest(self._given(row)), writer.rows)
            if other < writer.rows:
                raise RequestError(
                    f"{self._where(row.file, row.place)}: the id stands {self._earlier(other, row)} already: "
                    f"{row.id[:SHOWN]!r}: a run keeps rows apart by it; data.id_field may name another field"
                )
        self._golds.append(gold)
        self._place.append(row.place)
        self._file.append(row.file)
        self._first.append(first)
        self._named.append(row.id is not None)
        writer.add(row)

    def _given(self, row: Row) -> str:
        return str(row.id) if len(self.names) == 1 else f"{self.names[row.file]}/{row.id}"

    def _refuse(self) -> None:
        if self._repeats:
            more = f" (and {len(self._repeats) - 1} more like it)" if len(self._repeats) > 1 else ""
            raise RequestError(f"{self._repeats[0]}{more}: remove all but one, or set data.duplicates: merge")
        if self._conflicts and self.options.conflicts == "error":
            more = f" (and {len(self._conflicts) - 1} more like it)" if len(self._conflicts) > 1 else ""
            raise RequestError(
                f"{self._said(next(iter(self._conflicts.values())))}{more}: remove the wrong one, or set "
                "data.conflicts: drop, which leaves out all rows of such problems"
            )

    def _check_ids(self) -> None:
        """No given id is what a row without one is called."""
        if not self._ids or len(self._ids) == len(self._named):
            return
        for number in np.flatnonzero(np.frombuffer(self._named, np.uint8) == 0):
            file, place = self._file[number], self._place[number]
            name = f"{self.names[file]}/{place}"
            if (other := self._ids.get(_digest(name))) is not None:
                where = self._where(self._file[other], self._place[other])
                raise RequestError(f"{where}: the id is what the row in {self._where(file, place)} is called: {name!r}")

    def _path(self, file: int) -> Path:
        return [path for each in self.files for path in each][file]

    def _where(self, file: int, place: int) -> str:
        return place_name(self._path(file), place, self._lined[file])

    def _earlier(self, first: int, row: Row) -> str:
        return f"in {self._at(self._file[first], self._place[first], row.file)}"

    def _said(self, conflict: Conflict) -> str:
        return _conflict(conflict, [path for each in self.files for path in each], self._lined)

    def _at(self, file: int, place: int, here: int) -> str:
        return _at(self._path(file), place, self._lined[file], file == here)


def grader_of_row(row: dict[str, Any], field: str) -> str:
    """The grader that a row names; empty: no field is to. Raises RequestError for a name that is none."""
    if not field:
        return ""
    name = fields.value_at(row, field)
    if not isinstance(name, str):
        raise RequestError(f"the field {field!r} names no grader (data.grader_field): there are {', '.join(GRADERS)}")
    grader_of(name)
    return name


def place_name(path: Path, place: int, lined: bool) -> str:
    """How a message names a row."""
    return f"{path}:{place}" if lined else f"{path}: row {place}"


def _at(path: Path, place: int, lined: bool, same: bool) -> str:
    """How a message names an earlier row, of the same file or of another."""
    return f"{'line' if lined else 'row'} {place}" if same else place_name(path, place, lined)


def _conflict(each: Conflict, files: list[Path], lined: list[bool]) -> str:
    first = _at(files[each.first_file], each.first_place, lined[each.first_file], each.first_file == each.file)
    where = place_name(files[each.file], each.place, lined[each.file])
    return f"{where}: the problem stands in {first} with another gold answer, here {each.gold}: {each.problem}"


def _plain(problem: Problem) -> str:
    if isinstance(problem, str):
        return problem.strip()
    return "\x1e".join(f"{turn.role}\x1f{turn.content.strip()}" for turn in problem)


def _meant(gold: Gold) -> str:
    """A gold answer without what stands around it; alternatives in any order."""
    return gold_text(gold).strip() if isinstance(gold, str) else "\x1f".join(sorted(gold_text(g).strip() for g in gold))


@functools.lru_cache(1 << 16)  # most gold answers of most data sets are among few
def _digest_of_gold(gold: Gold) -> int:
    """64 bits, which tell the few golds of one problem apart."""
    return _digest(_meant(gold)) & (2**64 - 1)


def _digest(text: str) -> int:
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "big")


def _shown(value: Problem | Gold) -> str:
    if isinstance(value, str):
        return repr(value.strip()[:SHOWN])
    last = value[-1]
    return repr(last[:SHOWN]) if isinstance(last, str) else repr(last.content[:SHOWN])
