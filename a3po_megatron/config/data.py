"""Settings of `data/`."""

from __future__ import annotations

from typing import Literal

from .section import Section, option

ARITHMETIC = "builtin:arithmetic"


class DataOptions(Section):
    path: str = option(..., "prompts: a JSONL file, or builtin:arithmetic")
    template: Literal["raw", "chat", "qwen", "dapo"] = option("chat", "how a problem becomes a prompt; docs/data.md")
    problem_field: str = option("problem", "field of a row that holds the problem")
    answer_field: str = option("answer", "field of a row that holds the answer")
    id_field: str = option("id", "field of a row that names it; where a row lacks it: <file name>/<line>")
    shuffle: bool = option(True, "another order in every epoch, by the run's seed")
    drop_long_prompts: bool = option(False, "leave out prompts above rollout.max_prompt_tokens, which is an error else")
