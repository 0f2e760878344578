"""From the names of benchmarks to what is asked: protocols, problems, prompts. Reads files, and imports no torch."""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blake3 import blake3

from ..config import ARITHMETIC, Config
from ..data.tokenizer import Tokenizer, has_chat_template
from ..errors import RequestError
from ..files.hashed import digest_of
from ..files.sources import kind_of
from ..model.facts import ModelFacts
from ..reward.grader import grader_of
from .benchmarks import Benchmark, benchmark_of, limits_of
from .problems import Problem, arithmetic_problems, file_of, problems_of
from .request import Asked
from .result import File


@dataclass(frozen=True)
class Wishes:
    """The options of the command."""

    benchmarks: tuple[str, ...]  # names, or files of rows
    data: Path | None = None  # the folder with the benchmarks' files
    samples: int | None = None
    max_tokens: int | None = None
    release: str = ""
    window: str = ""
    seed: int = 0


def ask(
    wishes: Wishes,
    config: Config,
    tokenizer_folder: Path,
    facts: ModelFacts,
    result: Callable[[str], Path],  # benchmark → the file of its result
    remark: Callable[[str], None],
) -> list[Asked]:
    """Returns what is asked of each benchmark.

    Raises RequestError for a name, a file or a row that is wrong, and for options without effect.
    """

    # Read once for each form of prompts: a tokenizer takes a second.
    @functools.cache
    def tokenizer_of(template: str) -> Tokenizer:
        options = config.data.model_copy(update={"template": template})
        return Tokenizer.of(options, tokenizer_folder, facts.vocab, facts.eos)

    @functools.cache
    def template_of_benchmarks() -> str:
        return _template(config, tokenizer_folder)

    asked: list[Asked] = []
    for text in wishes.benchmarks:
        benchmark = benchmark_of(text, config)
        own = text == ARITHMETIC or kind_of(Path(text)) != ""
        template = benchmark.template if own else template_of_benchmarks()
        dates = (wishes.release, wishes.window) if benchmark.dated or len(wishes.benchmarks) == 1 else ("", "")
        benchmark = benchmark.chosen(
            wishes.samples,
            wishes.max_tokens,
            *dates,
            template=template + _peculiar(config, template),
            limits=limits_of(config.sandbox),
        )
        if benchmark.name in (each.benchmark for each in asked):
            raise RequestError(f"--benchmark {text}: {benchmark.name} is asked for twice")
        problems, file = _problems(text, benchmark, wishes, own, remark)
        for grader in dict.fromkeys(problem.grader for problem in problems):
            grader_of(grader)
        tokenizer = tokenizer_of(template)
        asked.append(
            Asked(
                benchmark=benchmark.name,
                version=benchmark.version,
                protocol=benchmark.protocol(),
                seed=wishes.seed,
                file=file,
                problems=tuple(problems),
                prompts=tuple(tokenizer.render(problem.text) for problem in problems),
                result=str(result(benchmark.name)),
            )
        )
    return asked


def _problems(
    text: str, benchmark: Benchmark, wishes: Wishes, own: bool, remark: Callable[[str], None]
) -> tuple[list[Problem], File]:
    if text == ARITHMETIC:
        problems = arithmetic_problems(benchmark, wishes.seed)
        rows = json.dumps([dataclasses.astuple(problem) for problem in problems])
        return problems, File(ARITHMETIC, blake3(rows.encode()).hexdigest(), len(problems))
    if own:
        path = Path(text)
        if not path.is_file():
            raise RequestError(f"--benchmark {text}: there is no such file")
    else:
        if wishes.data is None:
            raise RequestError(f"--benchmark {text}: its file is yours: --data (evaluation.data) names its folder")
        path = file_of(benchmark.name, wishes.data)
    problems = problems_of(benchmark, path, wishes.seed, remark=remark)
    return problems, File(path.name, digest_of(path).blake3, len(problems))


def _template(config: Config, tokenizer_folder: Path) -> str:
    """How a benchmark's own words become a prompt: as a turn of the chat that the model knows, or as they are."""
    chat = config.data.template == "chat" and (config.data.template_file or has_chat_template(tokenizer_folder))
    return "chat" if chat else "raw"


def _peculiar(config: Config, template: str) -> str:
    """What makes a chat another one than the tokenizer's own, as a part of the protocol."""
    options = config.data
    file = Path(options.template_file).read_text(errors="replace") if options.template_file else ""
    if template != "chat" or not (file or options.system or options.template_arguments):
        return ""
    told = json.dumps([file, options.system, options.template_arguments], sort_keys=True, default=str)
    return f"-{blake3(told.encode()).hexdigest()[:8]}"
