"""Reads a configuration file, applies `--set section.key=value`, and names every mistake by file and line.

A file may name another one with `base: other.yaml` (relative to itself) and override it; `key: null` in the overriding
file takes the base's value back to the default. Paths: paths.py; the configuration keeps the absolute path it found.
"""

from __future__ import annotations

import json
import shlex
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ValidationError

from ..errors import RequestError
from . import nearest, paths
from .config import WITHOUT_EFFECT, Config
from .data import ARITHMETIC, DataOptions
from .written import as_numbers, as_text, as_values, read_yaml

_PATHS = {
    "model.path": paths.existing,
    "data.path": paths.existing,
    "data.template_file": paths.existing,
    "data.cache": paths.to_make,
    "slurm.cache": paths.to_make,
    "slurm.python": paths.program,
    "slurm.container": paths.image,
    "slurm.mounts": paths.mount,
}
MAPPINGS = (
    "megatron.extra",
    "rollout.engine_args",
    "slurm.environment",
    "data.template_arguments",
)  # whose entries can be given one by one
Values = dict[str, tuple[Any, str, Path]]  # dotted option → value, where it was set ("file:line"), folder


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The configuration in `path` with `overrides` ("section.key=value", YAML values) on top.

    Raises RequestError (exit 2) for an unreadable file, an unknown option (with the nearest valid one), a value of the
    wrong type or range, a missing model or data path, and an option that has no effect beside the others.
    """
    values = _read_file(Path(path), ())
    for text in overrides:
        _override(text, values)
    values = {option: entry for option, entry in values.items() if entry[0] is not None or _nullable(option)}
    for option in _PATHS:
        if option in values:
            value, where, folder = values[option]
            values[option] = (_path(option, value, where, folder), where, folder)
    config = _validate(values)
    for rule in WITHOUT_EFFECT:
        for option in rule.options:
            if option in values and values[option][0] != _default(option) and rule.when(config):
                raise RequestError(f"{values[option][1]}: {option} has no effect, because {rule.because}: remove it")
    return config


def data_options(paths_: list[str], overrides: list[str]) -> DataOptions:
    """The section `data` for such files, with overrides as `load_config` takes them. Raises RequestError likewise."""
    values: Values = {}
    for text in overrides:
        _override(text, values)
    for option, (_, where, _) in values.items():
        if not option.startswith("data.") or option == "data.path":
            raise RequestError(f"{where}: expected an option of the section data, but not its path")
    values |= {"data.path": (paths_[0] if len(paths_) == 1 else paths_, "the command line", Path.cwd())}
    for option in _PATHS:
        if option in values:
            value, where, folder = values[option]
            values[option] = (_path(option, value, where, folder), where, folder)
    return _validate({**values, "model.path": ("none", "", Path.cwd())}).data


def resolved_text(config: Config) -> str:
    """Returns every option with its value as YAML, in the order of the sections."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def load_resolved(path: Path) -> Config:
    """Reads a file of what `resolved_text` returned. All options stand in it, so rules about explicitly given ones do
    not apply."""
    return Config.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))


def known_options() -> list[str]:
    """Every dotted option name."""
    names = []
    for section, info in Config.model_fields.items():
        kind = info.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names += [f"{section}.{name}" for name in kind.model_fields]
        else:
            names.append(section)
    return names


def _read_file(path: Path, seen: tuple[Path, ...]) -> Values:
    if path.resolve() in seen:
        raise RequestError(f"{path}: the chain of `base` files comes back to itself")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"{path}: cannot read the configuration: {error}") from error
    try:
        node, tree = read_yaml(text)
    except ValueError as error:
        raise RequestError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        raise RequestError(f"{path}: the file is empty; it must hold at least model.path and data.path")
    if not isinstance(tree, dict):
        raise RequestError(f"{path}: expected sections such as `model:` and `trainer:` at the top level")
    try:
        lines = _lines(node, path)
    except RecursionError as error:
        raise RequestError(f"{path}: an alias refers to what it stands in") from error
    values: Values = {}
    if (base := as_text(tree.pop("base", None))) is not None:
        if not isinstance(base, str):
            raise RequestError(f"{path}:{lines['base']}: base must be the name of a configuration file")
        found = paths.existing("base", base, f"{path}:{lines['base']}", path.parent)
        values = _read_file(Path(found), (*seen, path.resolve()))
    _flatten(tree, "", lambda option: f"{path}:{lines.get(option, 1)}", path.parent, values)
    return values


def _override(text: str, values: Values) -> None:
    option, equals, value = text.partition("=")
    option = option.strip()
    if not equals or not value.strip():
        raise RequestError(f"--set {text}: expected section.key=value")
    try:
        node, parsed = read_yaml(value)
    except ValueError as error:
        raise RequestError(f"--set {text}: the value is not YAML: {error}; {in_shell(option, value)}") from error
    if node is not None and value[node.end_mark.index :].strip():
        raise RequestError(f"--set {text}: what follows # is a comment in YAML; {in_shell(option, value)}")
    if isinstance(node, yaml.MappingNode) and not node.flow_style and option in known_options():
        raise RequestError(f"--set {text}: a colon and a blank make a mapping in YAML; {in_shell(option, value)}")
    _flatten({option: parsed}, "", lambda _: f"--set {option}", Path.cwd(), values)


