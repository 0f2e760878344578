"""How values travel between tests and the program that they test: by value where they are plain, else by number.

Its text goes before those of asking.py and answering.py, each in a sandbox of its own: standard library only, and
nothing of this package. As JSON: what comes from the program is data to the tests, built from these tags and nothing
else.
"""

import json
import os
import struct
import sys
from collections import Counter, deque, namedtuple
from collections.abc import Callable
from typing import Any

LARGEST = 32 << 20  # bytes of a message
COLLECTIONS: tuple[tuple[Any, str], ...] = ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset"))
TEXTS = {"decimal": ("Decimal",), "fractions": ("Fraction",), "datetime": ("date", "datetime", "time")}
sys.set_int_max_str_digits(0)
sys.setrecursionlimit(10_000)  # a linked list as nested tuples


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """A value as JSON has it; `other` says how what is not plain goes. Subclasses go as what they are one of, whatever
    they make of themselves."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, tuple) and isinstance(fields := getattr(value, "_fields", None), tuple):
        return ["named", type(value).__name__, list(fields), *(encode(each, other) for each in tuple.__iter__(value))]
    for kind, tag in COLLECTIONS:
        if isinstance(value, kind):
            return [tag, *(encode(each, other) for each in kind.__iter__(value))]
    if isinstance(value, dict):
        tag = "counter" if isinstance(value, Counter) else "dict"
        return [tag, *([encode(key, other), encode(each, other)] for key, each in dict.items(value))]
    if isinstance(value, deque):
        return ["deque", value.maxlen, *(encode(each, other) for each in deque.__iter__(value))]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range | slice):
        ends = (encode(each, other) for each in (value.start, value.stop, value.step))
        return ["range" if isinstance(value, range) else "slice", *ends]
    kind = type(value)
    if kind.__name__ in TEXTS.get(kind.__module__, ()):
        return [
            "text",
            kind.__module__,
            kind.__name__,
            value.isoformat() if kind.__module__ == "datetime" else str(value),
        ]
    if (kind.__module__, kind.__name__) == ("datetime", "timedelta"):
        return ["timedelta", value.days, value.seconds, value.microseconds]
    return other(value)


def decode(coded: Any, other: Callable[..., Any]) -> Any:
    """The value that was encoded. Raises ValueError, or what its parts raise, for what is none."""
    if not isinstance(coded, list):
        if isinstance(coded, dict):
            raise ValueError("a value is no object")
        return coded
    tag, *rest = coded
    for kind, name in COLLECTIONS:
        if tag == name:
            return kind([decode(each, other) for each in rest])
    if tag in ("dict", "counter"):
        return (dict if tag == "dict" else Counter)({decode(key, other): decode(each, other) for key, each in rest})
    if tag == "named":
        name, fields, *values = rest
        made = namedtuple(str(name), [str(field) for field in fields], rename=True)  # type: ignore[misc]
        return made(*(decode(each, other) for each in values))
    if tag == "deque":
        return deque((decode(each, other) for each in rest[1:]), rest[0])
    if tag in ("bytes", "bytearray"):
        return (bytes if tag == "bytes" else bytearray).fromhex(*rest)
    if tag in ("complex", "range"):
        return (complex if tag == "complex" else range)(*rest)
    if tag == "slice":
        return slice(*(decode(each, other) for each in rest))
    if tag == "timedelta":
        from datetime import timedelta

        return timedelta(*rest)
    if tag == "text":
        return of_text(*rest)
    return other(tag, *rest)


def of_text(module: str, kind: str, text: str) -> Any:
    if kind not in TEXTS.get(module, ()):
        raise ValueError(f"no value is of {module}.{kind}")
    made = getattr(__import__(module), kind)
    return made.fromisoformat(text) if module == "datetime" else made(text)


def send(channel: int, message: dict[str, Any]) -> None:
    text = json.dumps(message).encode()
    if len(text) > LARGEST:
        raise ValueError(f"a value takes more than {LARGEST:,} bytes")
    rest = memoryview(struct.pack("=I", len(text)) + text)
    while rest:
        rest = rest[os.write(channel, rest) :]


def receive(channel: int) -> Any:
    """The next message. Raises EOFError where the other side has ended."""
    size = struct.unpack("=I", exactly(channel, 4))[0]
    if size > LARGEST:
        raise ValueError(f"a value takes more than {LARGEST:,} bytes")
    return json.loads(exactly(channel, size))


def exactly(channel: int, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        part = os.read(channel, min(size - len(read), 1 << 20))
        if not part:
            raise EOFError
        read += part
    return bytes(read)
