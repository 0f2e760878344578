"""USR1 and TERM, once and again and again, at any moment of a start: exit 85, and the run that goes on is undisturbed.

One folder is started again and again, each start hit at a further moment; at the end the run must be the one that
nothing disturbed, to the last bit. Signals reach the launcher, all ranks, and what ranks have started, as srun's do.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import psutil
import pytest

from a3po_megatron.config import load_resolved
from a3po_megatron.launch.folder import make_folder
from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import Interrupt, Launched

DP2 = tools.LAYOUTS["dp2"]
ALONE = ("parallel.tensor=1",)
NEW = "VLLM_CACHE_ROOT"  # where vLLM remembers models' classes: in a new one it inspects them in a process of its own


def maps(process: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/maps").read_text()
    return ""


def heard(launched: Launched) -> bool:
    from tests.test_launch import catches

    with contextlib.suppress(OSError):
        return catches(launched.process.pid, signal.SIGTERM)
    return False


def imports(launched: Launched) -> bool:
    return "libtorch" in maps(launched.process.pid)


def ranks(launched: Launched) -> list[int]:
    return [process.pid for process in tools.ranks_of(launched.folder)]


# What is awaited from outside, before a rank can announce a phase; then phases, in which vLLM's helper is one.
OUTSIDE: dict[str, Callable[[Launched], bool]] = {
    "the launcher hears": heard,
    "the launcher imports": imports,
    "a rank is there": lambda launched: len(ranks(launched)) == 1,
    "ranks begin": lambda launched: len(ranks(launched)) == 2,
    "ranks import": lambda launched: any("libtorch" in maps(rank) for rank in ranks(launched)),
}
PHASES = {
    "groups": Interrupt("groups", -1, "", "family"),
    "engine": Interrupt("engine", -1, "", "family"),
    "engine, later": Interrupt("engine", -1, "", "family", delay=2.0),
    "model": Interrupt("model", -1, "", "family"),
    "first publish": Interrupt("publish", -1, "", "family"),
    "first rollout": Interrupt("rollout", 0, "", "family"),
}


def hit(launched: Launched, number: signal.Signals, times: int) -> None:
    """The whole family, so often."""
    for turn in range(times):
        if turn:
            time.sleep(0.03)
        launcher = psutil.Process(launched.process.pid)
        for process in [launcher, *launcher.children(recursive=True)]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)


def started_and_hit(
    folder: Path, moment: str, number: signal.Signals, times: int, layout: tuple[str, ...] = DP2
) -> None:
    if moment in PHASES:
        point = PHASES[moment]
        point = Interrupt(point.phase, point.step, number.name, "family", times=times, delay=point.delay)
        launched = Launched(folder, *layout, interrupt=point)
    else:
        launched = Launched(folder, *layout)
        deadline = time.monotonic() + 60
        while not OUTSIDE[moment](launched):
            assert launched.process.poll() is None and time.monotonic() < deadline, f"never came to: {moment}"
            time.sleep(0.002)
        hit(launched, number, times)
    ended = launched.finish()
    words = f"{moment}, {times} times {number.name}: {ended.all}{tools._tails_of_logs(folder)}"
    assert moment in OUTSIDE or launched.marker.exists(), words
    assert ended.code == tools.INTERRUPTED, words
    assert "Traceback" not in ended.err, words
    assert not tools.left_over(folder), words


def new_cache(tmp_path: Path) -> contextlib.AbstractContextManager[object]:
    """For starts that are hit, and no others: the process that inspects takes ten seconds on every rank."""
    return mock.patch.dict(os.environ, {NEW: str(tmp_path / "cache")})


def test_a_signal_in_a_start_is_survived_and_leaves_nothing_to_go_on_from(tmp_path: Path) -> None:
    """So what trains in the folder then is a new run. Of one rank: that several stop together is tests/test_resume.py's
    subject, and of a start's too with `make soak`; and at a moment when vLLM has no helper: that helpers outlive such
    signals is tests/test_interrupt.py's."""
    folder = tmp_path / "run"
    started_and_hit(folder, "engine", signal.SIGTERM, 3, ALONE)
    left = {path.relative_to(folder).parts[0] for path in folder.rglob("*") if path.is_file()}
    assert left <= {"config.yaml", "identity.json", "provenance.json", "logs", ".lock"}, left
    lock, remarks = make_folder(folder, load_resolved(folder / "config.yaml"), ["a3po", "train"])
    lock.close()
    assert remarks == []


@pytest.mark.soak
@pytest.mark.parametrize("times", [1, 5])
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_at_every_moment_of_a_start_is_survived_and_the_run_is_as_undisturbed(
    number: signal.Signals, times: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    whole = tools.uninterrupted("dp2", tmp_path_factory)
    with new_cache(tmp_path):
        for moment in (*OUTSIDE, *PHASES):
            started_and_hit(tmp_path / "run", moment, number, times)
    assert tools.trained(tmp_path / "run", *DP2).code == 0
    tools.assert_same_run(tmp_path / "run", whole)
