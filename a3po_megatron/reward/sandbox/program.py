"""What is run in a sandbox, within which limits, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """What one program may take. They hold for the program alone, whatever else runs under its user."""

    cpu_seconds: int = 10
    wall_seconds: float = 20.0
    memory_bytes: int = 2 << 30  # address space, the interpreter included
    files_bytes: int = 64 << 20  # of all files in its working folder
    output_bytes: int = 8 << 20  # of stdout and stderr each
    threads: int = 64  # a program is one process: it can start no other


@dataclass(frozen=True)
class Chosen:
    """A sandbox as the settings have it (config/sandbox.py), in what a grader's process can be sent."""

    name: str = "auto"  # auto | bubblewrap | landlock | none | remote
    limits: Limits = field(default_factory=Limits)
    import_from: tuple[str, ...] = ()  # folders with packages that programs may import
    url: str = ""  # of a remote sandbox
    retries: int = 2


@dataclass(frozen=True)
class Program:
    """Python source, and what it reads from stdin."""

    source: str
    stdin: bytes = b""


@dataclass(frozen=True)
class Ran:
    """How a program ended. `stopped` says which limit it met; empty: it ended by itself, with `code` or `signal`."""

    code: int | None
    signal: int = 0
    stdout: bytes = b""
    stderr: bytes = b""  # its beginning and its end
    stopped: str = ""  # words for people: "it ran for more than 20 s"

    @property
    def why(self) -> str:
        """Says in a few words why it failed; empty: it did not."""
        if self.stopped:
            return self.stopped
        if self.signal:
            return f"it was ended by signal {self.signal}"
        if self.code:
            lines = self.stderr.decode(errors="replace").strip().splitlines()
            return lines[-1][:200] if lines else f"it ended with code {self.code}"
        return ""


class SandboxFailed(Exception):
    """The sandbox itself failed: no program can cause that, and no verdict follows from it."""
