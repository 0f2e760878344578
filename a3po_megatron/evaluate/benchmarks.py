r"""The benchmarks: one frozen record each says how its file is read, what the user's turn says and how it is sampled.

A number of a benchmark means nothing without all of this, so that `version`, the name that stands beside every number,
is the benchmark's name and a digest of the whole record: "aime24-3f9c2b1a". Where the numbers come from:
docs/evaluation.md. `n` samples of each problem; temperature, top-p and max_tokens are the benchmark's own, never
training's. Everything else is done by the functions in rows.py and live_code.py, which take one row of a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3

from ..config import ARITHMETIC, AutoSandbox, Config, SandboxOptions
from ..data.fields import LAYOUTS
from ..data.tokenizer import TEMPLATES
from ..errors import RequestError
from ..files.sources import kind_of, stem_of
from . import rows
from .live_code import checked_release, checked_window, live_code

QWEN = TEMPLATES["qwen"]
# That of openai/simple-evals for GPQA, in our words.
CHOICE = (
    "Answer the following multiple-choice question. Think step by step. The last line of your response should be of "
    "the form Answer: $LETTER (without quotes) where LETTER is one of {letters}.\n\n{problem}\n\n{options}"
)
FUNCTION = (
    "Complete the following Python function. Answer with the whole function, and all that it imports, in one ```python "
    "block.\n\n```python\n{problem}\n```"
)
# As Austin et al. ask (arXiv 2108.07732): the task, then all of its tests.
TASK = (
    "You are an expert Python programmer, and here is your task: {problem} Your code should pass these tests:\n\n"
    "{tests}\n\nAnswer with the code, and all that it imports, in one ```python block."
)
STDIN = (
    "Solve the following programming problem in Python. The program reads its input from stdin and writes its answer "
    "to stdout. Answer with the whole program in one ```python block.\n\n{problem}"
)
STARTER = (
    "Solve the following programming problem in Python. Begin with the starter code. Answer with the whole code in one "
    "```python block.\n\n{problem}\n\n```python\n{starter}\n```"
)
ARITHMETIC_PROBLEMS = 500
QUESTION = (("problem", "answer"), ("question", "answer"))


@dataclass(frozen=True)
class Benchmark:
    """What is asked, how it is sampled and how it is graded."""

    name: str
    layouts: tuple[rows.Layout, ...]  # fields of a row; the first layout counts whose fields a row has all
    n: int  # samples of each problem
    problems: int | None  # how many the file has; another number is a warning. None: any
    prompt: str = QWEN  # what the user's turn says, around what the reading takes from a row
    starter_prompt: str = ""  # instead, of a row with starter code
    grader: str = "math"
    extract: str = "boxed"  # where the grader looks for the answer; "": it has one way
    temperature: float = 0.6
    top_p: float = 0.95
    max_tokens: int = 32768
    template: str = "chat"  # how the user's turn becomes a prompt (data.template); chat: of the tokenizer
    reading: Callable[..., rows.Item | None] = rows.one_answer  # takes (row, layout, rows.About)
    edition: int = 1  # another number where `reading` makes something else of the same file
    dated: bool = False  # a number needs a release and a window of dates
    release: str = ""
    window: str = ""  # FROM:TO, both inclusive
    limits: str = ""  # of a program, where programs are graded (the section `sandbox`)

    def protocol(self) -> dict[str, Any]:
        """Returns all that a number depends on beside the file, the seed and the model, as plain JSON."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields |= {"reading": self.reading.__name__, "layouts": [list(layout) for layout in self.layouts]}
        idle: tuple[str, ...] = () if self.dated else ("dated", "release", "window")
        idle += () if self.limits else ("limits",)
        return {name: value for name, value in fields.items() if name not in idle}

    @property
    def version(self) -> str:
        """The name that changes when any part of the protocol does."""
        canonical = json.dumps(self.protocol(), sort_keys=True, separators=(",", ":"))
        return f"{self.name}-{blake3(canonical.encode()).hexdigest()[:8]}"

    def chosen(
        self,
        samples: int | None = None,
        max_tokens: int | None = None,
        release: str = "",
        window: str = "",
        template: str = "",
        limits: str = "",
    ) -> Benchmark:
        """Returns the benchmark as options have it: another n or length, release and window of dates, form of prompts,
        limits of programs.

        Raises RequestError for an option without effect, and where a benchmark that needs dates has none.
        """
        if samples is not None and samples < 1:
            raise RequestError(f"--samples {samples}: at least 1 of each problem")
        for option, value in (("--release", release), ("--window", window)):
            if value and not self.dated:
                raise RequestError(f"{option} {value} has no effect on {self.name}: its problems have no dates")
        release, window = release or self.release, window or self.window
        if self.dated and not (release and window):
            raise RequestError(
                f"{self.name}: a number means nothing without release and dates: --release TAG, such as v5, and "
                "--window FROM:TO, such as 2024-08-01:2025-01-31"
            )
        if self.dated:
            release, window = checked_release(release), checked_window(window)
        return dataclasses.replace(
            self,
            n=samples or self.n,
            max_tokens=max_tokens or self.max_tokens,
            release=release,
            window=window,
            template=template or self.template,
            limits=limits if self.grader == "code" else "",
        )


