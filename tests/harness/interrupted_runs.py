"""Runs that are interrupted at one exact point, and the comparison of two runs bit for bit.

A run is driven from outside only: the command line, signals, and what it leaves in its folder. What interrupts it is
tests/harness/interrupting/sitecustomize.py, inside the rank.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import psutil
import pytest
import torch

from a3po_megatron import cli
from a3po_megatron.files.run_folder import rollout_files
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.run.stop import SIGNALS
from tests.harness.ranks import ROOT

STEPS, EVERY = 6, 2  # saves after steps 1, 3 and 5: between them, a kill loses what only a replay brings back
SMALL = (
    f"trainer.steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4",
    "telemetry.texts_per_step=1",
    "telemetry.tensorboard=false",
    "publish.witness_at_start=false",
)
LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.tensor=1", "parallel.pipeline=2"),
    "dp2": ("parallel.tensor=1", "parallel.data=2"),
}
RUN_SECONDS = 240.0  # more than ten times what a run takes on two cores with nothing else to do
INTERRUPTED = 85  # the exit code of a run that was asked to stop, and saved
VOLATILE = ("perf/", "startup/", "memory/", "refit/seconds")  # metrics that measure the machine
TIME_STAMPS = ("time",)  # of a rollout


@dataclass(frozen=True)
class Interrupt:
    """Where a signal hits a run, and whom."""

    phase: str  # "save" is the phase `checkpoint`
    step: int
    signal: str
    to: str  # "rank", "launcher", "all" (every rank and the launcher, at once) or "family" (and what ranks started)
    rank: int = 0  # on which the phase is awaited; the one that is hit, where `to` is "rank"
    nth: int = 1  # occurrence of the phase in this step: `rollout` comes once a round of sampling
    delay: float = 0.0  # seconds after the phase's begin
    times: int = 1  # the signal comes so often
    file: tuple[str, str, str] | None = None  # instead of the phase: "before" or "after", a call of `os`, a path's end

    @property
    def kills(self) -> bool:
        return self.signal == "SIGKILL"

    def as_env(self, marker: Path) -> str:
        phase = "checkpoint" if self.phase == "save" else self.phase
        return json.dumps(asdict(self) | {"phase": phase, "marker": str(marker)})


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str
    seconds: float

    @property
    def all(self) -> str:
        return f"exit code {self.code}\n{self.out}\n{self.err}"


def command(folder: Path, *overrides: str) -> list[str]:
    options = [word for override in (*SMALL, *overrides) for word in ("--set", override)]
    words = [sys.executable, "-m", "a3po_megatron", "train", "configs/arithmetic.yaml", "--run-dir", str(folder)]
    return [*words, *options]


def environment(point: str | None = None) -> dict[str, str]:
    """This checkout's code, and before it the module that draws from every random stream in a rank's updates and, with
    a point, interrupts a rank there."""
    path = [str(ROOT / "tests/harness/interrupting"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    around = {name: value for name, value in os.environ.items() if name != "A3PO_TEST_INTERRUPT"}
    around.setdefault("A3PO_TEST_DRAWS", "1")
    if point is not None:
        around["A3PO_TEST_INTERRUPT"] = point
    return around | {"PYTHONPATH": os.pathsep.join(path)}


class Launched:
    """A launcher that is running. Its output goes to files: a rank that outlived it could hold a pipe open."""

    def __init__(self, folder: Path, *overrides: str, interrupt: Interrupt | None = None) -> None:
        self.folder, self.began = folder, time.monotonic()
        self.marker = _beside(folder, "fired")
        self.marker.unlink(missing_ok=True)
        around = environment() if interrupt is None else environment(interrupt.as_env(self.marker))
        self._files = [_beside(folder, name) for name in ("out", "err")]
        out, err = (file.open("w") for file in self._files)
        self.process = subprocess.Popen(
            command(folder, *overrides), cwd=ROOT, env=around, stdin=subprocess.DEVNULL, stdout=out, stderr=err
        )
        out.close()
        err.close()

    def finish(self, seconds: float = RUN_SECONDS) -> Ended:
        """Waits for its end; kills it (and so its ranks) and fails if that does not come."""
        try:
            code = self.process.wait(seconds)
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise
        out, err = (file.read_text() for file in self._files)
        return Ended(code, out, err, time.monotonic() - self.began)


def _beside(folder: Path, what: str) -> Path:
    """A file of the test's own about a run folder; beside it, since the folder is what is tested."""
    return folder.with_name(f"{folder.name}.{what}")


def launch(folder: Path, *overrides: str, interrupt: Interrupt | None = None) -> Ended:
    """`a3po train` on a folder, to its end, whatever that is."""
    return Launched(folder, *overrides, interrupt=interrupt).finish()


