"""Chat templates: compiled as transformers compiles them, and held against mistakes that Jinja lets pass in silence.

Refused by name: a template that renders the same with and without a generation prompt, one that leaves out a message,
a name that is printed and holds nothing (a mistyped field), and an argument that the template never asks for.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta

from ..errors import RequestError
from .fields import Turn

OWN = ("messages", "add_generation_prompt", "tools", "documents")
SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
PROBE = "What is 1+1?"


class ChatTemplate:
    """Renders conversations. `place`: the file that holds it; `inside`: the field of it, where it is no file itself."""

    def __init__(
        self, text: str, place: Path, inside: str, special: Mapping[str, str], arguments: Mapping[str, Any], system: str
    ) -> None:
        from transformers.utils import chat_template_utils

        self._place, self._inside = place, inside
        self._values = {**special, **arguments}
        self._system = (Turn("system", system),) if system else ()
        self.text = text
        try:
            self._template = chat_template_utils._compile_jinja_template(text)
        except jinja2.TemplateSyntaxError as error:
            raise RequestError(f"{self._at(error.lineno)}: the chat template is no Jinja: {error.message}") from error
        self._check_arguments(arguments)
        self._check_rendering()

    def render(self, problem: str | Sequence[Turn]) -> str:
        """The prompt, with the generation prompt. Raises RequestError with the template's line where it refuses."""
        turns = (Turn("user", problem),) if isinstance(problem, str) else tuple(problem)
        if self._system and turns[0].role == "system":
            raise RequestError(
                f"a conversation has a system message of its own beside data.system: {turns[0].content!r:.80}"
            )
        return self._rendered(self._template, (*self._system, *turns))

    def described(self) -> str:
        """All that decides how it renders, for a digest."""
        return json.dumps([self.text, self._values, self._system], sort_keys=True, default=str)

    def _rendered(self, template: jinja2.Template, turns: Sequence[Turn], generation: bool = True) -> str:
        messages = [{"role": turn.role, "content": turn.content} for turn in turns]
        try:
            return template.render(
                messages=messages, tools=None, documents=None, add_generation_prompt=generation, **self._values
            )
        except (KeyboardInterrupt, SystemExit, MemoryError):
            raise
        except BaseException as error:  # a template does whatever it does
            words = " ".join(str(error).split()) or type(error).__name__
            raise RequestError(
                f"{self._at(_line(error))}: the chat template refuses {_shape(turns)}, {turns[-1].content!r:.120}: "
                f"{words[:300]} (data.template_file names another template; other forms of data.template need none)"
            ) from error

    def _check_arguments(self, arguments: Mapping[str, Any]) -> None:
        names = jinja2.meta.find_undeclared_variables(self._template.environment.parse(self.text))
        free = sorted(names - {*OWN, *SPECIAL} - set(self._template.environment.globals))
        for name in arguments:
            if name in (*OWN, *SPECIAL):
                raise RequestError(f"data.template_arguments.{name}: this follows from the prompts and the tokenizer")
            if name not in names:
                close = difflib.get_close_matches(name, free, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; it asks for {', '.join(free) or 'no argument'}"
                raise RequestError(
                    f"data.template_arguments.{name} has no effect: the chat template in {self._place} does not ask "
                    f"for it{hint}"
                )

    def _check_rendering(self) -> None:
        turns = (*self._system, Turn("user", PROBE))
        text = self._rendered(self._template, turns)
        printed: list[str] = []
        environment = self._template.environment.overlay(undefined=_recording(printed))
        self._rendered(environment.from_string(self.text), turns)
        if unknown := [name for name in printed if name not in SPECIAL]:
            close = difflib.get_close_matches(unknown[0], ["role", "content", *OWN, *SPECIAL], n=1)
            hint = f"; did you mean {close[0]}?" if close else "; data.template_arguments can give it a value"
            raise RequestError(
                f"{self._at(self._line_of(unknown[0]))}: the chat template prints {unknown[0]}, which holds "
                f"nothing{hint}"
            )
        for turn in turns:
            if turn.content.strip() not in text:
                raise RequestError(
                    f"{self._at(None)}: the chat template leaves out the {turn.role}'s message {turn.content!r:.80}"
                )
        if text == self._rendered(self._template, turns, generation=False):
            raise RequestError(
                f"{self._at(None)}: the chat template has no generation prompt: it renders the same with and without "
                "add_generation_prompt, and the model would go on with the user's turn"
            )

    def _line_of(self, name: str) -> int | None:
        lines = self.text.split("\n")
        return next((number for number, line in enumerate(lines, start=1) if name in line), None)

    def _at(self, line: int | None) -> str:
        if self._inside:
            return f"{self._place}: {self._inside}" + (f", line {line}" if line else "")
        return f"{self._place}:{line}" if line else str(self._place)


def _recording(printed: list[str]) -> type[jinja2.Undefined]:
    """An undefined value that notes its name where it is printed, as nothing."""

    class Recording(jinja2.Undefined):
        __slots__ = ()

        def __str__(self) -> str:
            printed.append(str(self._undefined_name))
            return ""

    return Recording


def _line(error: BaseException) -> int | None:
    """The line of a template in which an error was raised."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "<template>":
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def _shape(turns: Sequence[Turn]) -> str:
    return (
        "one turn of a user"
        if [turn.role for turn in turns] == ["user"]
        else (f"the turns {', '.join(turn.role for turn in turns)}")
    )


def place_of_template(folder: Path) -> tuple[Path, str]:
    """Where a tokenizer's own chat template stands: file, and field of it."""
    for name, inside in (("chat_template.jinja", ""), ("chat_template.json", "chat_template")):
        if (folder / name).is_file():
            return folder / name, inside
    path = folder / "tokenizer_config.json"
    return path, "chat_template"


def read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot read the chat template: {error}") from error
