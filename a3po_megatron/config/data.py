"""Settings of `data/`."""

from __future__ import annotations

from typing import Literal

from .section import NoEffect, PassedThrough, PositiveFloat, Section, option

ARITHMETIC = "builtin:arithmetic"


class DataOptions(Section):
    path: str | tuple[str, ...] = option(..., "prompts: a file or folder, a list of them, or builtin:arithmetic")
    weights: tuple[PositiveFloat, ...] = option(
        (), "how often each of several sources is drawn; []: every row once an epoch"
    )
    template: Literal["raw", "chat", "qwen", "dapo"] = option("chat", "how a problem becomes a prompt; docs/data.md")
    template_file: str = option("", "a Jinja file in place of the tokenizer's own chat template")
    template_arguments: PassedThrough = option({}, "what the chat template is told, such as enable_thinking")
    system: str = option("", "system message in front of every conversation; empty: none")
    problem_field: str = option("", "path of the field with the problem; empty: by a known layout")
    answer_field: str = option("", "path of the field with the gold answer; empty: by a known layout")
    id_field: str = option("id", "path of the field that names a row; where a row lacks it: <file name>/<line>")
    grader: str = option("math", "what grades the responses to rows that name no grader; docs/reward.md")
    grader_field: str = option("", "path of the field that names a row's grader; empty: none does")
    duplicates: Literal["merge", "error", "all"] = option("merge", "rows with the same problem and gold answer")
    conflicts: Literal["error", "drop"] = option("error", "rows with one problem and different gold answers")
    unreadable_golds: Literal["error", "drop"] = option("error", "rows whose gold answer the grader cannot read")
    shuffle: bool = option(True, "another order in every epoch, by the run's seed")
    drop_long_prompts: bool = option(False, "leave out prompts above rollout.max_prompt_tokens, which is an error else")
    cache: str = option("", "folder for what was read of large files; empty: ~/.cache/a3po-megatron")
    without_effect = (
        NoEffect(
            (
                *("problem_field", "answer_field", "id_field", "grader", "grader_field", "shuffle"),
                *("drop_long_prompts", "duplicates", "conflicts", "unreadable_golds", "cache"),
            ),
            lambda d: d.path == ARITHMETIC,
            f"data.path is {ARITHMETIC}",
        ),
        NoEffect(("weights",), lambda d: isinstance(d.path, str), "data.path names one source"),
        NoEffect(
            ("template_file", "template_arguments", "system"),
            lambda d: d.template != "chat",
            "data.template is not chat",
        ),
    )