def launched_here(folder: Path, *overrides: str) -> Ended:
    """The same in this process, for what is to be refused; fails where a rank would be started."""
    began, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    words = ["a3po", *command(folder, *overrides)[3:]]
    not_refused = mock.patch("a3po_megatron.launch.local.run_local", side_effect=AssertionError("it was not refused"))
    try:
        with contextlib.ExitStack() as stack:
            for each in (mock.patch.object(sys, "argv", words), not_refused, contextlib.chdir(ROOT)):
                stack.enter_context(each)
            caught = stack.enter_context(pytest.raises(SystemExit))
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                cli.main()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert isinstance(caught.value.code, int), caught.value.code
    return Ended(caught.value.code, out.getvalue(), err.getvalue(), time.monotonic() - began)


def trained(folder: Path, *overrides: str) -> Ended:
    """`a3po train` on a folder; fails unless the run comes to its last step."""
    ended = launch(folder, *overrides)
    assert ended.code == 0, ended.all + _tails_of_logs(folder)
    return ended


def interrupted(folder: Path, point: Interrupt, *overrides: str) -> Ended:
    """`a3po train`, hit at `point`. Fails if the run never came there, or did not end as such a signal demands."""
    ended = launch(folder, *overrides, interrupt=point)
    marker = _beside(folder, "fired")
    assert marker.exists(), f"the run never came to {point}\n{ended.all}{_tails_of_logs(folder)}"
    if point.to == "all":
        assert len(json.loads(marker.read_text())["targets"]) == 3, "two ranks and the launcher were to be hit"
    phase = "checkpoint" if point.phase == "save" else point.phase
    if not point.kills:
        assert ended.code == INTERRUPTED, ended.all + _tails_of_logs(folder)
    elif point.to == "all":
        assert ended.code == -signal.SIGKILL, ended.all
    else:
        assert ended.code == 1, ended.all
        assert f"rank {point.rank} " in ended.err and "SIGKILL" in ended.err, ended.err
        if not (point.delay or point.file):
            assert f"phase {phase} of step {point.step}" in ended.err, ended.err
    if point.kills and not (point.delay or point.file):  # the point is where the process died
        words = (folder / "logs" / f"rank-{point.rank}.phase").read_text().splitlines()[0]
        assert words.startswith(f"{point.step} {phase}"), words
    assert "Traceback" not in ended.err, ended.err
    assert not left_over(folder), "ranks outlive their launcher"
    return ended


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks that train in a run folder now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "a3po_megatron.train" in words and str(folder) in words:
            found.append(process)
    return found


