"""Grades many responses in killable processes: `GraderPool.grade_all`, verdicts in the order of the items.

    parent ── a list of items ──▶ worker 1 … W      one socket each; a worker has at most one list at a time
           ◀── taken; a verdict each ──             the item being graded is the first one without a reply

Because replies come one by one and in order, a failure belongs to exactly one item: the first without a reply gets the
verdict `invalid` with its reason, the items behind it in the list are graded again by someone else. A worker that was
killed from outside before it took a list is nobody's fault (an item is spared so once).

    item beyond the time limit     SIGKILL to the worker's process group       wrong: it takes more than 5.0 s
    item beyond the memory limit   RLIMIT_AS in the worker, which exits        wrong: it takes more than 2 GB
    worker dies                    its socket closes, its pidfd is readable    grader worker was killed (signal 9)
    worker does not start          three times in a row                        RunFailed
    parent dies                    PR_SET_PDEATHSIG in the worker

Workers are started with `python -m a3po_megatron.reward.worker`: not forked, since the parent runs torch, gloo and
vLLM with their threads; and not spawned by `multiprocessing`, which would import the parent's main module again.
"""

from __future__ import annotations

import contextlib
import json
import os
import pickle
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any

from ..batch import Answered, Verdict
from ..errors import RequestError, RunFailed
from ..telemetry.clock import CLOCK
from .sandbox.process import remove_folder
from .worker import OUT_OF_MEMORY, READY, TAKEN, steps_of

