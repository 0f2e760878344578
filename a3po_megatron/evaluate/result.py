"""The file that an evaluation leaves: what was asked, of whom, every sample, and what it comes to. Format 1, JSON.

    format, benchmark, version, protocol, seed      which number this is (benchmarks.py)
    file       name, digest, problems               of the benchmark's file
    model      path, kind, step, digest             what was asked: an HF folder, a checkpoint or a run
    software   package → version
    summary    avg, pass, majority: value, low, high, problems; lengths, counts, seconds (summary.py)
    problems   id, text, gold, samples: seed, text, tokens, finish, outcome, reason

`a3po compare` holds two of them against each other. Whoever reads one in a program of their own: it is plain JSON.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from blake3 import blake3
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from ..batch import Finish, Gold, Outcome
from ..errors import RequestError
from ..files.replace import write_whole
from .problems import Problem

FORMAT: Final = 1
LONGEST_GOLD = 10_000  # characters: tests of LiveCodeBench take gigabytes, and are in the benchmark's file


class _Exact:
    """No field more than there is, and none of another type."""

    __pydantic_config__ = ConfigDict(strict=True, extra="forbid")


@dataclass(frozen=True)
class Sample(_Exact):
    """One response, and its verdict."""

    seed: int
    text: str
    tokens: int  # the end-of-sequence token included
    finish: Finish
    outcome: Outcome
    reason: str


@dataclass(frozen=True)
class Graded(_Exact):
    """A problem with its samples."""

    id: str
    text: str
    gold: Gold
    samples: tuple[Sample, ...]

    @property
    def valid(self) -> int:
        """Counts the samples that were graded: an invalid one says nothing of the model."""
        return sum(sample.outcome != "invalid" for sample in self.samples)

    @property
    def correct(self) -> int:
        """Counts the correct samples."""
        return sum(sample.outcome == "correct" for sample in self.samples)


@dataclass(frozen=True)
class Estimate(_Exact):
    """A mean over problems with its 95 % interval (estimators.py)."""

    value: float
    low: float
    high: float
    problems: int  # over so many: those with enough valid samples


@dataclass(frozen=True)
class Summary(_Exact):
    """What the samples come to. None: undefined."""

    avg: Estimate | None
    pass_at: Annotated[dict[int, Estimate], Field(alias="pass")]  # by k
    majority: Estimate | None
    length_mean: float  # tokens
    truncated_rate: float
    invalid: int  # samples
    seconds: float
    tokens_per_second: float


@dataclass(frozen=True)
class File(_Exact):
    """The benchmark's file."""

    name: str
    digest: str  # blake3
    problems: int


@dataclass(frozen=True)
class Model(_Exact):
    """What was asked."""

    path: str
    kind: Literal["hf", "checkpoint", "run"]
    step: int | None
    digest: str


@dataclass(frozen=True)
class Result(_Exact):
    """One evaluation of one model on one benchmark."""

    benchmark: str
    version: str
    protocol: dict[str, Any]
    seed: int
    file: File
    model: Model
    software: dict[str, str]
    summary: Summary
    problems: tuple[Graded, ...]
    format: Literal[1]


_RESULTS: TypeAdapter[Result] = TypeAdapter(Result)


def graded(problem: Problem, samples: Sequence[Sample]) -> Graded:
    """Returns a problem with its samples; of a gold answer that is longer than LONGEST_GOLD only the digest."""
    gold = problem.gold
    if isinstance(gold, str) and len(gold) > LONGEST_GOLD:
        gold = f"blake3:{blake3(gold.encode()).hexdigest()}"
    return Graded(problem.id, problem.text, gold, tuple(samples))


def write(path: Path, result: Result) -> None:
    """Writes a result, whole at once. Raises RequestError where that cannot be done."""
    tree = dataclasses.asdict(result)
    tree["summary"]["pass"] = tree["summary"].pop("pass_at")
    first = {"format": tree.pop("format")}
    # A half of a surrogate pair, which no text can hold, must not cost an evaluation its file.
    content = json.dumps(first | tree, ensure_ascii=False, indent=1).encode("utf-8", "replace")
    try:
        write_whole(path, content + b"\n", synced=True)
    except OSError as error:
        raise RequestError(f"{path}: cannot write the result: {error.strerror}") from error


def read(path: Path) -> Result:
    """Returns a result. Raises RequestError for a file that is none, or one of another format."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise RequestError(f"{path}: cannot read the result: {error.strerror}") from error
    try:
        return _RESULTS.validate_json(content)
    except ValidationError as error:
        raise RequestError(f"{path}: {_why(content, error)}") from error


def _why(content: bytes, error: ValidationError) -> str:
    try:
        tree = json.loads(content)
    except (ValueError, RecursionError) as broken:
        return f"not the result of an evaluation: not valid JSON: {broken!s:.200}"
    if not isinstance(tree, dict) or not {"format", "benchmark", "problems"} <= tree.keys():
        return "not the result of an evaluation (a3po eval --json FILE writes one)"
    if tree["format"] != FORMAT:
        return f"a result of format {tree['format']!r:.20}, and this version reads format {FORMAT}: evaluate again"
    first = error.errors()[0]
    return f"the result is damaged: {'.'.join(map(str, first['loc']))}: {first['msg']}"
