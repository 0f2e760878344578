"""One sandboxed process, from its start to its end: fed, read and stopped without trusting anything that it does."""

from __future__ import annotations

import contextlib
import os
import selectors
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence

from .program import Limits, Ran, SandboxFailed

START_SECONDS = 60.0  # until its first line runs; a machine under load
TICK_SECONDS = 0.05  # between two looks at its folder
FILES = 1000  # in its folder, however small
KEPT = 64 << 10  # bytes of stderr


class Process:
    """A program that was started; `watch` sees it to its end."""

    def __init__(
        self,
        command: Sequence[str],
        environment: dict[str, str],
        pass_fds: Sequence[int],
        ready: int,  # the end of the pipe on which it says that its program begins
        stdin: bytes,
        limits: Limits,
        folder: str,  # its own, on this machine
    ) -> None:
        self.limits, self.folder = limits, folder
        self.ready, self.begun = ready, False
        self.since = time.monotonic()  # when it was started, then when its program began
        self.stopped = ""
        self.stdout, self.stderr = bytearray(), bytearray()
        self._written = 0  # bytes on stderr
        self._stdin, self._given = memoryview(stdin), 0
        self.process = subprocess.Popen(
            list(command),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=pass_fds,
            env=environment,
            cwd="/",
            start_new_session=True,
            bufsize=0,
        )
        self.ended = False
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            os.set_blocking(stream.fileno(), False)

    def register(self, selector: selectors.BaseSelector) -> None:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        selector.register(self.ready, selectors.EVENT_READ, (self, "ready"))
        selector.register(self.process.stdin, selectors.EVENT_WRITE, (self, "stdin"))
        selector.register(self.process.stdout, selectors.EVENT_READ, (self, "stdout"))
        selector.register(self.process.stderr, selectors.EVENT_READ, (self, "stderr"))

    def attend(self, which: str) -> bool:
        """Moves what a stream has room for, or holds. Returns whether the stream goes on."""
        if which == "stdin":
            return self._feed()
        if which == "ready":
            self.begun = bool(os.read(self.ready, 1))
            self.since = time.monotonic()
            return False
        stream = self.process.stdout if which == "stdout" else self.process.stderr
        assert stream is not None
        read = os.read(stream.fileno(), 1 << 16)
        if which == "stdout":
            self.stdout += read
        else:
            self._written += len(read)
            self.stderr += read
            del self.stderr[KEPT // 2 : -KEPT // 2]  # where it began, and how it ended
        if max(len(self.stdout), self._written) > self.limits.output_bytes:
            self.stop(f"it wrote more than {self.limits.output_bytes:,} bytes of output")
        return bool(read)

    def _feed(self) -> bool:
        assert self.process.stdin is not None
        try:
            self._given += os.write(self.process.stdin.fileno(), self._stdin[self._given : self._given + (1 << 16)])
        except BrokenPipeError:  # it does not read any more, which is no fault
            self._given = len(self._stdin)
        if self._given < len(self._stdin):
            return True
        self.process.stdin.close()
        return False

    def look(self) -> None:
        """Stops it where it has met a limit that nobody else watches."""
        elapsed = time.monotonic() - self.since
        if not self.begun:
            if elapsed > START_SECONDS:
                self.stop(f"it did not begin within {START_SECONDS:g} s")
        elif elapsed > self.limits.wall_seconds:
            self.stop(f"it ran for more than {self.limits.wall_seconds:g} s")
        if self.threads_of_its_own() > self.limits.threads:
            self.stop(f"it has more than {self.limits.threads} threads")
        files, size = _used(self.folder)
        if size > self.limits.files_bytes or files > FILES:
            self.stop(f"its files take more than {self.limits.files_bytes:,} bytes, or are more than {FILES}")

    def threads_of_its_own(self) -> int:
        """Counts them where the process is the program itself; around others stands bubblewrap, which counts as one."""
        try:
            return os.stat(f"/proc/{self.process.pid}/task").st_nlink - 2
        except FileNotFoundError:  # it has ended
            return 0

    def stop(self, why: str) -> None:
        """Ends it, and whatever stands around it, with SIGKILL."""
        self.stopped = self.stopped or why
        if self.process.returncode is None:
            for kill in (os.killpg, os.kill):
                with contextlib.suppress(ProcessLookupError):
                    kill(self.process.pid, signal.SIGKILL)

    def close(self) -> None:
        self.stop("")
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
            assert stream is not None
            stream.close()
        os.close(self.ready)

    def result(self) -> Ran:
        """Says how it ended. Raises SandboxFailed where its program never began."""
        code, stderr = self.process.wait(), bytes(self.stderr)
        if not self.begun:
            words = stderr.decode(errors="replace").strip() or self.stopped or f"it ended with code {code}"
            raise SandboxFailed(f"the sandbox did not start: {words[-300:]}")
        number = -code if code < 0 else code - 128 if code > 128 else 0  # bubblewrap says 128 + signal
        stopped = self.stopped
        if not stopped and number == signal.SIGXCPU:
            stopped = f"it took more than {self.limits.cpu_seconds} s of CPU time"
        return Ran(None if number or stopped else code, number, bytes(self.stdout), stderr, stopped)


def watch(processes: Sequence[Process]) -> None:
    """Sees processes to their ends. The first one's end is the end of all others."""
    with selectors.DefaultSelector() as selector:
        for process in processes:
            process.register(selector)
        looked = 0.0
        while not processes[0].ended:
            open_ = {key.data[0] for key in selector.get_map().values()}
            for key, _ in selector.select(TICK_SECONDS if processes[0] in open_ else 0.002):
                process, which = key.data
                if not process.attend(which):
                    selector.unregister(key.fileobj)
            if time.monotonic() - looked > TICK_SECONDS:
                for process in processes:
                    process.look()
                looked = time.monotonic()
            waiting = [key for key in selector.get_map().values() if key.data[0] is processes[0]]
            if all(key.data[1] == "stdin" for key in waiting) or processes[0].stopped:
                processes[0].ended = processes[0].process.poll() is not None


def remove_folder(folder: str) -> None:
    """Removes what a program left; those in bubblewrap die a moment later than it does, and may still be writing."""
    for _ in range(200):
        shutil.rmtree(folder, ignore_errors=True)
        if not os.path.lexists(folder):
            return
        time.sleep(0.01)


def _used(folder: str) -> tuple[int, int]:
    """Returns how many files a folder has, and the bytes that they take. It is flat: nothing in it can be a folder."""
    files = size = 0
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as entries:
        for entry in entries:
            files += 1
            with contextlib.suppress(FileNotFoundError):
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            if files > FILES:
                break
    return files, size
