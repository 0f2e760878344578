"""Paths as people write them, in a file, after --set and as an argument alike.

`~`, `~user`, `$NAME` and `${NAME}` are expanded, once. What is relative is looked for beside the file that names it and
then in the current directory; what is to be made is made in the current directory.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from ..errors import RequestError

VARIABLE = re.compile(r"\$(?:\{(?P<braced>[^}]*)\}|(?P<plain>[A-Za-z_][A-Za-z0-9_]*))", re.ASCII)
IMAGES = (".sqsh", ".squashfs", ".sif", ".simg", ".img")  # files of containers; other names are a registry's


def expanded(text: str, where: str) -> str:
    """The path that is meant. Raises RequestError, which begins with `where`, for a home or a variable that is not
    there, naming it."""
    if "\0" in text or re.search("[\ud800-\udfff]", text):
        raise RequestError(f"{where}: {text!r} holds a character that no path can")
    if not text:
        raise RequestError(f"{where}: expected a path, got nothing")
    start, slash, rest = text.partition("/")
    if start.startswith("~"):
        home = os.path.expanduser(start)
        if home == start:
            raise RequestError(f"{where}: {text}: there is no home folder of {start[1:] or 'this user'}")
        return home + slash + _with_variables(rest, text, where)
    return _with_variables(text, text, where)


def _with_variables(part: str, text: str, where: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match["plain"] or match["braced"]
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise RequestError(f"{where}: {text}: ${{{name}}} is not expanded here, only ${{NAME}} is")
        if not os.environ.get(name):
            raise RequestError(f"{where}: {text}: the variable {name} is not set")
        return os.environ[name]

    return VARIABLE.sub(value, part)


def places(path: str, folder: Path) -> list[Path]:
    """Where a path may be that stands in a file of this folder."""
    return list(dict.fromkeys((folder / path, Path.cwd() / path)))


def existing(option: str, text: str, where: str, folder: Path) -> str:
    """The absolute path of what an option names. Raises RequestError with all places where it is not."""
    tried = places(expanded(text, where), folder)
    for path in tried:
        if exists(path):
            return str(path.resolve())
    raise RequestError(f"{where}: {option} is {text}, but there is no {' or '.join(map(str, tried))}")


def exists(path: Path) -> bool:
    """Also of one whose name is too long for this file system, or that lies where nobody may look: it does not."""
    try:
        return path.exists()
    except OSError:
        return False


def to_make(option: str, text: str, where: str, folder: Path) -> str:
    """The absolute path of what may have to be made yet."""
    tried = places(expanded(text, where), folder)
    return str(next((path for path in tried if exists(path)), tried[-1]).resolve())


def program(option: str, text: str, where: str, folder: Path) -> str:
    """An interpreter: a plain name is left to PATH, and what is absolute may be there on the nodes alone.

    Links stay: python looks for an environment's packages beside the link.
    """
    path = expanded(text, where)
    if "/" not in path or path.startswith("/"):
        return path
    existing(option, text, where, folder)
    return os.path.abspath(next(place for place in places(path, folder) if exists(place)))


def image(option: str, text: str, where: str, folder: Path) -> str:
    """The image of a container: a file, or a name for a registry."""
    path = expanded(text, where)
    if path.startswith("/") or not (path.startswith((".", "~")) or path.endswith(IMAGES)):
        return path
    return existing(option, text, where, folder)


def mount(option: str, text: str, where: str, folder: Path) -> str:
    """SOURCE[:TARGET[:FLAGS]] of a container's mounts, several with commas between, each with absolute paths."""
    entries = []
    for entry in text.split(","):
        source, *rest = re.split(r":(?![^{}]*\})", entry)
        path = expanded(source, where)
        if not path.startswith("/"):
            path = existing(option, source, where, folder)
        entries.append(":".join([path, *(expanded(part, where) for part in rest)]))
    return ",".join(entries)


def benchmark(option: str, text: str, where: str, folder: Path) -> str:
    """A benchmark: its name, or a file of rows, which has an ending or stands in a folder."""
    return existing(option, text, where, folder) if "." in text or "/" in text else text


def function(option: str, text: str, where: str, folder: Path) -> str:
    """FILE.py:NAME with the file's place, or MODULE:NAME."""
    place, colon, name = text.rpartition(":")
    if not colon or not name.isidentifier():
        raise RequestError(f"{where}: {option}: {text!r}: expected FILE.py:NAME or MODULE:NAME")
    return f"{existing(option, place, where, folder) if place.endswith('.py') else place}:{name}"
