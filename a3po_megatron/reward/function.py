"""Grades with a function of the user's: `reward.function: FILE.py:NAME`, or MODULE:NAME of what is installed.

It gets a response and its gold answer, as texts, and returns True, False or a Verdict. It runs in a grader's process,
so that what it costs is limited; what it raises is an invalid verdict, and an answer of another type, too. A response
that was cut off is wrong without asking it, unless it takes `finished`. A Verdict may score steps of the response, in
characters of what the function got (batch.Step).
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..batch import Verdict
from ..errors import RequestError


@functools.cache
def function_of(named: str) -> Callable[..., Any]:
    """Returns the function of that name. Raises RequestError for one that is not there."""
    place, _, name = named.rpartition(":")
    try:
        if place.endswith(".py"):
            spec = importlib.util.spec_from_file_location(f"grader_{Path(place).stem}", place)
            assert spec is not None and spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module  # where dataclasses look for the module's names
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
        function = getattr(module, name)
    except Exception as error:  # whatever the module does when it is imported
        raise RequestError(f"reward.function: {named}: {type(error).__name__}: {error}") from error
    if not callable(function):
        raise RequestError(f"reward.function: {named} is no function: it is {type(function).__name__}")
    return function  # type: ignore[no-any-return]


def grade(response: str, answer: str, *, function: str, finished: bool = True) -> Verdict:
    """The verdict of the function of that name on a response."""
    judge = function_of(function)
    takes_finished = "finished" in inspect.signature(judge).parameters
    if not finished and not takes_finished:
        return Verdict("wrong", "the response was cut off")
    verdict = judge(response, answer, finished=finished) if takes_finished else judge(response, answer)
    if isinstance(verdict, bool):
        return Verdict("correct" if verdict else "wrong", "" if verdict else f"{function.rpartition(':')[2]} says so")
    if not isinstance(verdict, Verdict):
        return Verdict("invalid", f"{function} returned {type(verdict).__name__}: expected True, False or a Verdict")
    return verdict
