"""Reads a configuration file, applies `--set section.key=value`, and names every mistake by file and line.

A file may name another one with `base: other.yaml` (relative to itself) and override it; `key: null` in the overriding
file takes the base's value back to the default. Paths: paths.py; the configuration keeps the absolute path it found.
"""

from __future__ import annotations

import functools
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from ..errors import RequestError
from . import nearest, paths
from .data import ARITHMETIC, DataOptions
from .fields import SECTIONS, default_of, kind_of, kinds, known_options, name_of_kind, takes_text
from .methods import METHODS
from .renamed import NULL_WAS, RENAMED
from .sections import Config, Settings
from .written import as_numbers, as_text, as_values, read_yaml

_PATHS = {
    "model.path": paths.existing,
    "data.path": paths.existing,
    "data.template_file": paths.existing,
    "data.cache": paths.to_make,
    "evaluation.benchmarks": paths.benchmark,
    "evaluation.data": paths.existing,
    "reward.function": paths.function,
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


class Given(NamedTuple):
    value: Any
    where: str  # file:line
    folder: Path  # that a path is relative to
    asked: bool = True  # False: it stands in a file of all options, such as a run's, whoever wanted it


Values = dict[str, Given]  # by dotted option


def load_config(path: Path | str, overrides: list[str] | tuple[str, ...] = (), must_exist: bool = True) -> Config:
    """The configuration in `path` with `overrides` ("section.key=value", YAML values) on top. `must_exist`: the files
    and folders that it names; a plan asks for none of them.

    Raises RequestError (exit 2) for an unreadable file, an unknown option (with the nearest valid one), a value of the
    wrong type or range, a missing model or data path, and an option that has no effect beside the others.
    """
    return _checked(_read_file(Path(path), ()), overrides, must_exist)


def config_of_model(folder: str, overrides: Sequence[str] = ()) -> Config:
    """The configuration of a model that has none: all by default, but what `overrides` say. It trains on nothing.

    Raises RequestError as `load_config` does.
    """
    model, data = (Given(value, "the command line", Path.cwd(), asked=False) for value in (folder, ARITHMETIC))
    return _checked({"model.path": model, "data.path": data}, overrides)


def _checked(values: Values, overrides: Sequence[str], must_exist: bool = True) -> Config:
    for text in overrides:
        _override(text, values)
    values = _located(_with_method(values), must_exist)
    config = _validate(values)
    for section in SECTIONS:
        chosen = getattr(config, section)
        for rule in chosen.without_effect:
            for option in (f"{section}.{name}" for name in rule.options):
                entry = values.get(option)
                if entry and entry.asked and entry.value != default_of(option) and rule.when(chosen):
                    raise RequestError(f"{entry.where}: {option} {no_effect(rule.because)}")
    return config


def _with_method(values: Values) -> Values:
    """Adds what a method says and nobody else does. An option that is null is as it is by default, whatever the method;
    of a section that is chosen to be another one than the method's, it says nothing.

    Raises RequestError for a method that there is not.
    """
    entry = values.get("method")
    if entry is None or not entry.value:
        return values
    if entry.value not in METHODS:
        raise RequestError(f"{entry.where}: there is no method {entry.value!r}: there are {', '.join(METHODS)}")
    method = METHODS[entry.value]
    said = {option: Given(value, entry.where, entry.folder, asked=False) for option, value in method.items()}
    for section in {option.partition(".")[0] for option in said if len(kinds(option.partition(".")[0])) > 1}:
        name = f"{section}.name"
        own = method.get(name, name_of_kind(kinds(section)[0]))
        if name in values and values[name].value not in (None, own):
            said = {option: given for option, given in said.items() if not option.startswith(f"{section}.")}
    return said | values


def no_effect(because: str) -> str:
    return f"has no effect, because {because}: remove it"


def data_options(paths_: list[str], overrides: list[str]) -> DataOptions:
    """The section `data` for such files, with overrides as `load_config` takes them. Raises RequestError likewise."""
    values: Values = {}
    for text in overrides:
        _override(text, values)
    for option, entry in values.items():
        if not option.startswith("data.") or option == "data.path":
            raise RequestError(f"{entry.where}: expected an option of the section data, but not its path")
    values["data.path"] = Given(paths_[0] if len(paths_) == 1 else paths_, "the command line", Path.cwd())
    return _validate({**_located(values, must_exist=True), "model.path": Given("none", "", Path.cwd())}).data


def resolved_text(settings: Settings) -> str:
    """Returns every option with its value as YAML, in the order of the sections."""
    why = "".join(f"{REASON}{option}: {reason}\n" for option, reason in settings.reasons.items())
    return why + yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)


