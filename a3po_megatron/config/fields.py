"""What options there are, by dotted name: of a section that is one of several (`optimizer`), those of each."""

from __future__ import annotations

import types
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from .section import Section
from .sections import Config


def kinds(section: str) -> tuple[type[Section], ...]:
    """What a section may be, the default first. None for an option of the top level."""
    info = Config.model_fields[section]
    parts = (info.annotation, *get_args(info.annotation))
    bare = (get_args(part)[0] if get_origin(part) is Annotated else part for part in parts)
    classes = tuple(part for part in bare if isinstance(part, type) and issubclass(part, Section))
    return tuple(sorted(classes, key=lambda each: each is not type(info.default)))


SECTIONS = tuple(section for section in Config.model_fields if kinds(section))


def known_options() -> list[str]:
    """Every dotted option name."""
    names = []
    for section in Config.model_fields:
        options = dict.fromkeys(f"{section}.{name}" for kind in kinds(section) for name in kind.model_fields)
        names += list(options) if kinds(section) else [section]
    return names


def name_of_kind(kind: type[Section]) -> str | None:
    """What `name` is in a section that is one of several."""
    field = kind.model_fields.get("name")
    return str(get_args(field.annotation)[0]) if field and get_origin(field.annotation) is Literal else None


def kind_of(section: str, name: str | None) -> type[Section] | None:
    """Which of several a section is, by its `name` (None: not given). None where no such one is there."""
    choices = kinds(section)
    if len(choices) < 2 or name is None:
        return choices[0]
    return next((kind for kind in choices if name_of_kind(kind) == name), None)


def fields_of(option: str) -> list[FieldInfo]:
    """An option's field, in each of what its section may be that has it."""
    section, _, name = option.partition(".")
    if not name:
        return [Config.model_fields[section]]
    return [kind.model_fields[name] for kind in kinds(section) if name in kind.model_fields]


def default_of(option: str) -> Any:
    """The option's default, as a file would give it; something that equals nothing if it must be set."""
    if "." not in option:
        return object()
    value = fields_of(option)[0].get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def takes_text(option: str) -> bool:
    """Whether an option's value, or what it holds, is text."""
    return any(_is_text(field.annotation) for field in fields_of(option))


def _is_text(kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _is_text(inner[0])
    if origin is Literal:
        return any(isinstance(choice, str) for choice in inner)
    if origin is dict:
        return _is_text(inner[1])
    if origin in (Union, types.UnionType, tuple):
        return any(_is_text(part) for part in inner)
    return kind is str
