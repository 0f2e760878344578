"""Reads a row of LiveCodeBench: a problem with a date, public tests, and private tests that are packed.

The private tests are JSON text, or base64 of zlib of a *pickled* JSON text. Nothing is unpickled here: a pickle is a
program. Its operations are listed, and those of a text alone are taken; any other is refused. What a few bytes inflate
to is bounded.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import json
import pickletools
import re
import zlib
from typing import Any

from ..data.fields import value_at
from ..errors import RequestError
from .rows import About, Item, Layout, Row, text_of

LARGEST = 1 << 30  # bytes of one problem's tests
# The operations of pickle.dumps(text), protocols 0 to 5: marks of the format, a name for what nobody asks for again,
# and the text.
_AROUND = ("PROTO", "FRAME", "MEMOIZE", "PUT", "BINPUT", "LONG_BINPUT", "STOP")
_STRINGS = ("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
_RELEASE = re.compile(r"(?:release_)?(v\d+(?:_v\d+)?)")
# Problems of each release (the data card of livecodebench/code_generation_lite).
RELEASES = {"v1": 400, "v2": 511, "v3": 612, "v4": 713, "v5": 880}


def live_code(row: Row, layout: Layout, about: About) -> Item | None:
    """Reads a problem whose date lies in the window. With a function's name the tests call it, else they run the
    program on an input."""
    content, public, private, date = layout
    if not _within(value_at(row, date), date, about.window):
        return None
    cases = [case for field in (public, private) for case in _cases(value_at(row, field), field)]
    if not cases:
        raise RequestError(f"the fields {public!r} and {private!r} hold no test")
    kinds = {case["testtype"] for case in cases}
    if len(kinds) > 1:
        raise RequestError(f"the tests are of several kinds: {', '.join(sorted(kinds))}")
    plain = [{"input": case["input"], "output": case["output"]} for case in cases]
    parts = {"problem": text_of(row, content)}
    if starter := str(row.get("starter_code") or "").strip("\n"):
        parts["starter"] = starter
    if kinds == {"stdin"}:
        return Item(parts, json.dumps({"kind": "stdin", "cases": plain}))
    return Item(parts, json.dumps({"kind": "calls", "function": _function(row), "cases": plain}))


def checked_release(text: str) -> str:
    """Returns a release's tag without `release_`, such as v5, or v4_v5 for what one added to another."""
    match = _RELEASE.fullmatch(text)
    if match is None:
        raise RequestError(f"--release {text}: expected a tag such as v5")
    return match[1]


def checked_window(text: str) -> str:
    """Returns FROM:TO, two dates of which the first is not the later one."""
    first, colon, last = text.partition(":")
    try:
        days = [datetime.date.fromisoformat(first), datetime.date.fromisoformat(last)] if colon else []
    except ValueError:
        days = []
    if not days or days[0] > days[1]:
        raise RequestError(f"--window {text}: expected FROM:TO, dates in their order, such as 2024-08-01:2025-01-31")
    return f"{days[0]}:{days[1]}"


def _within(value: Any, field: str, window: str) -> bool:
    """Tells whether a contest's day lies in the window, its ends included."""
    try:
        day = datetime.datetime.fromisoformat(str(value)).date()
    except ValueError:
        raise RequestError(f"the field {field!r} is no date: {value!r:.80}") from None
    first, _, last = window.partition(":")
    return datetime.date.fromisoformat(first) <= day <= datetime.date.fromisoformat(last)


def _cases(value: Any, field: str) -> list[dict[str, str]]:
    if isinstance(value, str):
        text = value if value.lstrip().startswith("[") else unpacked(value, field)
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise RequestError(f"the field {field!r} holds no JSON: {error!s:.200}") from error
    if not isinstance(value, list):
        raise RequestError(f"the field {field!r} is no list of tests")
    for case in value:
        whole = isinstance(case, dict) and all(isinstance(case.get(n), str) for n in ("input", "output", "testtype"))
        if not whole or case["testtype"] not in ("stdin", "functional"):
            raise RequestError(
                f"the field {field!r} holds a test that is not {{input, output, testtype: stdin or functional}}: "
                f"{case!r:.120}"
            )
    return value


def unpacked(text: str, field: str) -> str:
    """Returns the text in base64 of zlib of a pickle of it, without ever running the pickle."""
    try:
        packed = base64.b64decode(text.strip(), validate=True)
        inflating = zlib.decompressobj()
        data = inflating.decompress(packed, LARGEST)
    except (binascii.Error, zlib.error, ValueError) as error:
        raise RequestError(f"the field {field!r} is neither JSON nor base64 of zlib: {error}") from error
    if inflating.unconsumed_tail:
        raise RequestError(f"the field {field!r} inflates to more than {LARGEST:,} bytes")
    if not inflating.eof:
        raise RequestError(f"the field {field!r} is cut off: its zlib stream has no end")
    texts = []
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name in _STRINGS:
                texts.append(str(argument))
            elif operation.name not in _AROUND:
                raise RequestError(f"the field {field!r} holds a pickle of more than a text: {operation.name}")
    except (ValueError, OverflowError, UnicodeError) as error:
        raise RequestError(f"the field {field!r} holds a damaged pickle: {error!s:.200}") from error
    if len(texts) != 1:
        raise RequestError(f"the field {field!r} holds a pickle of {len(texts)} texts, expected one")
    return texts[0]


def _function(row: Row) -> str:
    """Returns the name of the function that is tested, from the row's metadata."""
    metadata = row.get("metadata")
    try:
        tree = json.loads(metadata) if isinstance(metadata, str) else metadata
    except (ValueError, RecursionError):
        tree = None
    name = tree.get("func_name") if isinstance(tree, dict) else None
    if not isinstance(name, str) or not name.isidentifier():
        raise RequestError("the field 'metadata' names no function (func_name), and the tests call one")
    return name
