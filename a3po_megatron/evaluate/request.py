"""What an evaluation asks: written by the command, read by every rank; nothing of it is found out twice.

request.json     model: what is asked, and from where its weights are read
                 asked: of each benchmark its protocol, its problems as prompts, and where its result goes
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter

from ..data.order import named_seed
from ..files.replace import write_whole
from ..rollout.engine import Sampling
from .problems import Problem
from .result import File

NAME = "request.json"


@dataclass(frozen=True)
class Source:
    """What is evaluated."""

    path: str  # as it is named in the result
    kind: Literal["hf", "checkpoint", "run"]
    step: int | None
    weights: str  # folder of weights: HF's, or a Megatron checkpoint


@dataclass(frozen=True)
class Asked:
    """One benchmark."""

    benchmark: str
    version: str
    protocol: dict[str, Any]
    seed: int
    file: File
    problems: tuple[Problem, ...]
    prompts: tuple[str, ...]  # of each problem, as the model reads it
    result: str  # the file that it becomes

    @property
    def n(self) -> int:
        """How many samples each problem gets."""
        return int(self.protocol["n"])

    @property
    def sampling(self) -> Sampling:
        """How they are drawn."""
        wanted = self.protocol
        return Sampling(wanted["temperature"], wanted["top_p"], max_tokens=wanted["max_tokens"])

    def seed_of(self, problem: Problem, sample: int) -> int:
        """Returns the seed of one sample: no engine, order or restart changes it, nor how many others there are."""
        return named_seed("evaluation", self.seed, self.benchmark, problem.id, sample)


def graders_in(asked: Iterable[Asked]) -> set[str]:
    """Returns the names of what grades the answers."""
    return {problem.grader for each in asked for problem in each.problems}


@dataclass(frozen=True)
class Request:
    source: Source
    asked: tuple[Asked, ...]


_REQUESTS: TypeAdapter[Request] = TypeAdapter(Request)


def write_request(folder: Path, request: Request) -> None:
    """Writes it for the ranks."""
    write_whole(folder / NAME, json.dumps(dataclasses.asdict(request), ensure_ascii=False).encode("utf-8", "replace"))


def read_request(folder: Path) -> Request:
    """Reads what `write_request` wrote."""
    return _REQUESTS.validate_json((folder / NAME).read_bytes())
