"""One table (docs/resume.md) from how ranks die to the exit code, on this machine and in a Slurm job."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from a3po_megatron.errors import Interrupted, RequestError, RunFailed
from a3po_megatron.launch import local
from a3po_megatron.launch.blame import Death, Here, InJob, blamed, deaths_in_job, failure, first_bad_node
from tests.harness.ranks import ROOT

# How a rank of a kind ends: what its shell does, and what srun 22.05 says of it.
ENDS = {
    "request": ("exit 2", "Exited with exit code 2"),
    "run": ("exit 1", "Exited with exit code 1"),
    "interrupted": ("exit 85", "Exited with exit code 85"),
    "crash": ("exit 1", "Exited with exit code 1"),
    "killed": ("kill -KILL $$", "Killed"),
}
PAIRS = [(kinds, first) for kinds in itertools.product(ENDS, repeat=2) for first in ({0}, {1}, {0, 1})]


def table() -> Iterator[tuple[str, tuple[str, ...], int]]:
    """Rows of the document: a kind, the kinds beside which it decides, the exit code."""
    text = (ROOT / "docs/resume.md").read_text()
    for row in re.search(r"\| a rank \| beside .*?\n\n", text, re.DOTALL).group(0).split("\n")[2:-2]:
        kind, beside, code = (cell.strip() for cell in row.strip("|").split("|"))
        kinds = tuple(ENDS) if beside == "anything" else tuple(beside.split(", "))
        yield kind.partition(":")[0], kinds, int(code)


def expected(kinds: tuple[str, str]) -> int:
    (code,) = {c for kind, beside, c in table() for a, b in (kinds, kinds[::-1]) if kind == a and b in beside}
    return code


def dead(kind: str, message: str = "") -> local._Rank:
    """A real process that has ended so, with the words that such a rank leaves."""
    words, said = os.pipe()
    os.set_blocking(words, False)
    if kind != "killed":
        os.write(said, json.dumps({"kind": kind, "message": message or f"a {kind}"}).encode() + b"\n")
    os.close(said)
    process = subprocess.Popen(["sh", "-c", ENDS[kind][0]])
    process.wait()
    return local._Rank(process, words, phase=-1)


def in_job(folder: Path, kinds: tuple[str, ...], order: list[int]) -> InJob:
    words = {rank: (kind, f"a {kind}") for rank, kind in enumerate(kinds) if kind != "killed"}
    said = "".join(f"srun: error: n{rank}: task {rank}: {ENDS[kinds[rank]][1]}\n" for rank in order)
    return InJob(1, words, f"n{order[0]}", said)


def test_every_pair_of_deaths_ends_a_run_as_the_table_says_on_one_machine_and_in_a_job(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    wrong = []
    for kinds, first in PAIRS:
        ranks = [dead(kind) for kind in kinds]
        here = failure(Here(ranks, first, {0: "phase a", 1: "phase b"}), tmp_path, False)
        there = failure(in_job(tmp_path, kinds, sorted({0, 1}, key=lambda r: r not in first)), tmp_path, False)
        if not here.exit_code == there.exit_code == expected(kinds):
            wrong.append((kinds, first, here.exit_code, there.exit_code, expected(kinds)))
        for rank in ranks:
            os.close(rank.words)
    assert not wrong
    (tmp_path / "logs/stall").write_text("rank 1 (phase rollout of step 2) stood still")
    for kinds, _ in PAIRS:
        assert failure(in_job(tmp_path, kinds, [0, 1]), tmp_path, False).exit_code == 85


def test_the_rank_that_died_first_is_named_and_not_those_that_missed_it_or_were_killed_after_it(
    tmp_path: Path,
) -> None:
    killed, crash = Death(3, "killed", "was killed", True), Death(0, "crash", "Connection closed by peer")
    assert blamed([crash, killed]).rank == 3
    assert blamed([Death(0, "killed", "was killed"), Death(1, "crash", "out of memory", True)]).rank == 1
    (tmp_path / "logs").mkdir()
    said = (
        "srun: launch/slurm: _step_signal: Terminating StepId=7.0\n"
        "srun: error: rl1: tasks 1,3-4: Segmentation fault (core dumped)\n"
        "srun: error: rl0: task 0: Exited with exit code 1\n"
        "srun: error: rl0: task 2: Terminated\n"
    )
    words = {0: ("crash", "Connection closed by peer")}
    deaths = deaths_in_job(words, said)
    assert [(d.rank, d.kind, d.first) for d in deaths] == [
        (0, "crash", False), (1, "killed", True), (2, "killed", False), (3, "killed", True), (4, "killed", True)
    ]  # fmt: skip
    assert first_bad_node(said) == "rl1"
    assert first_bad_node(f"srun: error: rl0: task 5: Exited with exit code 85\n{said}") == "rl1"
    assert first_bad_node("srun: error: rl0: tasks 0-1: Exited with exit code 85\n") is None
    error = failure(InJob(1, words, "rl1", said), tmp_path, False)
    assert isinstance(error, RunFailed)
    assert str(error) == "rank 1 (on rl1) was killed: Segmentation fault (core dumped)"


# What ranks said that lost another, as these libraries word it.
GLOO = "RuntimeError: [../third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:32918"
LOSSES = (
    GLOO,
    "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Read error [127.0.0.1]:4711: Connection reset by peer",
    "RuntimeError: Application timeout caused pair closure",
    "DistNetworkError: Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?",
    "DistNetworkError: The client socket has failed to connect to n0:29500 (errno: 111 - Connection refused).",
    "BrokenPipeError: [Errno 32] Broken pipe",
    "DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:2245, remote process exited or there was a network error\n"
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.",
)
KILLED, OWN = ("killed", "was killed by SIGKILL"), ("crash", "failed: OutOfMemoryError: CUDA out of memory")


@pytest.mark.parametrize("lost", LOSSES)
@pytest.mark.parametrize(
    ("kinds", "first", "wanted"),
    [
        (("lost", "killed"), {0, 1}, 1),  # seen dead in one poll: the rank without words, and not the lower number
        (("lost", "lost", "killed", "lost"), {0, 1, 2, 3}, 2),
        (("killed", "lost"), {0, 1}, 0),
        (("lost", "signal"), {0, 1}, 1),
        (("lost", "own"), {0, 1}, 1),  # one that says what is wrong with itself, likewise
        (("own", "killed"), {0, 1}, 0),  # of two that may both be the cause the first, as ever
        (("lost", "killed"), {0}, 0),  # what dies later may have been killed by srun
        (("lost", "killed"), {1}, 1),
        (("lost", "lost"), {0, 1}, 0),
        (("lost", "run"), {0}, 1),  # what a rank says of the run comes before all that was seen
        (("killed", "interrupted"), {0, 1}, 1),
    ],
)
def test_of_ranks_seen_dead_at_once_one_that_only_lost_another_is_not_blamed(
    lost: str, kinds: tuple[str, ...], first: set[int], wanted: int
) -> None:
    words = {"lost": ("crash", f"failed: {lost}"), "killed": KILLED, "own": OWN}
    words["signal"] = "killed", "was killed: Broken pipe"  # as srun has SIGPIPE: these are nobody's last words
    words |= {"run": ("run", "the disk is full: Broken pipe"), "interrupted": ("interrupted", "told to stop")}
    deaths = [Death(rank, *words[kind], first=rank in first) for rank, kind in enumerate(kinds)]
    for order in itertools.permutations(deaths):
        assert blamed(order).rank == wanted


def test_a_killed_rank_is_named_beside_one_that_died_of_missing_it_in_the_same_poll(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    ranks = [dead("crash", GLOO), dead("killed")]
    error = failure(Here(ranks, {0, 1}, {0: "phase update", 1: "phase update of step 3"}), tmp_path, False)
    for rank in ranks:
        os.close(rank.words)
    assert str(error).startswith("rank 1 (phase update of step 3) was killed by SIGKILL")


@pytest.mark.parametrize("number", ["USR1", "TERM", "INT"])
def test_a_rank_that_dies_of_a_signal_meant_for_the_run_is_interrupted_unless_srun_ends_it_after_another(
    tmp_path: Path, number: str
) -> None:
    (tmp_path / "logs").mkdir()
    words, said = os.pipe()
    os.set_blocking(words, False)
    os.close(said)
    process = subprocess.Popen(["sh", "-c", f"kill -{number} $$"])
    process.wait()
    rank = local._Rank(process, words, phase=-1)
    assert isinstance(failure(Here([rank], {0}, {0: "phase imports"}), tmp_path, False), Interrupted)
    text = {"USR1": "User defined signal 1", "TERM": "Terminated", "INT": "Interrupt"}[number]
    first = f"srun: error: n0: task 0: {text}\n"
    assert isinstance(failure(InJob(1, {}, "n0", first), tmp_path, False), Interrupted)
    after = f"srun: error: n1: task 1: Exited with exit code 1\n{first}"
    assert isinstance(failure(InJob(1, {}, "n1", after), tmp_path, False), RunFailed)


def test_what_srun_says_is_in_the_message_when_no_rank_could_speak(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    said = "srun: error: Unable to create step for job 7: Memory required by task is not available\n"
    error = failure(InJob(1, {}, None, said), tmp_path, False)
    assert isinstance(error, RunFailed)
    assert "Memory required by task is not available" in str(error)
    request = failure(InJob(1, {0: ("request", "no such model")}, "n0", said), tmp_path, False)
    assert isinstance(request, RequestError)
