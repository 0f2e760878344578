"""What a launcher of ours tells the processes that it starts: one record, and the only place with its variables' names.

It stands below launch/, which fills it in, because rooms below launch/ ask it: the store that ranks meet in, the
progress line, the engine's shared memory. Whoever starts a process gives it `environment()`; whoever is started asks
`Handoff.of()`. A variable of these that a launcher finds set is another launcher's, and goes no further
(launch/shell.py).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

WHEELS = "A3PO_WHEELS"  # the user's, for tools/setup_gpu.sh alone: named in advice, never handed on or taken out


def _of(variable: str, read: Callable[[str], Any]) -> dict[str, Any]:
    return {"variable": variable, "read": read}


@dataclass(frozen=True)
class Handoff:
    """None: not told."""

    # To ranks: when the command began, in seconds since the epoch.
    started: float | None = field(default=None, metadata=_of("A3PO_STARTED", float))
    # A pipe for the last words of a rank on the launcher's machine; a folder for those of a rank on any node.
    words_fd: int | None = field(default=None, metadata=_of("A3PO_WORDS_FD", int))
    words_dir: Path | None = field(default=None, metadata=_of("A3PO_WORDS_DIR", Path))
    # To rank 0: the port where the ranks meet, listening already; the launcher's terminal.
    store_fd: int | None = field(default=None, metadata=_of("A3PO_STORE_FD", int))
    console_fd: int | None = field(default=None, metadata=_of("A3PO_CONSOLE_FD", int))
    # To a job's batch process: what came to the shell that it was before (slurm/train.sbatch.j2); its place in a chain.
    signalled: str | None = field(default=None, metadata=_of("A3PO_SIGNALLED", str))
    attempt: int | None = field(default=None, metadata=_of("A3PO_ATTEMPT", int))
    # To every rank on the launcher's machine: memory in which its clock notes its phase, which outlives the rank.
    phase_fd: int | None = field(default=None, metadata=_of("A3PO_PHASE_FD", int))

    @classmethod
    def of(cls, environ: Mapping[str, str] = os.environ) -> Handoff:
        """What this process was told."""
        rows = [(each.name, each.metadata["variable"], each.metadata["read"]) for each in fields(cls)]
        return cls(**{name: read(environ[variable]) for name, variable, read in rows if variable in environ})

    def environment(self) -> dict[str, str]:
        """The variables that tell a child this."""
        return {VARIABLES[name]: str(value) for name, value in vars(self).items() if value is not None}


VARIABLES: Mapping[str, str] = {each.name: each.metadata["variable"] for each in fields(Handoff)}
