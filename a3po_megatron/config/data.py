"""Settings of `data/`."""

from __future__ import annotations

from typing import Literal

from .section import Section

ARITHMETIC = "builtin:arithmetic"


class DataOptions(Section):
    path: str  # a JSONL file, or builtin:arithmetic
    template: Literal["raw", "chat", "qwen", "dapo"] = "chat"  # how a problem becomes a prompt; docs/data.md
    problem_field: str = "problem"
    answer_field: str = "answer"
    id_field: str = "id"  # where a row lacks it: <file name>/<line>
    shuffle: bool = True  # anew in every epoch, by the run's seed
    drop_long_prompts: bool = False  # else a prompt above rollout.max_prompt_tokens is an error
