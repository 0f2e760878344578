"""Runs that are interrupted at one exact point, on folders that a whole session shares.

A run is driven from outside only: the command line, signals, and what it leaves in its folder. What interrupts it is
tests/harness/interrupting/sitecustomize.py, inside the rank.
"""

from __future__ import annotations

import contextlib
import fcntl
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import psutil
import pytest

from a3po_megatron import cli
from a3po_megatron.config import Config, Settings, load_config
from a3po_megatron.errors import Interrupted
from a3po_megatron.files.run_folder import RunFolder, rank_file, rollout_files
from a3po_megatron.launch.check import settle
from a3po_megatron.launch.folder import make_folder
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.run.stop import SIGNALS
from tests.distributed import cases_runs
from tests.harness import bit_for_bit
from tests.harness.bit_for_bit import VOLATILE, objects_differ, read_chunks, rows_of
from tests.harness.ranks import ROOT, run_ranks

__all__ = ["VOLATILE", "objects_differ", "read_chunks", "rows_of"]  # with the rest of this, under one name

STEPS, EVERY = 6, 2  # saves after steps 1, 3 and 5: between them, a kill loses what only a replay brings back
SMALL = (
    f"trainer.steps={STEPS}",
    f"checkpoint.every_steps={EVERY}",
    "trainer.prompts_per_step=4",
    "trainer.rollouts_per_prompt=4",
    "telemetry.texts_per_step=1",
    "telemetry.tensorboard=false",
    "publish.witness_at_start=false",
    "publish.canary_tokens=4",
)
LAYOUTS = {
    "tp2": ("parallel.tensor=2",),
    "pp2": ("parallel.tensor=1", "parallel.pipeline=2"),
    "dp2": ("parallel.tensor=1", "parallel.data=2"),
}
RUN_SECONDS = 240.0  # more than ten times what a run takes on two cores with nothing else to do
INTERRUPTED = 85  # the exit code of a run that was asked to stop, and saved


@dataclass(frozen=True)
class Interrupt:
    """Where a signal hits a run, and whom."""

    phase: str  # "save" is the phase `checkpoint`
    step: int
    signal: str
    to: str  # "rank", "launcher", "all" (every rank and the launcher, at once) or "family" (and what ranks started)
    rank: int = 0  # on which the phase is awaited; the one that is hit, where `to` is "rank"
    nth: int = 1  # occurrence of the phase in this step
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

    def starts(*_: object) -> None:
        raise AssertionError("it was not refused")

    return main_here(command(folder, *overrides)[3:], starts)


def launched_in_session(words: Sequence[str]) -> Ended:
    """The command in this process, to the end of a run in ranks of this session: all of a launcher but how it starts
    and watches ranks."""

    def starts(folder: Path, settings: Settings, *_: object) -> None:
        _in_session(folder, settings)

    return main_here(words, starts)


def main_here(words: Sequence[str], starts: Callable[..., None]) -> Ended:
    """`a3po` with these words, in this process; `starts` stands for the start of ranks on this machine."""
    began, out, err = time.monotonic(), io.StringIO(), io.StringIO()
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    instead = mock.patch("a3po_megatron.launch.local.run_local", starts)
    try:
        with contextlib.ExitStack() as stack:
            for each in (mock.patch.object(sys, "argv", ["a3po", *words]), instead, contextlib.chdir(ROOT)):
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


def trained_here(folder: Path, *overrides: str) -> Ended:
    """The same in ranks of this session, which are there already: nothing of how a run is started is shown by it."""
    with contextlib.chdir(ROOT):
        config = load_config(ROOT / "configs/arithmetic.yaml", [*SMALL, *overrides])
    return trained_as(folder, config, command(folder, *overrides))


def trained_as(folder: Path, config: Config, words: Sequence[str] = ()) -> Ended:
    """A run of any configuration in ranks of this session. `words`: the command that it says it was begun with."""
    began = time.monotonic()
    with contextlib.chdir(ROOT):
        settings = settle(config, CPU)
        lock, remarks = make_folder(folder, settings, list(words))
        with lock:
            _in_session(folder, settings)
    said = rank_file(RunFolder(folder).logs, 0, "log").read_text(errors="replace")
    return Ended(0, "\n".join([*remarks, said]), "", time.monotonic() - began)


def _in_session(folder: Path, settings: Settings) -> None:
    """Trains in a folder that was made ready."""
    logs = RunFolder(folder).logs.resolve()
    with mock.patch.dict(os.environ, {cases_runs.FOLDER: str(folder.resolve())}):
        run_ranks(settings.parallel.ranks_of(settings.parallel.data), cases_runs.trains, folder=logs)


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
    assert "Traceback" not in ended.err, ended.err
    assert not left_over(folder), "ranks outlive their launcher"
    return ended


def interrupted_here(folder: Path, point: Interrupt, *overrides: str) -> None:
    """A run in ranks of this session, one of which hits itself at `point`; the others end as it does, and who comes
    next gets new ranks. Nothing of what a launcher does then is shown by it."""
    assert point.to == "rank" and not (point.delay or point.file), point
    assert Interrupted.exit_code == INTERRUPTED
    marker = _beside(folder, "fired")
    marker.unlink(missing_ok=True)
    with (
        mock.patch.dict(os.environ, {cases_runs.POINT: point.as_env(marker)}),
        pytest.raises(AssertionError, match=f"rank {point.rank} died" if point.kills else Interrupted.__name__),
    ):
        trained_here(folder, *overrides)
    assert marker.exists(), f"the run never came to {point}"


def ranks_of(folder: Path) -> list[psutil.Process]:
    """The ranks that train in a run folder now."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "a3po_megatron.train" in words and str(folder) in words:
            found.append(process)
    return found


def phase_of(folder: Path, rank: int) -> str:
    """Where a rank is that a launcher of this machine started, "3 rollout", as its clock noted in the launcher's
    memory; empty before it came that far."""
    for process in ranks_of(folder):
        with contextlib.suppress(psutil.NoSuchProcess, OSError, KeyError):
            told = process.environ()
            if told["RANK"] == str(rank):
                return Path(f"/proc/{process.pid}/fd/{told['A3PO_PHASE_FD']}").read_text().strip()
    return ""


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
    return _once(session, name, lambda folder: trained_here(folder, *LAYOUTS[layout], *overrides))


def stopped(
    layout: str, point: Interrupt, session: pytest.TempPathFactory, stop: Callable[..., object] = interrupted
) -> Path:
    """The folder of a run of this layout that was hit at `point`; likewise."""
    name = "-".join([stop.__name__, layout, *map(str, vars(point).values())]).replace("/", "-")
    return _once(session, name, lambda folder: stop(folder, point, *LAYOUTS[layout]))


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


def rollouts_of(folder: Path) -> dict[int, list[dict[str, Any]]]:
    """Step → its rollouts, of all ranks; carried-over groups stand in the step that trained on them."""
    files = rollout_files(folder)
    return {step: [r for path in paths for r in read_rollouts(path)] for step, paths in files.items()}


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


def assert_same_run(found: Path, wanted: Path, steps: int = STEPS) -> None:
    """Fails with every difference between two finished runs; times do not count."""
    bit_for_bit.assert_same_run(found, wanted, steps)