def limits_of(options: SandboxOptions) -> str:
    """Returns the limits of programs as a part of the protocol, whatever sandbox they run in; a server's own ones but
    for the time are not known."""
    names = ("cpu_seconds", "wall_seconds", "memory_bytes", "threads", "import_from")
    return json.dumps({name: getattr(options, name) for name in names if hasattr(options, name)})


USUAL_LIMITS = limits_of(AutoSandbox())
BENCHMARKS: dict[str, Benchmark] = {
    each.name: each
    for each in (
        Benchmark("aime24", QUESTION, n=32, problems=30),
        Benchmark("aime25", QUESTION, n=32, problems=30),
        Benchmark("math500", QUESTION, n=4, problems=500),
        Benchmark("amc23", QUESTION, n=16, problems=40),
        Benchmark("minerva", (*QUESTION, ("problem", "solution")), n=4, problems=272),
        Benchmark(
            "olympiadbench",
            (("question", "final_answer"), *QUESTION),
            n=4,
            problems=675,
            reading=rows.olympiad,
        ),
        Benchmark(
            "gpqa",
            (("Question", "Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"),),
            n=8,
            problems=198,
            prompt=CHOICE,
            grader="choice",
            extract="answer",
            reading=rows.options,
        ),
        Benchmark("gsm8k", QUESTION, n=4, problems=1319, max_tokens=8192),
        Benchmark(
            "livecodebench",
            (("question_content", "public_test_cases", "private_test_cases", "contest_date"),),
            n=4,
            problems=None,
            prompt=STDIN,
            starter_prompt=STARTER,
            grader="code",
            limits=USUAL_LIMITS,
            extract="",
            reading=live_code,
            dated=True,
        ),
        Benchmark(
            "humaneval",
            (("prompt", "test", "entry_point"),),
            n=8,
            problems=164,
            prompt=FUNCTION,
            grader="code",
            limits=USUAL_LIMITS,
            extract="",
            max_tokens=8192,
            reading=rows.check_function,
        ),
        Benchmark(
            "mbpp",
            (("prompt", "tests"), ("text", "test_list"), ("prompt", "test_list")),
            n=4,
            problems=500,
            prompt=TASK,
            grader="code",
            limits=USUAL_LIMITS,
            extract="",
            max_tokens=8192,
            reading=rows.asserts,
        ),
    )
}


def benchmark_of(text: str, config: Config) -> Benchmark:
    """Returns the benchmark of that name, or that which a file of rows is, or the built-in task.

    Raises RequestError with the nearest name for what is neither.
    """
    if text in BENCHMARKS:
        return BENCHMARKS[text]
    if text == ARITHMETIC:
        return as_training_asks("arithmetic", config, ARITHMETIC_PROBLEMS)
    if kind_of(Path(text)):
        return as_training_asks(stem_of(Path(text)), config)
    close = difflib.get_close_matches(text, BENCHMARKS, n=1)
    hint = f"; did you mean {close[0]}?" if close else f"; there are {', '.join(BENCHMARKS)}, and files of rows"
    raise RequestError(f"--benchmark {text}: no benchmark has this name{hint}")


def as_training_asks(name: str, config: Config, problems: int | None = None) -> Benchmark:
    """Returns the benchmark that rows of one's own are: in the layouts of training data, put, sampled and graded as a
    configuration has it for training, once each."""
    rollout = config.rollout
    return Benchmark(
        name,
        LAYOUTS,
        n=1,
        problems=problems,
        prompt="{problem}",
        grader=config.data.grader,
        extract=config.reward.extract,
        temperature=rollout.temperature,
        top_p=rollout.top_p,
        max_tokens=rollout.max_tokens,
        template=config.data.template,
    )