def in_shell(option: str, value: str) -> str:
    """How to give a value as text on a command line: the shell takes one pair of quotes, YAML the other."""
    quoted = json.dumps(value.strip(), ensure_ascii=False)
    return f"as text, in a shell: --set {shlex.quote(f'{option}={quoted}')}"


def _lines(node: yaml.Node | None, path: Path, prefix: str = "") -> dict[str, int]:
    """Dotted option → line number. A key that stands twice is an error: YAML would silently keep the last one."""
    found: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            option = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if option in found:
                raise RequestError(f"{path}:{line}: {option} is given twice (first in line {found[option]})")
            found[option] = line
            found |= _lines(value, path, f"{option}.")
    return found


def _flatten(tree: dict[Any, Any], prefix: str, where: Any, folder: Path, values: Values) -> None:
    """Lays a tree of settings out as dotted options. Pass-through dictionaries stay whole."""
    known = known_options()
    sections = {name.partition(".")[0] for name in known if "." in name}
    for key, value in tree.items():
        option = f"{prefix}{as_text(key)}"
        if option in sections:
            if value is None:
                for name in [n for n in values if n.startswith(f"{option}.")]:
                    del values[name]
            elif isinstance(value, dict):
                _flatten(value, f"{option}.", where, folder, values)
            else:
                raise RequestError(
                    f"{where(option)}: {option} is a section: expected options below it, got {as_text(value)!r}"
                )
            continue
        head = ".".join(option.split(".")[:2])
        if head in MAPPINGS and option != head:  # --set rollout.engine_args.x=1
            held = values[head][0] if head in values and isinstance(values[head][0], dict) else {}
            values[head] = ({**held, option[len(head) + 1 :]: _settled(head, value, where)}, where(option), folder)
            continue
        if option not in known:
            raise RequestError(f"{where(option)}: unknown option {option}{nearest.hint(option, known, sections)}")
        values[option] = (_settled(option, value, where), where(option), folder)


def _settled(option: str, value: Any, where: Any) -> Any:
    """What was written for an option that takes text, else what YAML reads."""
    if takes_text(annotation_of(option)):
        return as_text(value)
    try:
        return as_values(value) if option in MAPPINGS else as_numbers(value)
    except ValueError as error:
        raise RequestError(f"{where(option)}: {option}: {error}") from error


def annotation_of(option: str) -> Any:
    """The type of an option's value."""
    section, _, name = option.partition(".")
    kind = Config.model_fields[section].annotation
    return kind.model_fields[name].annotation if name and isinstance(kind, type) else kind


def takes_text(kind: Any) -> bool:
    """Whether a value of this type, or what it holds, is text."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return takes_text(inner[0])
    if origin is Literal:
        return any(isinstance(choice, str) for choice in inner)
    if origin is dict:
        return takes_text(inner[1])
    if origin in (Union, types.UnionType, tuple):
        return any(takes_text(part) for part in inner)
    return kind is str


def _nullable(option: str) -> bool:
    section, _, name = option.partition(".")
    kind = Config.model_fields[section].annotation
    if not name or not (isinstance(kind, type) and issubclass(kind, BaseModel)):
        return False
    return "None" in str(kind.model_fields[name].annotation)


def _default(option: str) -> Any:
    """The option's default, as a file would give it; something that equals nothing if it must be set."""
    section, _, name = option.partition(".")
    kind = Config.model_fields[section].annotation
    if not (name and isinstance(kind, type) and issubclass(kind, BaseModel)):
        return object()
    value = kind.model_fields[name].get_default(call_default_factory=True)
    return list(value) if isinstance(value, tuple) else value


def _path(option: str, value: Any, where: str, folder: Path) -> Any:
    """The path that is meant; what is none is left to be refused for its type."""
    if isinstance(value, list):
        return [_path(option, entry, where, folder) for entry in value]
    if not isinstance(value, str) or value == ARITHMETIC:
        return value
    if option == "data.path" and value.startswith("builtin:"):
        raise RequestError(f"{where}: {option}: there is no {value}; the built-in task is {ARITHMETIC}")
    return _PATHS[option](option, value, where, folder)


def _validate(values: Values) -> Config:
    tree: dict[str, Any] = {}
    for option, (value, _, _) in values.items():
        section, _, name = option.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    for section in ("model", "data"):
        if section not in tree:
            raise RequestError(f"{section}.path is not set: the configuration must say which {section} to use")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        option = ".".join(str(part) for part in first["loc"][:2])
        where = f"{values[option][1]}: " if option in values else ""
        given = f" (got {first['input']!r})" if option in values else ""
        if option in MAPPINGS and len(first["loc"]) > 2:
            option = ".".join(str(part) for part in first["loc"][:3])
        raise RequestError(f"{where}{option}: {_said(first['msg'])}{given}") from error


def _said(message: str) -> str:
    """pydantic's words, in those of a configuration file."""
    words = message.removeprefix("Value error, ").replace("valid tuple", "list").replace("valid dictionary", "mapping")
    return words.replace("a valid string", "text")
