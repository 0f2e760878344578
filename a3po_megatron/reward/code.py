r"""Grades a program: the last ```python block behind the thoughts, against the tests that the gold answer holds.

    {"kind": "asserts", "tests": […], "setup": "", "setup_after": ""}      lines that hold once the program has run
    {"kind": "check", "prompt": …, "test": …, "entry_point": …}            check(candidate), with the prompt's names
    {"kind": "calls", "function": …, "cases": [{"input", "output"}, …]}    a JSON value a line, and one that comes back
    {"kind": "stdin", "cases": [{"input", "output"}, …]}                   what it reads, and what it writes

The program runs in one sandbox, the tests that call it in another (sandbox/), and what it writes is compared here: it
passes by its answers and by nothing else. All that it does, and every limit that it meets, is *wrong*; a sandbox that
does not start and tests that fail by themselves are *invalid*.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable
from decimal import Decimal, InvalidOperation
from pathlib import Path
from typing import Any

from ..batch import Verdict
from .find import without_thoughts
from .sandbox.choose import Sandbox, sandbox_of
from .sandbox.program import Chosen, Program, Ran, SandboxFailed

_FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*(\w*)[^`]*")
_LANGUAGES = ("python", "python3", "py")
# What solutions of such problems take for granted, as where they are posed; what Python has itself stays what it is.
_AROUND_CALLS = """
import bisect, collections, functools, heapq, itertools, math, operator, random, re, string, sys
from bisect import *
from collections import *
from functools import *
from heapq import *
from itertools import *
from math import *
from typing import *
from builtins import *
"""
_TEXTS = {"asserts": ("setup", "setup_after"), "check": ("prompt", "test", "entry_point"), "calls": ("function",)}
ENDED = "the program ended"  # what asking.py says of a program that answers no more
_FOLDER = Path(__file__).with_name("sandbox")
_WIRE = f"""
import sys, types
sys.modules["wire"] = types.ModuleType("wire")
exec({_FOLDER.joinpath("wire.py").read_text()!r}, sys.modules["wire"].__dict__)
"""
_ASKING, _ANSWERING = (_WIRE + _FOLDER.joinpath(name).read_text() for name in ("asking.py", "answering.py"))


def why_unreadable(answer: str) -> str:
    """Says why a gold answer is none; empty: it is one."""
    tests = _tests(answer)
    return tests if isinstance(tests, str) else ""


def grade(response: str, answer: str, *, sandbox: Chosen, finished: bool = True) -> Verdict:
    """The verdict of a gold answer's tests on the program in a response."""
    tests = _tests(answer)
    if isinstance(tests, str):
        return Verdict("invalid", tests)
    if not finished:
        return Verdict("wrong", "the response was cut off")
    source, why = code_of(response, _names(tests))
    if why:
        return Verdict("wrong", why)
    try:
        return _run(sandbox_of(sandbox), tests, source)
    except SandboxFailed as error:
        return Verdict("invalid", str(error))


def code_of(response: str, names: Iterable[str] = ()) -> tuple[str, str]:
    """Returns the program of a response, and why there is none: its last block of Python, of several the last that
    defines one of the names, since examples of its use often follow. A block without a language counts where none has
    one."""
    text, why = without_thoughts(response)
    if why:
        return "", why
    blocks = _blocks(text)
    blocks = [block for block in blocks if block[0] in _LANGUAGES] or [block for block in blocks if not block[0]]
    if not blocks:
        return "", "no ```python block"
    any_name = "|".join(map(re.escape, names))
    defines = re.compile(rf"^[ \t]*(?:(?:async )?def|class) +(?:{any_name})\b|^(?:{any_name})\b *[:=]", re.MULTILINE)
    named = [source for _, source in blocks if any_name and defines.search(source)]
    return (named or [source for _, source in blocks])[-1], ""


def _blocks(text: str) -> list[tuple[str, str]]:
    """Returns (language, text) of each block between fences that is closed."""
    blocks: list[tuple[str, str]] = []
    fence, language, lines = "", "", list[str]()
    for line in text.splitlines(keepends=True):
        match = _FENCE.fullmatch(line.rstrip("\r\n"))
        if not fence and match:
            fence, language, lines = match[1], match[2].lower(), []
        elif fence and line.strip() == fence:
            blocks.append((language, "".join(lines)))
            fence = ""
        elif fence:
            lines.append(line)
    return blocks


def _names(tests: dict[str, Any]) -> set[str]:
    """What a program may define for its tests."""
    if tests["kind"] == "asserts":
        trees = (ast.walk(ast.parse(text)) for text in tests["tests"])
        return {n.func.id for tree in trees for n in tree if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}
    return {"check": {str(tests.get("entry_point"))}, "calls": {"Solution", str(tests.get("function"))}}.get(
        tests["kind"], set()
    )


