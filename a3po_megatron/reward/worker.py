"""A grader process: `python -m a3po_megatron.reward.worker FD PARENT MEMORY_BYTES`, started by `pool.py` only.

It speaks over the inherited socket FD, in frames of `multiprocessing.connection`:

    parent → worker   the pickled grade function, once; then JSON lists of [response, answer, finished, grader,
                      extract, problem, opened]
    worker → parent   READY, once; then for each list TAKEN, and one JSON [outcome, reason, steps] per item, in order,
                      each as soon as it is known; steps are [begin, end, score] each

Replies are JSON and not pickles: a grader that was talked into something by a response must not reach the parent.
The grade function's module may have a `prepare()`, which is called before READY: imports must not count against the
time limit of the first response. The process holds no state between items, so that it can be killed at any moment; it
ignores the signals that Slurm and terminals send to whole jobs, because its parent decides when it ends.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import json
import math
import operator
import os
import pickle
import resource
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any

from ..batch import Step, Verdict

READY, TAKEN = b"ready", b"taken"
MAX_REASON_CHARS = 500
PR_SET_PDEATHSIG = 1  # linux/prctl.h
OUT_OF_MEMORY = 86  # exit code: a process that hit its limit is not used again


def die_with_parent(parent: int) -> None:
    """SIGKILL for this process when the thread that started it ends; also if that has happened already."""
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    if os.getppid() != parent:
        os._exit(1)


def judge(
    grade: Callable[..., Verdict],
    response: str,
    answer: str | Sequence[str],
    finished: bool = True,
    grader: str = "",
    extract: str = "",
    problem: str = "",
    opened: int = 0,
) -> Verdict:
    """`grade`, with its exceptions and malformed steps as invalid verdicts; MemoryError is left to the caller.

    Of several gold answers any makes a response correct; wrong it is only if it is so by all of them. The steps of a
    verdict count from behind the response's first `opened` characters, which its prompt had written.
    """
    if not isinstance(answer, str):
        verdicts = [judge(grade, response, each, finished, grader, extract, problem, opened) for each in answer]
        rank = {"correct": 0, "invalid": 1, "wrong": 2}
        return min(verdicts, key=lambda verdict: rank[verdict.outcome])
    named = {"grader": grader, "extract": extract, "problem": problem, "finished": "" if finished else False}
    options = {name: value for name, value in named.items() if value != ""}  # what is as usual a grader need not know
    try:
        verdict = grade(response, answer, **options)
        if not isinstance(verdict, Verdict):
            return Verdict("invalid", f"grader returned {type(verdict).__name__}, not a Verdict")
        return dataclasses.replace(verdict, steps=steps_of(verdict.steps, len(response), opened))
    except MemoryError:
        raise
    except MalformedSteps as error:
        return Verdict("invalid", f"grader returned malformed steps: {error}")
    except Exception as error:
        return Verdict("invalid", f"grader raised {type(error).__name__}: {error}")


class MalformedSteps(ValueError):
    """Steps that are none of the text that was graded."""


def steps_of(given: Any, length: int, opened: int = 0) -> tuple[Step, ...]:
    """Returns steps (begin, end, score) of a text of `length` characters as those of the same text without its first
    `opened` ones; a step that begins among these begins with what is left.

    Raises MalformedSteps, saying what is wrong, for a step that is none: empty, beyond the text, wholly among the first
    characters, over or before the one in front of it, or with a score that is not finite.
    """
    steps: list[Step] = []
    before = 0
    try:
        for number, (first, last, value) in enumerate(given):
            begin, end, score = operator.index(first), operator.index(last), float(value)
            what = f"step {number} ({begin}, {end}, {score})"
            if begin >= end:
                raise MalformedSteps(f"{what} ends where it begins, or before")
            if begin < 0 or end > length:
                raise MalformedSteps(f"{what} is beyond the text of {length} characters")
            if begin < before:
                raise MalformedSteps(f"{what} begins before the end of the one in front of it, {before}")
            if end <= opened:
                raise MalformedSteps(f"{what} is of the first {opened} characters, which the prompt had written")
            if not math.isfinite(score):
                raise MalformedSteps(f"{what} has a score that is not finite")
            steps.append(Step(max(begin - opened, 0), end - opened, score))
            before = end
    except MalformedSteps:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise MalformedSteps(f"{error}: expected (begin, end, score) each") from error
    return tuple(steps)


def main(descriptor: int, parent: int, memory_bytes: int) -> None:
    die_with_parent(parent)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)  # what a grader starts must not keep the socket open
    connection = Connection(descriptor)
    grade = pickle.loads(connection.recv_bytes())
    resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    function = grade.func if isinstance(grade, functools.partial) else grade
    prepare = getattr(sys.modules.get(getattr(function, "__module__", "")), "prepare", None)
    if callable(prepare):
        prepare()
    connection.send_bytes(READY)
    while True:
        try:
            items = json.loads(connection.recv_bytes())
        except EOFError:
            return
        except MemoryError:
            os._exit(OUT_OF_MEMORY)
        connection.send_bytes(TAKEN)
        for item in items:
            try:
                verdict = judge(grade, *item)
            except MemoryError:
                os._exit(OUT_OF_MEMORY)
            reply = [verdict.outcome, str(verdict.reason)[:MAX_REASON_CHARS], verdict.steps]
            connection.send_bytes(json.dumps(reply).encode())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
