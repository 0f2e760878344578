"""How values travel between tests and the program that they test: by value where they are plain, else by number.

Its text goes before those of asking.py and answering.py, each in a sandbox of its own: standard library only, and
nothing of this package. As JSON: what comes from the program is data to the tests, built from these tags and nothing
else.
"""

import json
import os
import struct
import sys
from collections.abc import Callable
from typing import Any

LARGEST = 32 << 20  # bytes of a message
COLLECTIONS: tuple[tuple[Any, str], ...] = ((list, "list"), (tuple, "tuple"), (set, "set"), (frozenset, "frozenset"))
sys.set_int_max_str_digits(0)


def encode(value: Any, other: Callable[[Any], Any]) -> Any:
    """A value as JSON has it; `other` says how what is not plain goes. Subclasses go as what they are one of."""
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, int | float | str):
        base = next(kind for kind in (bool, int, float, str) if isinstance(value, kind))
        return base(value)
    for kind, tag in COLLECTIONS:
        if isinstance(value, kind):
            return [tag, *(encode(each, other) for each in kind.__iter__(value))]
    if isinstance(value, dict):
        return ["dict", *([encode(key, other), encode(each, other)] for key, each in dict.items(value))]
    if isinstance(value, bytes | bytearray):
        return ["bytes" if isinstance(value, bytes) else "bytearray", bytes(value).hex()]
    if isinstance(value, complex):
        return ["complex", value.real, value.imag]
    if isinstance(value, range):
        return ["range", value.start, value.stop, value.step]
    if type(value).__module__ in ("decimal", "fractions"):
        return [type(value).__name__, str(value)]
    return other(value)


def decode(coded: Any, other: Callable[..., Any]) -> Any:
    """The value that was encoded. Raises ValueError for what is none."""
    if not isinstance(coded, list):
        if isinstance(coded, dict):
            raise ValueError("a value is no object")
        return coded
    tag, *rest = coded
    for kind, name in COLLECTIONS:
        if tag == name:
            return kind(decode(each, other) for each in rest)
    if tag == "dict":
        return {decode(key, other): decode(each, other) for key, each in rest}
    if tag in ("bytes", "bytearray"):
        return (bytes if tag == "bytes" else bytearray).fromhex(*rest)
    if tag in ("complex", "range"):
        return (complex if tag == "complex" else range)(*rest)
    if tag == "Decimal":
        from decimal import Decimal

        return Decimal(*rest)
    if tag == "Fraction":
        from fractions import Fraction

        return Fraction(*rest)
    return other(tag, *rest)


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