def _run(sandbox: Sandbox, tests: dict[str, Any], source: str) -> Verdict:
    if tests["kind"] == "stdin":
        return _against_output(sandbox, tests["cases"], source)
    before = {"check": tests.get("prompt", ""), "calls": _AROUND_CALLS}.get(tests["kind"], "")
    texts = json.dumps([before, source]).encode()
    ran, answered = sandbox.pair(Program(_ASKING, json.dumps(tests).encode()), Program(_ANSWERING, texts))
    said = _said(ran)
    if said is None:  # whatever ended the tests, the program's answers did
        return Verdict("wrong", f"the tests did not come to an end: {(answered and answered.why) or ran.why}")
    outcome, reason = said
    if outcome == "invalid":
        return Verdict("invalid", f"the tests fail by themselves: {reason}")
    if reason == ENDED and answered:  # how says more than that
        reason = answered.why or reason
    return Verdict("correct" if outcome == "correct" else "wrong", reason)


def _said(ran: Ran) -> tuple[str, str] | None:
    """What the tests' process says; None: it came to no verdict."""
    try:
        outcome, reason = json.loads(ran.stdout)
    except (ValueError, TypeError):
        return None
    return (outcome, str(reason)) if ran.code == (2 if outcome == "invalid" else 0) else None


def _against_output(sandbox: Sandbox, cases: list[dict[str, str]], source: str) -> Verdict:
    for number, case in enumerate(cases, 1):
        ran = sandbox.run(Program(source, case["input"].encode("utf-8", "replace")))
        if ran.why:
            return Verdict("wrong", f"case {number}: {ran.why}")
        if not same_output(ran.stdout.decode(errors="replace"), case["output"]):
            return Verdict("wrong", f"case {number}: it writes {ran.stdout.decode(errors='replace').strip()[:100]!r}")
    return Verdict("correct")


def same_output(written: str, wanted: str) -> bool:
    """Whether two outputs are the same line by line: to the letter but for blanks around lines and around the whole, or
    as numbers of the same values (as LiveCodeBench compares)."""
    lines, others = ([line.strip() for line in text.strip().splitlines()] for text in (written, wanted))
    return len(lines) == len(others) and all(
        line == other or _numbers(line) == _numbers(other) is not None
        for line, other in zip(lines, others, strict=True)
    )


def _numbers(line: str) -> list[Decimal] | None:
    try:
        numbers = [Decimal(word) for word in line.split()]
    except InvalidOperation:
        return None
    return None if not numbers or any(number.is_nan() for number in numbers) else numbers


def _tests(answer: str) -> dict[str, Any] | str:
    """Returns what a gold answer says, or why it is none."""
    try:
        tests = json.loads(answer)
    except (ValueError, RecursionError) as error:
        return f"a gold answer of code is JSON: {error!s:.200}"
    kind = tests.get("kind") if isinstance(tests, dict) else None
    if kind not in ("asserts", "check", "calls", "stdin"):
        return f"a gold answer of code has the kind asserts, check, calls or stdin, not {kind!r:.80}"
    if missing := [name for name in _TEXTS.get(kind, ()) if not isinstance(tests.get(name, ""), str)]:
        return f"{missing[0]} of a gold answer of code is no text"
    if kind == "asserts":
        return _asserts(tests)
    if kind == "check":
        return tests if all(tests.get(name) for name in _TEXTS["check"][1:]) else "check needs test and entry_point"
    cases = tests.get("cases")
    texts = isinstance(cases, list) and all(
        isinstance(case, dict) and all(isinstance(case.get(name), str) for name in ("input", "output"))
        for case in cases
    )
    if not texts or not cases:
        return "cases of a gold answer of code is no list of {input, output}, both texts"
    return _calls(tests) if kind == "calls" else tests


def _asserts(tests: dict[str, Any]) -> dict[str, Any] | str:
    lines = tests.get("tests")
    if not isinstance(lines, list) or not lines or not all(isinstance(line, str) and line.strip() for line in lines):
        return "tests of a gold answer of code is no list of asserts"
    tests = {"setup": "", "setup_after": ""} | tests
    try:
        for text in (tests["setup"], tests["setup_after"], *lines):
            ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        return f"a test of a gold answer is no Python: {error!s:.200}"
    return tests


def _calls(tests: dict[str, Any]) -> dict[str, Any] | str:
    """With the cases as values: a line of the input is an argument."""
    if not str(tests.get("function") or "").isidentifier():
        return "function of a gold answer of code names none"
    try:
        cases = [
            {
                "values": [json.loads(line) for line in case["input"].splitlines() if line.strip()],
                "result": json.loads(case["output"]),
            }
            for case in tests["cases"]
        ]
    except (ValueError, RecursionError) as error:
        return f"a case of a gold answer is no JSON: {error!s:.200}"
    return tests | {"cases": cases}
