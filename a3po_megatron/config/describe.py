"""`a3po options`: every option with its type, default and meaning, from the fields themselves."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from ..errors import RequestError
from . import nearest
from .fields import SECTIONS, fields_of, kinds, known_options, name_of_kind

NAMES = {int: "integer", float: "number", bool: "true or false", str: "text", Any: "anything", type(None): "null"}
LIMITS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


class Option(NamedTuple):
    name: str
    kind: str
    default: str
    meaning: str


def options(section: str | None) -> list[Option]:
    """The options of one section, or all. Raises RequestError for a section that there is not."""
    described = list(_all())
    sections = {*SECTIONS, *(option.name for option in described if "." not in option.name)}
    if section is None:
        return described
    if section not in sections:
        hint = nearest.hint(section, [option.name for option in described], sections)
        raise RequestError(f"there is no section {section}{hint}")
    return [option for option in described if option.name.partition(".")[0] == section]


def _all() -> Iterator[Option]:
    for option in known_options():
        section, _, name = option.partition(".")
        fields = fields_of(option)
        default = fields[0].get_default(call_default_factory=True)
        shown = "required" if default is PydanticUndefined else _value(default)
        # What a section that is one of several may be stands at its `name`; an option of one of them says of which.
        kind = " | ".join(dict.fromkeys(_kind(field.annotation, field.metadata) for field in fields))
        owners = [str(name_of_kind(each)) for each in kinds(section) if name in each.model_fields]
        of = f"{', '.join(owners)}: " if 0 < len(owners) < len(kinds(section)) else ""
        others = [
            f"{owner}: {_value(field.default)}"
            for owner, field in zip(owners, fields, strict=False)  # of the top level: no owner
            if name != "name" and field.default != fields[0].default
        ]
        meaning = (fields[0].description or "") + (f" (default of {', '.join(others)})" if others else "")
        yield Option(option, kind, shown, of + meaning)


def _kind(kind: Any, limits: list[Any]) -> str:
    """A type in words, with the limits of its value."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _kind(inner[0], [*inner[1:], *limits])
    if origin is Literal:
        return " | ".join(_value(choice) for choice in inner)
    if origin in (Union, types.UnionType):
        parts = [_kind(part, limits if part is not type(None) else []) for part in inner]
        return " | ".join(dict.fromkeys(parts))
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return f"list of {_kind(inner[0], [])}"
        return f"list of {len(inner)}: {_kind(inner[0], [])}"
    if origin is dict:
        return f"mapping to {_kind(inner[1], [])}"
    bounds = [f"{sign} {_value(bound)}" for limit in limits for bound, sign in _bounds(limit)]
    return " ".join([NAMES[kind], ", ".join(bounds)]).rstrip()


def _bounds(limit: Any) -> Iterator[tuple[Any, str]]:
    for part in limit.metadata if isinstance(limit, FieldInfo) else [limit]:
        for kind, name, sign in LIMITS:
            if isinstance(part, kind):
                yield getattr(part, name), sign


def _value(value: Any) -> str:
    """As a configuration file has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_value, value))}]"
    return str(value) or '""'
