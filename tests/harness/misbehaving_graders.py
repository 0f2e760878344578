"""Graders that misbehave on command, for the tests of the grader pool. Importable by name, as the pool demands."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from a3po_megatron.batch import Verdict


def obey(response: str, answer: str) -> Verdict:
    """Does what the response says; anything else is correct if it equals the answer."""
    command, _, argument = response.partition(" ")
    if command == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif command == "exit":
        sys.exit(int(argument))
    elif command == "hang":
        while True:
            time.sleep(60)
    elif command == "busy":  # inside one C call that holds the GIL: no Python-level limit could end it
        return Verdict("wrong", str(sum((7 ** (10**8),)) % 10))
    elif command == "eat":
        held = []
        while True:
            held.append(bytes(64 << 20))  # zeros that no one touches: the limit is on address space
    elif command == "raise":
        raise KeyError("no such thing")
    elif command == "sleep":
        time.sleep(float(argument))
        return Verdict("correct", str(os.getpid()))
    elif command == "signal":  # as Slurm does to a whole job
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(os.getpid(), number)
    elif command == "spawn":  # leaves a child behind and hangs
        child = subprocess.Popen(["sleep", "600"])
        with open(argument, "w") as file:
            file.write(str(child.pid))
        time.sleep(600)
    elif command == "garbage":
        return "correct"  # type: ignore[return-value]
    elif command == "environment":
        return Verdict("correct", os.environ.get(argument, "unset"))
    elif command == "modules":
        return Verdict("correct", " ".join(name for name in ("torch", "vllm", "megatron") if name in sys.modules))
    return Verdict("correct" if response == answer else "wrong")


def other(response: str, answer: str, *, outcome: str) -> Verdict:
    return Verdict(outcome)  # type: ignore[arg-type]