REASON = "# planned: "  # before an option that a plan filled in, and why


def load_resolved(path: Path) -> Settings:
    """Reads a file of what `resolved_text` returned.

    Raises RequestError, naming file and option, for what is none: cut off, or of a version with other options.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = [line.removeprefix(REASON) for line in text.splitlines() if line.startswith(REASON)]
        reasons = {option: reason for option, _, reason in (line.partition(": ") for line in lines)}
        return Settings.model_validate(yaml.safe_load(text)).because(reasons)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        words = " ".join(str(error).split())[:300]
        raise RequestError(f"{path}: this is not the configuration of a run: {words}") from error
    except ValidationError as error:
        first = error.errors()[0]
        wrong = ": ".join(filter(None, [".".join(_place(first["loc"])), _said(first["msg"])]))
        raise RequestError(
            f"{path}: this is not the configuration of a run of this version: {wrong}; go on with the version that "
            "began the run (provenance.json), or begin a new one"
        ) from error


def _located(values: Values, must_exist: bool) -> Values:
    """Without those that are as by default (null), and paths as they are meant."""
    values = {option: entry for option, entry in values.items() if entry.value is not None}
    for option in _PATHS:
        if option in values:
            entry = values[option]
            values[option] = entry._replace(value=_path(option, entry.value, entry.where, entry.folder, must_exist))
    return values


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
        base_path = paths.existing("base", base, f"{path}:{lines['base']}", path.parent)
        values = _read_file(Path(base_path), (*seen, path.resolve()))
    entry_of = functools.partial(_given, lines, path, asked=not _is_whole(tree))
    _flatten(tree, "", entry_of, values)
    return values


def _given(lines: dict[str, int], path: Path, option: str, value: Any, asked: bool) -> Given:
    return Given(value, f"{path}:{lines.get(option, 1)}", path.parent, asked)


def _is_whole(tree: dict[Any, Any]) -> bool:
    """Whether every option of every section stands in a file: such a one was written by a run (`resolved_text`)."""
    for section in SECTIONS:
        options = as_text(tree.get(section))
        kind = kind_of(section, options.get("name")) if isinstance(options, dict) else None
        if kind is None or not kind.model_fields.keys() <= options.keys():
            return False
    return True


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
    _flatten({option: parsed}, "", lambda _, value: Given(value, f"--set {option}", Path.cwd()), values)


def in_shell(option: str, value: str) -> str:
    """How to give a value as text on a command line: the shell takes one pair of quotes, YAML the other."""
    quoted = json.dumps(value.strip(), ensure_ascii=False)
    return f"as text, in a shell: --set {shlex.quote(f'{option}={quoted}')}"


def _lines(node: yaml.Node | None, path: Path, prefix: str = "") -> dict[str, int]:
    """Dotted option → line number. A key that stands twice is an error: YAML would silently keep the last one."""
    lines: dict[str, int] = {}
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            option = f"{prefix}{key.value}"
            line = key.start_mark.line + 1
            if option in lines:
                raise RequestError(f"{path}:{line}: {option} is given twice (first in line {lines[option]})")
            lines[option] = line
            lines |= _lines(value, path, f"{option}.")
    return lines


def _flatten(tree: dict[Any, Any], prefix: str, given: Callable[[str, Any], Given], values: Values) -> None:
    """Lays a tree of settings out as dotted options. Pass-through dictionaries stay whole."""
    known = known_options()
    sections = set(SECTIONS)
    for key, value in tree.items():
        option = f"{prefix}{as_text(key)}"
        written = given(option, value)
        if option in sections:
            if value is None:
                for name in [n for n in values if n.startswith(f"{option}.")]:
                    del values[name]
            elif isinstance(value, dict):
                _flatten(value, f"{option}.", given, values)
            else:
                raise RequestError(
                    f"{written.where}: {option} is a section: expected options below it, got {as_text(value)!r}"
                )
            continue
        head = ".".join(option.split(".")[:2])
        if head in MAPPINGS and option != head:  # --set rollout.engine_args.x=1
            held = values[head].value if head in values and isinstance(values[head].value, dict) else {}
            entry = _settled(head, value, written.where)
            values[head] = written._replace(value={**held, option[len(head) + 1 :]: entry})
            continue
        if option in RENAMED:
            raise RequestError(f"{written.where}: {option} is now {RENAMED[option]}")
        if value is None and option in NULL_WAS:
            raise RequestError(f"{written.where}: {option}: null is no longer {NULL_WAS[option]}")
        if option not in known:
            raise RequestError(f"{written.where}: unknown option {option}{nearest.hint(option, known, sections)}")
        values[option] = written._replace(value=_settled(option, value, written.where))


def _settled(option: str, value: Any, where: str) -> Any:
    """What was written for an option that takes text, else what YAML reads."""
    if takes_text(option):
        return as_text(value)
    try:
        return as_values(value) if option in MAPPINGS else as_numbers(value)
    except ValueError as error:
        raise RequestError(f"{where}: {option}: {error}") from error


def _path(option: str, value: Any, where: str, folder: Path, must_exist: bool) -> Any:
    """The path that is meant; what is none is left to be refused for its type."""
    if isinstance(value, list):
        return [_path(option, entry, where, folder, must_exist) for entry in value]
    if not isinstance(value, str) or value in ("", ARITHMETIC):
        return value
    if option == "data.path" and value.startswith("builtin:"):
        raise RequestError(f"{where}: {option}: there is no {value}; the built-in task is {ARITHMETIC}")
    kind = _PATHS[option]
    return (paths.to_make if kind is paths.existing and not must_exist else kind)(option, value, where, folder)


def _validate(values: Values) -> Config:
    tree: dict[str, Any] = {}
    for option, entry in values.items():
        section, _, name = option.partition(".")
        if name:
            tree.setdefault(section, {})[name] = entry.value
        else:
            tree[section] = entry.value
    for section in ("model", "data"):
        if section not in tree:
            raise RequestError(f"{section}.path is not set: the configuration must say which {section} to use")
    for section in tree.keys() & set(SECTIONS):
        _check_kind(section, tree[section], values)
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        place = _place(first["loc"])
        option = ".".join(place[:2])
        where = f"{values[option].where}: " if option in values else ""
        got = f" (got {first['input']!r})" if option in values else ""
        if option in MAPPINGS and len(place) > 2:
            option = ".".join(place[:3])
        raise RequestError(f"{where}{option}: {_said(first['msg'])}{got}") from error


def _place(loc: tuple[int | str, ...]) -> list[str]:
    """Where pydantic found a mistake, without the name that it puts second for a section that is one of several."""
    parts = [str(part) for part in loc]
    several = bool(parts) and parts[0] in SECTIONS and len(kinds(parts[0])) > 1
    return parts[:1] + parts[2 if several else 1 :]


def _check_kind(section: str, options: dict[str, Any], values: Values) -> None:
    """Of a section that is one of several: raises RequestError for a `name` of none, and for another one's option,
    which is left out where nobody asked for it."""
    if len(kinds(section)) == 1:
        return
    names = [str(name_of_kind(kind)) for kind in kinds(section)]
    kind = kind_of(section, options.get("name"))
    if kind is None:
        raise RequestError(
            f"{values[f'{section}.name'].where}: {section}.name: Input should be {' or '.join(map(repr, names))} (got "
            f"{options['name']!r})"
        )
    for name in options.keys() - kind.model_fields.keys():
        option = f"{section}.{name}"
        if values[option].asked:
            because = f"{section}.name is {name_of_kind(kind)}"
            raise RequestError(f"{values[option].where}: {option} {no_effect(because)}")
        del options[name]


def _said(message: str) -> str:
    """pydantic's words, in those of a configuration file."""
    words = message.removeprefix("Value error, ").replace("valid tuple", "list").replace("valid dictionary", "mapping")
    return words.replace("a valid string", "text")
