"""What a run has finished since its last checkpoint, written down as it is finished, so that no finished work is lost.

    a file of a step and a rank    frames, one after the other, only ever appended
    frame                          digest, space, header (JSON, one line), newline, payload (arrays, end to end)

    group       the G rollouts of a prompt: segments, tokens, log-probs and routes, as soon as the last of them is
                sampled
    verdicts    verdicts, rewards and, where graders gave any, steps of the group in one frame, which it names by that
                frame's digest
    scores      what the learner said before the update (Batch.scores), and rerouted pairs, of the rollouts that a rank
                trains on, each named by its name and a digest of its tokens, of which are trained on, and of its routes

A frame is believed only if its digests are right (the last one of a killed run may be torn, and is cut off), and if it
says that it is of this run's options and data, this prompt, and these weights, by a digest of them; a group, if they
sampled every segment of it. Then it is what would be computed again, since every rollout has its own seed; what is
missing, or of something else, is computed again.
Frames are appended by the writer beside the run (files/writer.py), in their order, so that a step never waits for the
disk: what a killed rank had not written yet is as if it had not been finished, and is computed again.
Several starts of a run may have written frames of one step, in whichever order of files: all are looked through, each
by one rank (run/found.py). Every frame says which format it is in: one of another version is refused.

A replay whose kernels do not add in a fixed order comes to other weights in the last bits, and finds nothing of its
later steps again; `checkpoint.replay: all` believes those rollouts nevertheless (never their scores).
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from blake3 import blake3

from ..batch import Batch, Group, Prompt, Rollout, Segment, Step, Verdict
from ..errors import RequestError, RunFailed
from ..files.run_folder import journal_file, step_files, step_of
from ..files.writer import Writer

FORMAT = 2  # 1 had one weight version a rollout, and said nothing of formats
Decode = Callable[[Any], str]  # token ids → text


@dataclass(frozen=True)
class Frame:
    header: dict[str, Any]
    digest: str  # of its header, which holds that of its payload
    path: Path
    offset: int  # of its payload

    def payload(self) -> bytes | None:
        """None if it is not what was written."""
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(self.header["bytes"])
        return data if blake3(data).hexdigest() == self.header["blake3"] else None


class _Sink(Protocol):
    def write(self, data: bytes, /) -> Any: ...

    def flush(self) -> None: ...


def write_frame(file: _Sink, header: dict[str, Any], *arrays: np.ndarray) -> str:
    """Returns the frame's digest."""
    payload = b"".join(array.tobytes() for array in arrays)
    known = {"format": FORMAT, "bytes": len(payload), "blake3": blake3(payload).hexdigest()}
    text = json.dumps(header | known).encode()
    digest = blake3(text).hexdigest()
    file.write(digest.encode() + b" " + text + b"\n" + payload)
    file.flush()
    return digest


def read_frames(path: Path, end: float = math.inf) -> Iterator[Frame]:
    """Yields the frames of a file, or of its first bytes up to `end`, up to the first that is not whole. Reads no
    payload.

    Raises RequestError for a frame of another version's format.
    """
    with path.open("rb") as file:
        size = min(os.fstat(file.fileno()).st_size, end)
        while file.tell() < size and (line := file.readline()):
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if blake3(text).hexdigest().encode() != digest:
                return
            header = json.loads(text)
            if (form := header.get("format", 1)) != FORMAT:
                raise RequestError(
                    f"{path}: it was written by {'an earlier' if form < FORMAT else 'a later'} version (journal format "
                    f"{form}), and this version reads format {FORMAT}: go on with the version that wrote it "
                    "(provenance.json), or choose another --run-dir"
                )
            frame = Frame(header, digest.decode(), path, file.tell())
            if frame.offset + header["bytes"] > size:
                return
            file.seek(header["bytes"], 1)
            yield frame


def check_format(folder: Path) -> None:
    """Raises RequestError for a journal of another version's format."""
    for path in step_files(folder):
        # A start adds to no journal of another version: of all files the first whole frame tells.
        if next(read_frames(path), None) is not None:
            return


def write_group(file: _Sink, group: Group, of: str = "") -> str:
    """Returns the frame's digest, which its verdicts go by."""
    header, arrays = group_frame(group, of)
    return write_frame(file, header, *arrays)


def group_frame(group: Group, of: str) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Header and arrays of a group's frame: of rollouts what nobody alters, so nothing of their verdicts."""
    samples = [[r.sample, r.seed, r.step, r.finish, r.segments] for r in group.rollouts]
    header = {"kind": "group", "prompt": group.prompt.index, "of": of, "asked": asked(group.prompt), "samples": samples}
    routes = [r.routes for r in group.rollouts if r.routes is not None]
    header["routes"] = [list(part.shape) for part in routes]  # of every rollout, or of none
    kind = header["routes_dtype"] = routes[0].dtype.newbyteorder("<").str if routes else "|u1"
    tokens = [r.tokens.astype("<i8", copy=False) for r in group.rollouts]
    logprobs = [r.logprobs.astype("<f4", copy=False) for r in group.rollouts]
    return header, [*tokens, *logprobs, *(part.astype(kind, copy=False) for part in routes)]


