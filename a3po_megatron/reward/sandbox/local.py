"""The sandboxes of this machine: what stands around a program (bubblewrap, or nothing) and what it gives up itself.

    bubblewrap   its own view of the file system, of processes, of the network          user namespaces, or root
    landlock     the files that it may open, by path; no sockets, no signals            Linux 6.2
    none         limits alone: it can read and write what the trainer can               told by name only

With all of them a program is one process that inside.py has bound: resource limits, and with the first two a filter of
system calls (filter.py), no capabilities and no new privileges. As root it becomes a user that nobody else is. The
limits hold for it alone: the kernel counts threads by user, so that where others are the same user, theirs are added to
the kernel's limit, and its own are counted from outside (process.py).
"""

from __future__ import annotations

import base64
import contextlib
import functools
import itertools
import json
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .filter import assemble
from .interpreter import ALWAYS, interpreter
from .process import Process, remove_folder, watch
from .program import Chosen, Program, Ran, SandboxFailed

USERS = range(50_000, 65_000)  # whom a program becomes where the trainer is root
CROWD = 1000  # threads that others of its user may start while it runs
INSIDE = "/work"  # a program's folder, in bubblewrap
_NUMBERS = itertools.count(os.getpid() * 64)  # of programs: two at a time are hardly ever the same user
_SOURCE = Path(__file__).with_name("inside.py").read_text()
_NAMESPACES = ("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try")


class Local:
    """Programs in one of the sandboxes of this machine. Raises SandboxFailed where it cannot be set up."""

    def __init__(self, chosen: Chosen, kind: str) -> None:
        self.chosen, self.kind = chosen, kind
        self._root = os.geteuid() == 0
        try:
            self._interpreter = interpreter()
            self._filter = "" if kind == "none" else base64.b64encode(assemble()).decode()
        except KeyError as error:
            raise SandboxFailed(f"no filter of system calls for the architecture {error}") from error
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise SandboxFailed(f"the interpreter does not start alone: {error}") from error
        self._around: tuple[str, ...] = ()
        if kind == "bubblewrap":
            bubblewrap = shutil.which("bwrap")
            if bubblewrap is None:
                raise SandboxFailed("bubblewrap (bwrap) is not installed")
            self._around = (bubblewrap, *_bubble(chosen.import_from))

    def run(self, program: Program) -> Ran:
        """Returns how a program ended. Raises SandboxFailed where it could not be begun."""
        with self._started(program) as process:
            watch([process])
            return process.result()

    def pair(self, asking: Program, answering: Program) -> tuple[Ran, Ran | None]:
        """Returns how two programs ended, each in a sandbox of its own, with a socket between them, whose number is
        their argument. The end of the first ends the second, which it did without where it has a code (None)."""
        ours, theirs = socket.socketpair()
        with ours, theirs, contextlib.ExitStack() as stack:
            first = stack.enter_context(self._started(asking, ours.fileno()))
            second = stack.enter_context(self._started(answering, theirs.fileno()))
            ours.close()
            theirs.close()
            watch([first, second])
            second.stop("")
            asked = first.result()
            return asked, None if asked.code else second.result()

    @contextlib.contextmanager
    def _started(self, program: Program, channel: int | None = None) -> Iterator[Process]:
        folder = tempfile.mkdtemp(prefix="a3po-program-")
        user = USERS[next(_NUMBERS) % len(USERS)] if self._root else os.getuid()
        heard, ready = os.pipe()
        told = os.memfd_create("told")
        process = None
        try:
            if self._root and self.kind == "bubblewrap":
                os.chown(folder, user, user)
            os.write(told, json.dumps(self._told(program, folder, user, ready, channel)).encode())
            os.lseek(told, 0, os.SEEK_SET)
            fds = [told, ready, *([channel] if channel is not None else [])]
            inner = [self._interpreter.program, *("-P", "-s", "-S", "-B", "-X", "utf8", "-c", _SOURCE, str(told))]
            command = [*self._around, *_own_folder(folder), *inner] if self._around else inner
            process = Process(
                command, _environment(self._seen(folder)), fds, heard, program.stdin, self.chosen.limits, folder
            )
            os.close(ready)
            ready = -1
            yield process
        except OSError as error:
            raise SandboxFailed(f"the sandbox did not start: {error}") from error
        finally:
            os.close(told)
            if ready != -1:
                os.close(ready)
            if process is None:
                os.close(heard)
            else:
                process.close()
            remove_folder(folder)

    def _seen(self, folder: str) -> str:
        return INSIDE if self.kind == "bubblewrap" else folder

    def _told(self, program: Program, folder: str, user: int, ready: int, channel: int | None) -> dict[str, object]:
        limits, bubble = self.chosen.limits, self.kind == "bubblewrap"
        becomes = {"id": user, "files": not bubble} if self._root and self.kind != "none" else None
        own = becomes is not None or (bubble and _counts_by_namespace())
        threads = limits.threads if own else threads_of(os.getuid()) + limits.threads + CROWD
        return {
            "source": program.source,
            "folder": self._seen(folder),
            "parent": 0 if bubble else os.getpid(),
            "user": becomes,
            "limits": {
                "cpu_seconds": limits.cpu_seconds,
                "memory_bytes": limits.memory_bytes,
                "files_bytes": limits.files_bytes,
                "threads": threads,
            },
            "readable": [*_landlocked(), *self.chosen.import_from] if self.kind == "landlock" else None,
            "filter": self._filter,
            "import_from": list(self.chosen.import_from),
            "ready": ready,
            "channel": channel,
        }


