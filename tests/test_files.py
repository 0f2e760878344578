"""A shared file system survives many ranks: what one rank does to it does not grow with the world, nor stop a step."""

from __future__ import annotations

import faulthandler
import functools
import json
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from a3po_megatron.batch import Batch, Group, Prompt, Rollout, Segment, Verdict
from a3po_megatron.config import TelemetryOptions
from a3po_megatron.files.run_folder import RunFolder, rollout_file
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.run.found import Found, find
from a3po_megatron.run.journal import Journal, check_format
from a3po_megatron.telemetry.clock import Clock
from a3po_megatron.telemetry.metrics import MetricsWriter
from a3po_megatron.telemetry.rollouts import rollout_table, write_rollouts
from a3po_megatron.telemetry.watchdog import Watchdog
from tests.distributed import cases_files
from tests.harness import interrupted_runs as tools
from tests.harness.file_counts import Left, Threads, heard
from tests.test_watchdog import Stores

PER_NODE, WORLDS = 8, (8, 1024)
MINUTE = 12  # periods of 5 s
GROUPS = 2  # of each rank in a step


def group(rank: int, number: int, step: int) -> Group:
    prompt = Prompt(f"p/{rank}/{number}", "q", "a", (1, 2), GROUPS * rank + number)
    tokens, logprobs = np.arange(3), np.full(3, -0.5, np.float32)
    verdicts = (Verdict("correct"), Verdict("wrong"))
    rollouts = [
        Rollout(prompt, sample, 0, step, tokens, logprobs, "stop", "text", (Segment(3, 1),), verdict, 1.0)
        for sample, verdict in enumerate(verdicts)
    ]
    return Group(prompt, rollouts)


def batch_of(groups: list[Group]) -> Batch:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    each, lengths = torch.zeros(len(rollouts)), torch.full((len(rollouts),), 3)
    index, values = torch.arange(len(rollouts)).repeat_interleave(3), torch.full((3 * len(rollouts),), -0.5)
    batch = Batch(rollouts, each.long(), each.long(), 1, each, each > 0, each, lengths, index, values)
    batch.old_logprobs = batch.entropy = batch.token_weights = values
    return batch


def write_down(journal: Journal, step: int, groups: list[Group]) -> None:
    for each in groups:
        journal.add_group(step, each)
    journal.add_verdicts(step, groups)
    journal.add_scores(step, batch_of(groups))


def journal_of(folder: Path, rank: int, before: Any) -> Journal:
    journal = Journal(RunFolder(folder).journal, rank, "run", before, AtOnce())
    journal.published(1, "W")
    return journal


class Simulated:
    """A world of threads over a run folder: a killed run's journal of the steps 1 and 2 is there, 2 is to come again.

    Looked at closely are the ranks of the first two nodes and of the last one."""

    def __init__(self, folder: Path, world: int) -> None:
        self.folder, self.threads, self.store = folder, Threads(world), Stores()
        self._lock = threading.Lock()
        self.looked_at = sorted({*range(min(2 * PER_NODE, world)), *range(world - PER_NODE, world)})
        run = RunFolder(folder)
        for part in (run.logs, run.rollouts):
            part.mkdir(parents=True)
        for step in (1, 2):
            for rank in range(world):
                journal = journal_of(folder, rank, Found(run.journal))
                write_down(journal, step, [group(rank, number, step) for number in range(GROUPS)])

    def start(self, asks: Callable[[Journal, int], None]) -> dict[int, Counter[str]]:
        """What every rank does at a start; those that are looked at ask the journal for something then."""
        self.journals: dict[int, Journal] = {}
        self.dogs: dict[int, Watchdog] = {}
        options = TelemetryOptions()

        def work(rank: int) -> None:
            dog = self.dogs[rank] = Watchdog(self.folder, rank, self.threads.world, options, Clock(), print)
            dog.start()

            def agree(tag: str, value: Any, op: Any) -> Any:
                result = self.threads.agree(rank, value, op)
                if tag == "what is in the journal" and rank not in self.looked_at:
                    raise Left  # it has read its share; what follows is computing, a thousand times the same
                return result

            ranks = SimpleNamespace(rank=rank, world=self.threads.world, agree=agree)
            before = find(RunFolder(self.folder).journal, ranks, 2)
            self.journals[rank] = journal_of(self.folder, rank, before)
            asks(self.journals[rank], rank)

        return self.threads.counts(self.folder, work)

    def step(self, number: int) -> dict[int, Counter[str]]:
        """What those that are looked at do in one step of a minute."""

        def work(rank: int) -> None:
            groups = [group(rank, each, number) for each in range(GROUPS)]
            write_down(self.journals[rank], number, groups)
            table = rollout_table(number, groups, set(), batch_of(groups), 1, lambda tokens: ["x"] * len(tokens))
            write_rollouts(rollout_file(RunFolder(self.folder).rollouts, number, rank), table)
            if rank == 0:
                self.metrics.write(number, {})
            beats = self.beats[rank]
            for _ in range(MINUTE):
                with self._lock:  # as torch's store does one thing at a time
                    beats.round()
                beats.write()

        self.metrics = MetricsWriter(self.folder, False, AtOnce())
        self.beats = {rank: dog.beats_over(self.store) for rank, dog in sorted(self.dogs.items())}
        for rank, beats in self.beats.items():
            beats._node = f"node-{rank // PER_NODE}"
            beats.round()
        return self.threads.counts(self.folder, work, self.looked_at)