def write_verdicts(file: _Sink, group: Group, frame: str) -> None:
    """`frame`: the digest of the group's own."""
    _write_verdicts(file, _verdicts(group), frame)


def _write_verdicts(file: _Sink, verdicts: list[list[Any]], frame: str) -> None:
    write_frame(file, {"kind": "verdicts", "of": frame, "verdicts": verdicts})


def _verdicts(group: Group) -> list[list[Any]]:
    return [[r.verdict.outcome, r.verdict.reason, r.reward, *_steps(r.verdict)] for r in group.rollouts]


def _steps(verdict: Verdict) -> list[tuple[Step, ...]]:
    """What stands behind a reward: nothing where there are no steps."""
    return [verdict.steps] if verdict.steps else []


def asked(prompt: Prompt) -> str:
    """A digest of what was asked, and of the answer that is right."""
    return blake3(json.dumps([prompt.id, prompt.tokens, prompt.answer]).encode()).hexdigest()[:32]


def read_group(frame: Frame, verdicts: Frame | None, prompt: Prompt, decode: Decode) -> Group | None:
    """The group of a frame, graded if there are verdicts (of this frame: RunFailed if not); None if it is not whole, or
    not of this prompt."""
    if verdicts is not None and verdicts.header["of"] != frame.digest:
        raise RunFailed(f"{verdicts.path}: these are not the verdicts of the group in {frame.path}")
    data = frame.payload()
    if data is None or frame.header["asked"] != asked(prompt):
        return None
    total = sum(segment[0] for *_, segments in frame.header["samples"] for segment in segments)
    tokens = np.frombuffer(data, "<i8", total)
    logprobs = np.frombuffer(data, "<f4", total, offset=8 * total)
    rollouts, begin = [], 0
    for sample, seed, step, finish, runs in frame.header["samples"]:
        segments = tuple(Segment(*run) for run in runs)
        mine = slice(begin, begin := begin + sum(segment.length for segment in segments))
        text, own = decode(tokens[mine]), (tokens[mine].copy(), logprobs[mine].copy())
        rollouts.append(Rollout(prompt, sample, seed, step, *own, finish, text, segments))
    offset = 12 * total
    for rollout, shape in zip(rollouts, frame.header.get("routes", []), strict=False):
        kind = frame.header.get("routes_dtype", "|u1")
        rollout.routes = np.frombuffer(data, kind, math.prod(shape), offset).reshape(shape).copy()
        offset += rollout.routes.nbytes
    if verdicts is not None:
        for rollout, (outcome, reason, reward, *rest) in zip(rollouts, verdicts.header["verdicts"], strict=True):
            steps = tuple(Step(*step) for step in (rest[0] if rest else ()))
            rollout.verdict, rollout.reward = Verdict(outcome, reason, steps), reward
    return Group(prompt, rollouts)


class Written(Protocol):
    """What was written before the start (run/found.py)."""

    def frames(self, step: int, kind: str, name: Any) -> Iterable[Frame]:
        """Yields the frames of a step and a kind that are looked for by a name (`names_of`)."""