def left_over(folder: Path, seconds: float = 10) -> list[psutil.Process]:
    """The ranks of a run folder that are still there after so many seconds."""
    deadline = time.monotonic() + seconds
    while (alive := ranks_of(folder)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return alive


def _tails_of_logs(folder: Path) -> str:
    logs = sorted((folder / "logs").glob("rank-*.log")) if folder.is_dir() else []
    return "".join(f"\n--- {log.name}\n{log.read_text(errors='replace')[-2500:]}" for log in logs)


def uninterrupted(layout: str, session: pytest.TempPathFactory, *overrides: str) -> Path:
    """The folder of a run of this layout that nothing disturbed; trained once for all tests of a session.

    A finished folder is never written to: copy it first.
    """
    name = "-".join(["uninterrupted", layout, *overrides])
    return _once(session, name, lambda folder: trained(folder, *LAYOUTS[layout], *overrides))


def stopped(layout: str, point: Interrupt, session: pytest.TempPathFactory) -> Path:
    """The folder of a run of this layout that was hit at `point`; likewise."""
    name = "-".join(["stopped", layout, *map(str, vars(point).values())]).replace("/", "-")
    return _once(session, name, lambda folder: interrupted(folder, point, *LAYOUTS[layout]))


def _once(session: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A run folder that one of this session's processes (pytest-xdist has several) makes, while the others wait."""
    shared = session.getbasetemp()
    place = (shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared) / name
    with place.with_name(f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "made").exists():
            shutil.rmtree(place, ignore_errors=True)
            place.mkdir()
            make(place / "run")
            (place / "made").touch()
    return place / "run"


def copy_run(source: Path, target: Path) -> Path:
    """A run folder as it is, under another name, its times with it."""
    shutil.copytree(source, target, symlinks=True)
    return target


def newest_checkpoint(folder: Path) -> Path | None:
    """What `checkpoints/latest` names; None before the first save."""
    latest = folder / "checkpoints" / "latest"
    if not latest.exists():
        return None
    target = folder / "checkpoints" / latest.read_text().strip()
    assert target.is_dir(), f"{latest} names {target.name}, which is not there"
    return target


def saved_steps(folder: Path) -> int:
    """How many steps the newest checkpoint holds; 0 before the first save."""
    newest = newest_checkpoint(folder)
    return 0 if newest is None else int(newest.name.removeprefix("step-"))


def steps_shown(ended: Ended) -> list[int]:
    """The steps that a run said it did, numbered from 1."""
    lines = [line.split() for line in ended.out.splitlines()]
    return [int(words[1].partition("/")[0]) for words in lines if len(words) > 1 and words[0] == "step"]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in _lines(folder / "metrics.jsonl")]


def rollouts_of(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Step → its rollouts, of all ranks; carried-over groups stand in the step that trained on them."""
    files = rollout_files(folder)
    return {step: [r for path in paths for r in read_rollouts(path, [])] for step, paths in files.items()}


def groups_sampled(folder: Path) -> dict[int, int]:
    """Step → how many groups were sampled in it."""
    return {s: len({r["prompt_index"] for r in found if not r["carried"]}) for s, found in rollouts_of(folder).items()}


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file of a folder and what is in it, the lock's own file aside."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def largest_shard(checkpoint: Path) -> Path:
    return max(checkpoint.glob("*.distcp"), key=lambda path: (path.stat().st_size, path.name))


def flip_a_byte(path: Path) -> None:
    """Alters one byte in the middle of a file, and neither its size nor its times."""
    with path.open("r+b") as file:
        times = os.fstat(file.fileno())
        file.seek(times.st_size // 2)
        (byte,) = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0xFF]))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def flip_a_bit_of_a_weight(checkpoint: Path) -> None:
    """Alters the lowest bit of one element of a tensor, where it lies in its file."""
    weight = next(v for k, v in read_chunks(checkpoint).items() if k.startswith("embedding.word_embeddings.weight"))
    for path in checkpoint.glob("*.distcp"):
        data = bytearray(path.read_bytes())
        if (at := data.find(weight.numpy().tobytes())) >= 0:
            data[at] ^= 1
            path.write_bytes(data)
            return
    raise AssertionError(f"{checkpoint}: the weight is in none of its files")


# ---------------------------------------------------------------------------------------------- bit for bit


def assert_same_run(found: Path, wanted: Path, steps: int = STEPS) -> None:
    """Fails with every difference (of each kind the first few) between two finished runs; times do not count."""
    wrong: list[str] = []
    for compare in (_metrics_differ, _rollouts_differ, _checkpoints_differ):
        differences = list(compare(found, wanted, steps))
        wrong += differences[:8]
        if len(differences) > 8:
            wrong.append(f"… and {len(differences) - 8} more")
    assert not wrong, "\n".join([f"{found} is not {wanted}:", *wrong])


def _metrics_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    rows, others = ([json.loads(line) for line in _lines(folder / "metrics.jsonl")] for folder in (found, wanted))
    for which, name in ((rows, found), (others, wanted)):
        if [row["step"] for row in which] != list(range(steps)):
            yield f"{name}/metrics.jsonl: the steps are {[row['step'] for row in which]}, not 0 to {steps - 1}"
    by_step = {row["step"]: row for row in others}
    for row in rows:
        other = by_step.get(row["step"], {})
        if list(row) != list(other):
            yield f"step {row['step']}: the metrics are named otherwise: {sorted(row.keys() ^ other.keys())}"
        for name in (name for name in row if name in other):
            if not name.startswith(VOLATILE) and _bits(row[name]) != _bits(other[name]):
                yield f"step {row['step']}: metric {name} is {row[name]!r}, not {other[name]!r}"


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def _bits(value: Any) -> Any:
    """Numbers as they are written: 0 and 0.0, 0.0 and -0.0 differ."""
    return repr(value)


def _rollouts_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    ours, theirs = (
        {path.name: path for files in rollout_files(folder).values() for path in files} for folder in (found, wanted)
    )
    for name in sorted(ours.keys() ^ theirs.keys()):
        yield f"rollouts/{name} is only in {found if name in ours else wanted}"
    for name in sorted(ours.keys() & theirs.keys()):
        notes: list[str] = []
        records, others = (list(read_rollouts(path, notes)) for path in (ours[name], theirs[name]))
        yield from notes
        if len(records) != len(others):
            yield f"rollouts/{name}: {len(records)} rollouts, not {len(others)}"
        for number, (record, other) in enumerate(zip(records, others, strict=False)):
            where = f"rollouts/{name}, rollout {number} (prompt {other['prompt_id']}, sample {other['sample']})"
            if list(record) != list(other):
                yield f"{where}: its keys are {list(record)}, not {list(other)}"
            for key in (key for key in record if key in other):
                if key not in TIME_STAMPS:
                    yield from objects_differ(record[key], other[key], f"{where}: {key}")
    if set(rollout_files(wanted)) != set(range(steps)):
        yield f"{wanted}: rollouts of the steps {sorted(rollout_files(wanted))}, not 0 to {steps - 1}"


def _checkpoints_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    name = f"step-{steps:06d}"
    ours, theirs = found / "checkpoints" / name, wanted / "checkpoints" / name
    if missing := [str(path) for path in (ours, theirs) if not path.is_dir()]:
        yield f"no such checkpoint: {', '.join(missing)}"
        return
    chunks, others = read_chunks(ours), read_chunks(theirs)
    for key in sorted(chunks.keys() ^ others.keys()):
        yield f"{name}: {key} is only in {found if key in chunks else wanted}"
    for key in sorted(chunks.keys() & others.keys()):
        yield from objects_differ(chunks[key], others[key], f"{name}: {key}")
    common, other = (torch.load(folder / "common.pt", weights_only=False) for folder in (ours, theirs))
    yield from objects_differ(common, other, f"{name}/common.pt")
    manifest, other = (json.loads((folder / "manifest.json").read_text()) for folder in (ours, theirs))
    for part in ("step", "weight_version", "inputs", "state"):
        yield from objects_differ(manifest[part], other[part], f"{name}/manifest.json: {part}")
    for path in sorted(theirs.glob("rank-*.json")):  # the random streams
        streams, other = (json.loads((folder / path.name).read_text()) for folder in (ours, theirs))
        yield from objects_differ(streams, other, f"{name}/{path.name}")
    for path in sorted(theirs.glob("surplus.rank-*")):
        if (ours / path.name).read_bytes() != path.read_bytes():
            yield f"{name}/{path.name}: other groups are carried over"


def read_chunks(checkpoint: Path) -> dict[str, Any]:
    """Everything that a torch_dist checkpoint holds, weights, optimiser state and objects: "key at offsets" → value.

    Chunk by chunk, not tensor by tensor: the runs compared have one layout, and a chunk that one of them lacks shows.
    """
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    found: dict[str, Any] = {}
    for index, place in metadata.storage_data.items():
        where = "" if index.offset is None else f" at {list(index.offset)}"
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        value = torch.load(data, map_location="cpu", weights_only=False)
        if isinstance(value, io.BytesIO):  # an object was pickled before it was given to the writer
            value.seek(0)
            value = torch.load(value, map_location="cpu", weights_only=False)
        key = f"{index.fqn}{where}"
        assert key not in found, f"{checkpoint}: {key} is there twice"
        found[key] = value
    return found


def objects_differ(found: Any, wanted: Any, where: str) -> Iterator[str]:
    """Where two values differ, to the bit: NaN equals itself, 0.0 is not -0.0, and 1 is not 1.0."""
    if type(found) is not type(wanted):
        yield f"{where} is {found!r}, not {wanted!r}"
    elif isinstance(found, torch.Tensor | np.ndarray):
        yield from _tensors_differ(torch.as_tensor(found), torch.as_tensor(wanted), where)
    elif isinstance(found, dict):
        for key in sorted(found.keys() ^ wanted.keys(), key=repr):
            yield f"{where}[{key!r}] is only in the {'first' if key in found else 'second'}"
        for key in (key for key in found if key in wanted):
            yield from objects_differ(found[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(found, list | tuple):
        if len(found) != len(wanted):
            yield f"{where} has {len(found)} entries, not {len(wanted)}"
        for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
            yield from objects_differ(one, other, f"{where}[{number}]")
    elif isinstance(found, argparse.Namespace) or (is_dataclass(found) and not isinstance(found, type)):
        yield from objects_differ(vars(found), vars(wanted), where)
    elif isinstance(found, io.BytesIO):
        yield from objects_differ(found.getvalue(), wanted.getvalue(), where)
    elif isinstance(found, Enum | set | frozenset):
        if found != wanted:
            yield f"{where} is {found!r}, not {wanted!r}"
    elif repr(found) != repr(wanted):
        yield f"{where} is {found!r}, not {wanted!r}"


def _tensors_differ(found: torch.Tensor, wanted: torch.Tensor, where: str) -> Iterator[str]:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        yield f"{where} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        return
    one, other = found.detach().contiguous().reshape(-1), wanted.detach().contiguous().reshape(-1)
    bits = [value.view(torch.uint8).reshape(one.numel(), -1) for value in (one, other)] if one.numel() else [one, other]
    wrong = torch.nonzero((bits[0] != bits[1]).reshape(one.numel(), -1).any(1))[:, 0].tolist() if one.numel() else []
    if wrong:
        first = wrong[0]
        yield (
            f"{where} ({found.dtype} {list(found.shape)}): {len(wrong)} of {one.numel()} elements differ, the first at "
            f"{first}: {one[first].item()!r}, not {other[first].item()!r}"
        )
