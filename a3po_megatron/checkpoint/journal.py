"""What a run has finished since its last checkpoint, written down as it is finished, so that no finished work is lost.

    journal/step-00012.rank-0      frames, one after the other, only ever appended
    frame                          digest, space, header (JSON, one line), newline, payload (arrays, end to end)

    group       the G rollouts of a prompt: tokens, log-probs and routes, as soon as the last of them is sampled
    verdicts    its verdicts and rewards, once it is graded
    scores      old log-probs, entropy and rerouted pairs of the rollouts that a rank trains on: the batch before its
                update

A frame is believed only if its digests are right (the last one of a killed run may be torn, and is cut off), and if it
says that it is of this run's options and data, this prompt, and these weights, by a digest of them. Then it is what
would be computed again, since every rollout has its own seed; what is missing, or of something else, is computed again.

A replay whose kernels do not add in a fixed order comes to other weights in the last bits, and finds nothing of its
later steps again; `checkpoint.replay: all` believes those rollouts nevertheless (never their scores).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np
from blake3 import blake3

from ..batch import Batch, Group, Prompt, Rollout, Verdict

Decode = Callable[[Any], str]  # token ids → text


@dataclass(frozen=True)
class Frame:
    header: dict[str, Any]
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


def write_frame(file: _Sink, header: dict[str, Any], *arrays: np.ndarray) -> None:
    payload = b"".join(array.tobytes() for array in arrays)
    text = json.dumps(header | {"bytes": len(payload), "blake3": blake3(payload).hexdigest()}).encode()
    file.write(blake3(text).hexdigest().encode() + b" " + text + b"\n" + payload)
    file.flush()


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a file up to the first that is not whole. Reads no payload."""
    with path.open("rb") as file:
        size = path.stat().st_size
        while line := file.readline():
            digest, _, text = line.rstrip(b"\n").partition(b" ")
            if blake3(text).hexdigest().encode() != digest:
                return
            header = json.loads(text)
            frame = Frame(header, path, file.tell())
            if frame.offset + header["bytes"] > size:
                return
            file.seek(header["bytes"], 1)
            yield frame


def journal_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*.rank-*") if path.name[5:].partition(".")[0].isdecimal())


def cut_torn_frames(folder: Path) -> None:
    """Cuts every file of a journal behind its last whole frame: what is appended must be found again."""
    for path in journal_files(folder):
        whole = max((frame.offset + frame.header["bytes"] for frame in read_frames(path)), default=0)
        with path.open("r+b") as file:
            file.truncate(whole)


def write_group(file: _Sink, group: Group, of: str = "") -> None:
    samples = [[r.sample, r.seed, r.step, r.finish, r.weight_version, len(r.tokens)] for r in group.rollouts]
    header = {"kind": "group", "prompt": group.prompt.index, "of": of, "asked": asked(group.prompt), "samples": samples}
    tokens, logprobs = ([getattr(r, name) for r in group.rollouts] for name in ("tokens", "logprobs"))
    routes = [r.routes for r in group.rollouts if r.routes is not None]
    header["routes"] = [list(part.shape) for part in routes]  # of every rollout, or of none
    write_frame(file, header, *(t.astype("<i8") for t in tokens), *(p.astype("<f4") for p in logprobs), *routes)


def write_verdicts(file: _Sink, group: Group) -> None:
    verdicts = [[r.verdict.outcome, r.verdict.reason, r.reward] for r in group.rollouts]
    write_frame(file, {"kind": "verdicts", "prompt": group.prompt.index, "verdicts": verdicts})


def asked(prompt: Prompt) -> str:
    """A digest of what was asked, and of the answer that is right."""
    return blake3(json.dumps([prompt.id, prompt.tokens, prompt.answer]).encode()).hexdigest()[:32]


def read_group(frame: Frame, verdicts: Frame | None, prompt: Prompt, decode: Decode) -> Group | None:
    """The group of a frame, graded if there are verdicts; None if it is not whole, or not of this prompt."""
    data = frame.payload()
    if data is None or frame.header["asked"] != asked(prompt):
        return None
    total = sum(sample[-1] for sample in frame.header["samples"])
    tokens = np.frombuffer(data, "<i8", total)
    logprobs = np.frombuffer(data, "<f4", total, offset=8 * total)
    rollouts, begin = [], 0
    for sample, seed, step, finish, version, length in frame.header["samples"]:
        mine = slice(begin, begin := begin + length)
        text = decode(tokens[mine])
        rollouts.append(
            Rollout(prompt, sample, seed, step, tokens[mine].copy(), logprobs[mine].copy(), finish, text, version)
        )
    offset = 12 * total
    for rollout, shape in zip(rollouts, frame.header.get("routes", []), strict=False):
        rollout.routes = np.frombuffer(data, np.uint8, math.prod(shape), offset).reshape(shape).copy()
        offset += rollout.routes.size
    for rollout, given in zip(rollouts, verdicts.header["verdicts"] if verdicts else [], strict=False):
        rollout.verdict, rollout.reward = Verdict(given[0], given[1]), given[2]
    return Group(prompt, rollouts)