class Journal:
    """One rank's view: it appends to its own files and finds what any rank, of any layout, wrote before."""

    def __init__(
        self,
        folder: Path,
        rank: int,
        run: str,  # a digest of what makes the run the one that it is (run/manifest.py: identity)
        before: Written,
        writer: Writer,
        any_weights: bool = False,
    ) -> None:
        self._before, self._writer = before, writer
        self.weights, self.version = "", 0  # of what the engine holds, from the receipt of the last publish
        self._folder, self._rank, self._run, self._any_weights = folder, rank, run, any_weights
        self._file: IO[bytes] | None = None
        self._written: dict[int, _Later] = {}  # prompt → its last group's frame

    def published(self, version: int, weights: str) -> None:
        """Takes note of what the engine holds from now on: its version and a digest."""
        self.version, self.weights = version, weights

    @property
    def _of(self) -> str:
        return f"{self._run} {self.weights}"

    def _sampled_now(self, frame: Frame) -> bool:
        """Whether the weights that the engine holds sampled all of a group: `of` names those that sampled its end."""
        versions = {version for *_, segments in frame.header["samples"] for _, version, _ in segments}
        return frame.header["of"] == self._of and versions == {self.version}

    def group(self, step: int, prompt: Prompt, decode: Decode) -> tuple[Group, bool] | None:
        """What a step of before sampled for a prompt, and whether it is graded.

        A verdict that is no verdict (a grader was killed, or had too little time) is asked for again.
        """
        frames = list(self._before.frames(step, "group", prompt.index))
        of_run = [frame for frame in frames if self._any_weights and frame.header["of"].partition(" ")[0] == self._run]
        for frame in (*filter(self._sampled_now, frames), *of_run):
            frames_of_verdicts = self._before.frames(step, "verdicts", frame.digest)
            sound = (v for v in frames_of_verdicts if all(outcome != "invalid" for outcome, *_ in v.header["verdicts"]))
            verdicts = next(sound, None)
            if group := read_group(frame, verdicts, prompt, decode):
                self._written[prompt.index] = _Later(frame.digest)
                return group, verdicts is not None
        return None

    def add_group(self, step: int, group: Group) -> None:
        header, arrays = group_frame(group, self._of)
        frame = self._written[group.prompt.index] = _Later()

        def write() -> None:
            with self._appending(step) as file:
                frame.digest = write_frame(file, header, *arrays)

        self._writer.put(self._path(step), write)

    def add_verdicts(self, step: int, groups: Sequence[Group]) -> None:
        """Of groups that were added, or found, in this step; once they are written they are on the disk, with all that
        was added before them, where a machine's end does not reach them."""
        if not groups:  # a rank that leads none has no file
            return
        frames = [(self._written.pop(group.prompt.index), _verdicts(group)) for group in groups]

        def write() -> None:
            with self._appending(step) as file:
                for frame, verdicts in frames:
                    _write_verdicts(file, verdicts, frame.digest)
                os.fdatasync(file.fileno())

        self._writer.put(self._path(step), write)

    def add_scores(self, step: int, batch: Batch) -> None:
        names, lengths = [_scored(rollout) for rollout in batch.rollouts], batch.lengths.tolist()
        rerouted = None if batch.rerouted is None else batch.rerouted.tolist()
        header = {"kind": "scores", "of": self._of, "names": names, "lengths": lengths, "rerouted": rerouted}
        arrays = [values.numpy().copy() for values in batch.scores().values()]  # the step goes on with the batch

        def write() -> None:
            with self._appending(step) as file:
                write_frame(file, header, *arrays)
                os.fdatasync(file.fileno())

        self._writer.put(self._path(step), write)

    def scores(
        self, step: int, rollouts: Sequence[Rollout], kinds: int = 2
    ) -> tuple[np.ndarray, list[int] | None] | None:
        """What Batch.scores has of the rollouts' tokens [kinds, T], end to end, and Batch.rerouted (None: no routes
        were replayed); None if any is missing."""
        read: dict[str, tuple[dict[str, np.ndarray], dict[str, int]]] = {}  # frame → what is in it
        values, rerouted = [np.empty((kinds, 0), np.float32)], []
        for name in map(_scored, rollouts):
            for frame in self._before.frames(step, "scores", name):
                if frame.header["of"] != self._of:
                    continue
                if frame.digest not in read:
                    read[frame.digest] = _scores_of(frame, kinds)
                if name in read[frame.digest][0]:
                    values.append(read[frame.digest][0][name])
                    rerouted.append(read[frame.digest][1].get(name))
                    break
            else:
                return None
        known = [count for count in rerouted if count is not None]
        return np.concatenate(values, axis=1), known if len(known) == len(rollouts) else None

    def forget(self, before: int) -> None:
        """Deletes what belongs to earlier steps, of all ranks: a checkpoint has what came of it."""
        for path in step_files(self._folder):
            if step_of(path) < before:
                path.unlink(missing_ok=True)

    def _path(self, step: int) -> Path:
        return journal_file(self._folder, step, self._rank)

    @contextlib.contextmanager
    def _appending(self, step: int) -> Iterator[IO[bytes]]:
        """Of the writer's thread alone."""
        path = self._path(step)
        if self._file is None or self._file.name != str(path):
            if self._file is not None:
                self._file.close()
            self._file = _opened(path)
        yield self._file


@dataclass
class _Later:
    """The digest of a frame, which the writer knows once it has written it."""

    digest: str = ""


def _opened(path: Path) -> IO[bytes]:
    try:
        return path.open("ab")
    except FileNotFoundError:  # the first frame of the run
        path.parent.mkdir(exist_ok=True)
        return path.open("ab")


def names_of(header: dict[str, Any]) -> list[Any]:
    """What a frame is looked for by."""
    if header["kind"] == "scores":
        return list(header["names"])
    return [header["of"] if header["kind"] == "verdicts" else header["prompt"]]


def _scored(rollout: Rollout) -> str:
    """What scores go by: another response of the same name and length has others, and where it is not trained on it
    has none."""
    digest = blake3(rollout.tokens.astype("<i8").tobytes())
    digest.update(rollout.trained().tobytes())
    if rollout.routes is not None:
        digest.update(rollout.routes.tobytes())
    return f"{rollout.name} {digest.hexdigest()[:32]}"


def _scores_of(frame: Frame, kinds: int) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """By rollout, the values [kinds, n] and, where routes were replayed, the rerouted pairs; nothing if torn."""
    data = frame.payload()
    if data is None:
        return {}, {}
    names, lengths = frame.header["names"], frame.header["lengths"]
    values = np.frombuffer(data, "<f4").reshape(kinds, sum(lengths))
    parts = np.split(values, np.cumsum(lengths)[:-1], axis=1)
    return dict(zip(names, parts, strict=True)), dict(zip(names, frame.header["rerouted"] or [], strict=False))