def ask(journal: Journal, rank: int, of: int) -> None:
    """For the groups and scores of another rank."""
    groups = [group(of, number, 2) for number in range(GROUPS)]
    for each in groups:
        found = journal.group(2, each.prompt, lambda tokens: "text")
        assert found is not None and found[1], (rank, of)
    assert journal.scores(2, [rollout for each in groups for rollout in each.rollouts]) is not None


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, dict[int, Counter[str]]]]:
    """World → what each of its ranks does to files."""
    found = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(faulthandler, "register", lambda *_, **__: None)
        for world in WORLDS:
            simulated = Simulated(tmp_path_factory.mktemp(f"world-{world}"), world)
            last = world - 1
            counted = {"start": simulated.start(lambda journal, rank, last=last: ask(journal, rank, last - rank))}
            counted["step"] = simulated.step(3)
            found[world] = counted
    return found


def test_what_a_rank_does_to_files_at_a_start_and_in_a_step_is_the_same_in_a_world_of_8_and_of_1024(
    worlds: dict[int, dict[str, dict[int, Counter[str]]]],
) -> None:
    small, large = (worlds[world] for world in WORLDS)
    for part in ("start", "step"):
        ordinary = small[part][PER_NODE - 1]
        assert ordinary, part
        for rank in (*range(1, 2 * PER_NODE), *range(WORLDS[1] - PER_NODE, WORLDS[1])):
            mine = Counter(large[part][rank])
            if part == "step" and rank % PER_NODE == 0:  # the first of its node writes one file more, every 5 s
                mine -= Counter(create=MINUTE, rename=MINUTE)
            assert mine == ordinary, (part, rank)
        nodes = WORLDS[1] // PER_NODE - WORLDS[0] // PER_NODE
        assert large[part][0].total() - small[part][0].total() <= nodes, part


def test_a_rank_opens_at_a_start_the_files_that_are_its_share_and_those_that_hold_what_it_asks_for(
    worlds: dict[int, dict[str, dict[int, Counter[str]]]],
) -> None:
    for world, counted in worlds.items():
        for rank, start in counted["start"].items():
            # Its share, since of step 1 nothing is asked any more; of another rank's file the headers, and the payloads
            # of two groups and of their scores.
            asked = rank < 2 * PER_NODE or rank >= world - PER_NODE
            assert start["open"] == 1 + asked * (1 + GROUPS + 1), (world, rank)
            assert start["create"] == 1  # the stacks
            assert start["list"] == (rank == 0)


def test_in_a_step_a_rank_makes_a_file_of_its_journal_and_one_of_its_rollouts(
    worlds: dict[int, dict[str, dict[int, Counter[str]]]],
) -> None:
    for world, counted in worlds.items():
        for rank, step in counted["step"].items():
            leads = MINUTE * (rank % PER_NODE == 0)  # and its node's file, every 5 s
            assert step == Counter(create=2 + leads, rename=1 + leads), (world, rank)


def test_a_launcher_opens_one_file_of_a_journal(tmp_path: Path) -> None:
    Simulated(tmp_path, 8)
    opened: list[str] = []
    with heard(lambda kind, path: opened.append(path) if path.startswith(str(tmp_path)) and kind == "open" else None):
        check_format(RunFolder(tmp_path).journal)
    assert opened == [str(tmp_path / "journal/step-00001.rank-0")]


def test_the_main_thread_of_a_rank_writes_nothing_between_a_steps_start_and_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also not what an evaluation finds and what a profile sees."""
    file = tmp_path / "sums.jsonl"
    file.write_text("".join(json.dumps({"problem": f"{n}+1=", "answer": str(n + 1)}) + "\n" for n in range(6)))
    asked = ("evaluation.every_steps=1", f"evaluation.benchmarks=[{file}]", "evaluation.samples=1")
    asked += ("evaluation.keep_best=sums", "checkpoint.every_steps=1", "telemetry.profile_steps=[0,1]")
    found = functools.partial(tools.trained_here, tmp_path / "run", *tools.LAYOUTS["dp2"], "trainer.steps=2", *asked)
    monkeypatch.setattr(tools.cases_runs, "trains", cases_files.trains_heard)
    found()
    run = RunFolder((tmp_path / "run").resolve())
    for rank in range(2):
        written = [line.split("\t") for line in cases_files.heard_of(run.path, rank).read_text().splitlines()]
        by_main = [line for line in written if line[0] == "main"]
        assert not by_main, by_main
        threads = {line[0] for line in written}
        assert "writer" in threads  # the hook hears: it is the writer who writes
        for part in ("journal", "rollouts", "evaluations", *(["profile"] if rank == 0 else [])):
            assert any(str(getattr(run, part)) in line[2] for line in written), part