class Journal:
    """One rank's view: it appends to its own files and finds what any rank, of any layout, wrote before."""

    def __init__(self, folder: Path, rank: int, run: str, any_weights: bool = False) -> None:
        """`run`: a digest of what makes the run the one that it is (checkpoint/manifest.py: identity)."""
        self.weights = ""  # a digest of what the engine holds, from the receipt of the last publish
        self._folder, self._rank, self._run, self._any_weights = folder, rank, run, any_weights
        self._file: IO[bytes] | None = None
        self._frames: dict[tuple[int, str, Any], Frame] = {}
        for path in journal_files(folder):
            for frame in read_frames(path):
                kind = frame.header["kind"]
                for name in frame.header["names"] if kind == "scores" else [frame.header["prompt"]]:
                    self._frames[_step_of(path), kind, name] = frame

    @property
    def _of(self) -> str:
        return f"{self._run} {self.weights}"

    def group(self, step: int, prompt: Prompt, decode: Decode) -> tuple[Group, bool] | None:
        """What a step of before sampled for a prompt, and whether it is graded.

        A verdict that is no verdict (a grader was killed, or had too little time) is asked for again.
        """
        frame = self._frames.get((step, "group", prompt.index))
        if frame is None or not (frame.header["of"] == self._of or (self._any_weights and self._is_of_run(frame))):
            return None
        verdicts = self._frames.get((step, "verdicts", prompt.index))
        if verdicts is not None and any(outcome == "invalid" for outcome, *_ in verdicts.header["verdicts"]):
            verdicts = None
        group = read_group(frame, verdicts, prompt, decode)
        return (group, verdicts is not None) if group else None

    def _is_of_run(self, frame: Frame) -> bool:
        return str(frame.header["of"]).partition(" ")[0] == self._run

    def add_group(self, step: int, group: Group) -> None:
        write_group(self._open(step), group, self._of)

    def add_verdicts(self, step: int, group: Group) -> None:
        write_verdicts(self._open(step), group)

    def add_scores(self, step: int, batch: Batch) -> None:
        assert batch.old_logprobs is not None and batch.entropy is not None, "score the batch first"
        names, lengths = [r.name for r in batch.rollouts], batch.lengths.tolist()
        rerouted = None if batch.rerouted is None else batch.rerouted.tolist()
        header = {"kind": "scores", "of": self._of, "names": names, "lengths": lengths, "rerouted": rerouted}
        write_frame(self._open(step), header, batch.old_logprobs.numpy(), batch.entropy.numpy())

    def scores(self, step: int, rollouts: Sequence[Rollout]) -> np.ndarray | None:
        """Old log-probs and entropies [2, T] of the rollouts' tokens, end to end; None if any is missing."""
        found: dict[str, np.ndarray] = {}
        for rollout in rollouts:
            frame = self._frames.get((step, "scores", rollout.name))
            if frame is None or frame.header["of"] != self._of:
                return None
            if rollout.name not in found:
                found |= _scores_of(frame)
            if found.get(rollout.name, np.empty((2, 0))).shape[1] != len(rollout.tokens):
                return None
        return np.concatenate([np.empty((2, 0), np.float32), *(found[r.name] for r in rollouts)], axis=1)

    def rerouted(self, step: int, rollouts: Sequence[Rollout]) -> list[int] | None:
        """Batch.rerouted of rollouts whose `scores` were found; None if no routes were replayed."""
        headers = [self._frames[step, "scores", rollout.name].header for rollout in rollouts]
        if any(header.get("rerouted") is None for header in headers):
            return None
        return [h["rerouted"][h["names"].index(r.name)] for h, r in zip(headers, rollouts, strict=True)]

    def forget(self, before: int) -> None:
        """Deletes what belongs to earlier steps, of all ranks: a checkpoint has what came of it."""
        for path in journal_files(self._folder):
            if _step_of(path) < before:
                path.unlink(missing_ok=True)

    def _open(self, step: int) -> IO[bytes]:
        path = self._folder / f"step-{step:05d}.rank-{self._rank}"
        if self._file is None or self._file.name != str(path):
            if self._file is not None:
                self._file.close()
            self._folder.mkdir(exist_ok=True)
            self._file = path.open("ab")
        return self._file


def _scores_of(frame: Frame) -> dict[str, np.ndarray]:
    data = frame.payload()
    if data is None:
        return {}
    lengths = frame.header["lengths"]
    values = np.frombuffer(data, "<f4").reshape(2, sum(lengths))
    parts = np.split(values, np.cumsum(lengths)[:-1], axis=1)
    return dict(zip(frame.header["names"], parts, strict=True))


def _step_of(path: Path) -> int:
    return int(path.name.partition(".")[0].removeprefix("step-"))
