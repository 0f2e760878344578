"""Which sandbox holds: the one that is named, or the stronger of those that hold on this machine."""

from __future__ import annotations

import functools
from typing import Protocol

from ...errors import RequestError
from .local import Local
from .program import Chosen, Program, Ran, SandboxFailed
from .remote import Remote

AUTO = ("bubblewrap", "landlock")
# Ends by itself, and has found out that neither a host's file nor a process can be had.
_PROBE = """
import os
for path in ("/etc/passwd", "/proc/self/environ", "/proc/1/environ"):
    try:
        open(path).read()
    except OSError:
        continue
    print("it reads", path)
try:
    os.fork()
    print("it forks")
except OSError:
    print("held")
"""


class Sandbox(Protocol):
    def run(self, program: Program) -> Ran:
        """Returns how a program ended. Raises SandboxFailed where it could not be begun."""

    def pair(self, asking: Program, answering: Program) -> tuple[Ran, Ran | None]:
        """Returns how two programs ended that have a socket between them: tests, and what they test. None:
        the tests had no use for it."""


@functools.lru_cache(maxsize=8)
def sandbox_of(chosen: Chosen) -> Sandbox:
    """Returns the sandbox of that name. Raises SandboxFailed where it does not hold here."""
    if chosen.name == "remote":
        return Remote(chosen)
    if chosen.name == "none":
        return Local(chosen, "none")
    reasons = {}
    for kind in AUTO if chosen.name == "auto" else (chosen.name,):
        why = why_not(kind)
        if not why:
            return Local(chosen, kind)
        reasons[kind] = why
    told = "; ".join(f"{kind}: {why}" for kind, why in reasons.items())
    raise SandboxFailed(f"no sandbox holds here ({told})")


@functools.cache
def why_not(kind: str) -> str:
    """Says why a sandbox of this machine does not hold; empty: it does. Tries it, in a second at most."""
    try:
        ran = Local(Chosen(), kind).run(Program(_PROBE))
    except SandboxFailed as error:
        return str(error)
    said = ran.stdout.decode(errors="replace").strip()
    return "" if said == "held" else said.replace("\n", ", ") or ran.why


def check_sandbox(chosen: Chosen) -> None:
    """Raises RequestError where code could not be graded here."""
    try:
        sandbox_of(chosen)
    except SandboxFailed as error:
        raise RequestError(
            f"sandbox.name = {chosen.name}: {error}. Install bubblewrap, or name a remote one (sandbox.name: remote, "
            "sandbox.url); sandbox.name: none runs what a model writes with all that you may do"
        ) from error