START_SECONDS = 300.0  # imports from a cold network file system on many ranks at once
START_ATTEMPTS = 3
EXIT_SECONDS = 1.0  # between the end of a worker's socket and its own
SOCKET_SECONDS = 30  # for one frame to be taken or given: only a stopped process comes near
MAX_ITEMS, MAX_CHARS = 64, 1_000_000  # of one list: few enough to spread, many enough to cost nothing per item
Items = Sequence[tuple[str, str] | Answered]
OUTCOMES = ("correct", "wrong", "invalid")
# One thread, no GPU. Thread pools of BLAS reserve address space, which RLIMIT_AS counts.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class _Worker:
    """One process, from its start to its death."""

    def __init__(self, grade: bytes, memory_bytes: int) -> None:
        self.folder = tempfile.mkdtemp(prefix="a3po-grader-")  # for what it starts: removed although it is killed
        ours, theirs = socket.socketpair()
        with theirs:
            for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
                ours.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SOCKET_SECONDS, 0))
            path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "a3po_megatron.reward.worker"),
                    *(str(theirs.fileno()), str(os.getpid()), str(memory_bytes)),
                ],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a grader prints is no part of our own output
                env=os.environ | ENVIRONMENT | {"PYTHONPATH": path, "TMPDIR": self.folder},
                start_new_session=True,
            )
        self.connection = Connection(ours.detach())
        self.pidfd = _pidfd(self.process.pid)
        self.ready = False
        self.taken = False  # its items
        self.items: deque[int] = deque()  # without a reply, in order; the first is being graded
        self.since = time.monotonic()  # when it was started, was given items, or replied last
        self.send(grade)

    @property
    def idle(self) -> bool:
        return self.ready and not self.items

    def watched(self) -> list[Any]:
        return [self.connection] if self.pidfd is None else [self.connection, self.pidfd]

    def send(self, frame: bytes) -> bool:
        """False if the worker is gone or does not take it; the caller notices its end like any other."""
        try:
            self.connection.send_bytes(frame)
            return True
        except OSError:
            self.kill()
            return False

    def replies(self) -> tuple[list[bytes], bool]:
        """The frames that lie ready, and whether the worker lives on."""
        ended = self.ended()  # before reading: of a worker that has ended, every frame is read
        frames = []
        try:
            while self.connection.poll():
                frames.append(self.connection.recv_bytes())
        except (EOFError, OSError):
            limit = time.monotonic() + EXIT_SECONDS  # so that its own exit code is seen, not that of our kill
            while not self.ended() and time.monotonic() < limit:
                time.sleep(0.005)
            return frames, False
        return frames, not ended

    def ended(self) -> bool:
        """Looks without reaping: until it is reaped, its number and its group's are its own and can be killed."""
        if self.process.returncode is not None:
            return True
        try:
            return os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError:  # reaped by someone else in this process
            return True

    def kill(self) -> None:
        """Ends the worker and whatever it started, and reaps it. May be called twice."""
        if self.process.returncode is None:
            for kill in (os.killpg, os.kill):  # it leads its own group, save in its first moments
                with contextlib.suppress(ProcessLookupError):
                    kill(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def close(self) -> None:
        self.kill()
        self.connection.close()
        if self.pidfd is not None:
            os.close(self.pidfd)
            self.pidfd = None
        remove_folder(self.folder)


def _pidfd(pid: int) -> int | None:
    """A descriptor that becomes readable when the process ends; None where the kernel has none (the socket tells)."""
    try:
        return os.pidfd_open(pid)
    except (OSError, AttributeError):
        return None


def _died(code: int) -> str:
    if code < 0:
        return f"grader worker was killed (signal {-code})"
    return f"grader worker exited with code {code}"


class GraderPool:
    """`workers` processes that apply `grade` to (response, answer) pairs.

    grade: importable by name (a module-level function, or a functools.partial of one); not of the main module
    timeout_seconds: wall time per item
    memory_bytes: address space per worker, libraries included (sympy with math-verify takes about 0.5 GB)
    Raises RequestError for a grade function that workers cannot import.

    Processes start with `start()`, or with the first `grade_all`; start-up then overlaps whatever the caller does next.
    They die with the *thread* that started them (so it is with PR_SET_PDEATHSIG); a worker found dead is replaced.
    `grade_all` may be called from several threads; calls take turns.
    """

    def __init__(
        self,
        grade: Callable[[str, str], Verdict],
        workers: int,
        timeout_seconds: float,
        memory_bytes: int,
    ) -> None:
        function = getattr(grade, "func", grade)
        if getattr(function, "__module__", None) == "__main__":
            raise RequestError(f"grader {function!r}: a grader must stand in an importable module, not in the script")
        try:
            self._grade = pickle.dumps(grade)
        except Exception as error:
            raise RequestError(f"grader {grade!r}: not importable by name ({error})") from error
        self._count = workers
        self._timeout = timeout_seconds
        self._memory_bytes = memory_bytes
        self._workers: list[_Worker] = []
        self._failed_starts = 0
        self._spared: set[int] = set()  # items of this call whose worker was killed before it took them
        self._closed = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts the processes and returns at once."""
        with self._lock:
            self._fill()

    def _fill(self) -> None:
        if self._closed:
            raise RuntimeError("the grader pool is closed")
        while len(self._workers) < self._count:
            self._workers.append(_Worker(self._grade, self._memory_bytes))

    def grade_all(self, items: Items) -> list[Verdict]:
        """Verdicts of the (response, answer) pairs, in their order. Raises RunFailed if no worker can be started."""
        verdicts: list[Verdict | None] = [None] * len(items)
        queue = deque(range(len(items)))
        with self._lock:
            self._spared.clear()
            try:
                self._run(items, queue, verdicts)
            except BaseException:  # also KeyboardInterrupt: replies to this call must not answer the next one
                self._abandon()
                raise
        return [verdict or Verdict("invalid", "not graded") for verdict in verdicts]

    def _run(self, items: Items, queue: deque[int], verdicts: list[Verdict | None]) -> None:
        while queue or any(worker.items for worker in self._workers):
            self._fill()
            for worker in self._workers:
                if worker.idle and queue:
                    self._hand_out(worker, items, queue)
            wait([thing for worker in self._workers for thing in worker.watched()], timeout=self._patience())
            for worker in list(self._workers):
                self._attend(worker, items, queue, verdicts)

    def _hand_out(self, worker: _Worker, items: Items, queue: deque[int]) -> None:
        """Gives an idle worker the next items: fewer as the queue runs out, so that all workers end together."""
        share = max(1, min(MAX_ITEMS, len(queue) // (2 * self._count)))
        chosen: list[int] = []
        characters = 0
        while queue and len(chosen) < share and (not chosen or characters < MAX_CHARS):
            chosen.append(queue.popleft())
            characters += len(items[chosen[-1]][0])
        if worker.send(json.dumps([items[index] for index in chosen]).encode()):
            worker.items.extend(chosen)
            worker.taken = False
            worker.since = time.monotonic()
        else:  # dead before it had them: nobody's fault
            queue.extendleft(reversed(chosen))

    def _patience(self) -> float:
        """Seconds until the next limit can be reached."""
        now = time.monotonic()
        ends = [w.since + (self._timeout if w.ready else START_SECONDS) for w in self._workers if not w.idle]
        return max(0.0, min(ends, default=now) - now)

    def _attend(self, worker: _Worker, items: Items, queue: deque[int], verdicts: list[Verdict | None]) -> None:
        """Takes a worker's replies, then looks after its limits and its life."""
        frames, alive = worker.replies()
        for frame in frames:
            CLOCK.beat()
            worker.since = time.monotonic()
            if frame == READY:
                worker.ready = True
                self._failed_starts = 0
            elif frame == TAKEN:
                worker.taken = True
            elif worker.items:
                number = worker.items.popleft()
                verdicts[number] = _verdict(frame, items[number])
        waited = time.monotonic() - worker.since
        overdue = bool(worker.items) and waited > self._timeout
        if alive and not overdue and (worker.ready or waited < START_SECONDS):
            return
        worker.close()
        self._workers.remove(worker)
        code = worker.process.returncode
        if not worker.ready:
            self._failed_starts += 1
            if self._failed_starts >= START_ATTEMPTS:
                raise RunFailed(
                    f"grader processes do not start ({_died(code)}; its messages stand above in this log). If they ran "
                    f"out of memory, raise grader_pool.memory_bytes, which is {self._memory_bytes}"
                )
        elif worker.items:
            first = worker.items[0]
            if worker.taken or code >= 0 or first in self._spared:
                verdicts[worker.items.popleft()] = self._given_up(None if alive else code)
            else:
                self._spared.add(first)
            queue.extendleft(reversed(worker.items))
            worker.items.clear()

    def _given_up(self, code: int | None) -> Verdict:
        """Of an item that its worker did not come back from: the response's own fault, unless somebody killed it."""
        if code is None:
            return Verdict("wrong", f"it takes more than {self._timeout:.1f} s to grade (grader_pool.timeout_seconds)")
        if code == OUT_OF_MEMORY:
            return Verdict(
                "wrong", f"it takes more than {self._memory_bytes} bytes to grade (grader_pool.memory_bytes)"
            )
        return Verdict("invalid", _died(code))

    def _abandon(self) -> None:
        for worker in self._workers:
            worker.close()
        self._workers.clear()

    def close(self) -> None:
        """Ends the processes. The pool cannot be used again."""
        with self._lock:
            self._closed = True
            self._abandon()

    def __enter__(self) -> GraderPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _verdict(frame: bytes, item: tuple[str, str] | Answered) -> Verdict:
    """A reply; malformed ones are a failure of grading, since a grader can write to its socket what it likes."""
    try:
        outcome, reason, given = json.loads(frame)
        steps = steps_of(given, len(item[0]) - (item.opened if isinstance(item, Answered) else 0))
    except (ValueError, TypeError):
        outcome, reason, steps = None, None, ()
    if outcome not in OUTCOMES:
        return Verdict("invalid", "grader worker sent an unreadable reply")
    return Verdict(outcome, str(reason), steps)