@functools.cache
def _landlocked() -> tuple[str, ...]:
    return tuple(interpreter().entries())


def _own_folder(folder: str) -> list[str]:
    return ["--bind", folder, INSIDE, "--remount-ro", "/", "--"]


def _bubble(import_from: tuple[str, ...]) -> tuple[str, ...]:
    """The part of bubblewrap's command that all programs share. No /proc: a program needs none, and escapes use it."""
    needed = interpreter()
    command = [*_NAMESPACES, "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    if os.geteuid() == 0:
        command += ["--cap-drop", "ALL"]
        for capability in ("CAP_SETUID", "CAP_SETGID", "CAP_SETPCAP"):  # to become nobody; inside.py gives them up
            command += ["--cap-add", capability]
    else:
        command += ["--unshare-user"]
    folders = {needed.stdlib, *needed.libraries}
    paths = sorted(folder for folder in folders if not any(folder.startswith(other + "/") for other in folders))
    paths += [path for path in (needed.program, *ALWAYS, *import_from) if os.path.exists(path)]
    # Made here, since bubblewrap gives them the modes of this machine's: nobody could come through /root.
    for parent in sorted({str(parent) for path in paths for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "0755", "--dir", parent]
    for path in paths:
        command += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    for hidden in needed.hidden:
        command += ["--tmpfs", hidden, "--remount-ro", hidden]
    return *command, *_loader()


def _loader() -> list[str]:
    """The dynamic loader stands under a fixed name, which on most systems is a link to a link."""
    command = []
    for folder, name in (("/lib64", "ld-linux-x86-64.so.2"), ("/lib", "ld-linux-aarch64.so.1")):
        if os.path.islink(folder):
            command += ["--symlink", os.readlink(folder), folder]
        place = os.path.join(os.path.realpath(folder), name)
        if os.path.exists(place) and os.path.dirname(os.path.realpath(place)) != os.path.dirname(place):
            command += ["--ro-bind", os.path.realpath(place), place]
    return command


def _environment(folder: str) -> dict[str, str]:
    """A fresh one: what the trainer's holds is none of a program's business. With one seed for the order of sets, so
    that the same program does the same twice."""
    return {
        **{"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": folder, "TMPDIR": folder},
        **{"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"},
    }


def threads_of(user: int) -> int:
    """Returns how many threads a user has on this machine."""
    count = 0
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                tasks = os.stat(f"/proc/{name}/task")
                count += tasks.st_nlink - 2 if os.stat(f"/proc/{name}").st_uid == user else 0
    return count


@functools.cache
def _counts_by_namespace() -> bool:
    """Since Linux 5.14 threads are counted in each user namespace by itself."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(c for c in minor if c.isdecimal()) or 0)) >= (5, 14)
