"""What a run finished since its last checkpoint: found again as it was, believed only where it is whole."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from blake3 import blake3

from a3po_megatron.batch import Batch, Group, Prompt, Rollout, Segment, Step, Verdict
from a3po_megatron.errors import RequestError, RunFailed
from a3po_megatron.files.writer import AtOnce
from a3po_megatron.run.found import find
from a3po_megatron.run.journal import Journal, check_format, read_frames
from tests.harness.journals import Alone, journal_of

PROMPTS = [Prompt(f"p/{n}", f"problem {n}", f"gold {n}", (n, n + 1), n) for n in range(6)]


def decode(tokens: Any) -> str:
    return " ".join(map(str, tokens))


def opened(folder: Path, rank: int, run: str, any_weights: bool = False) -> Journal:
    """Where the engine holds the weights of version 4, which sampled every group here."""
    journal = journal_of(folder, rank, run, any_weights)
    journal.published(4, "")
    return journal


def segments(length: int) -> tuple[Segment, ...]:
    """A tool answered under way, where the response is long enough."""
    if length < 3:
        return (Segment(length, 4),)
    return Segment(1, 4), Segment(length - 2, 4, trained=False), Segment(1, 4)


def group(number: int, step: int = 3) -> Group:
    """Responses of uneven length, one of them empty, with log-probs that no short decimal writes exactly."""
    rng = np.random.default_rng(number)
    rollouts = []
    for sample in range(3):
        length = 0 if sample == 1 else int(rng.integers(1, 9))
        tokens = rng.integers(0, 1 << 40, length)
        logprobs = np.log(rng.random(length)).astype(np.float32)
        rollout = Rollout(
            PROMPTS[number], sample, 7 * sample, step, tokens, logprobs, "stop", decode(tokens), segments(length)
        )
        rollout.verdict, rollout.reward = Verdict("wrong", "no ✓ answer"), 0.1 * sample
        if number % 2:  # with routing replay; of more than 256 experts in two bytes
            most, kind = (256, np.uint8) if number < 4 else (512, np.uint16)
            rollout.routes = rng.integers(0, most, (len(PROMPTS[number].tokens) + length - 1, 3, 2), kind)
        rollouts.append(rollout)
    return Group(PROMPTS[number], rollouts)


def facts(one: Group) -> list[Any]:
    return [
        (r.name, r.sample, r.seed, r.step, r.tokens.tolist(), r.logprobs.tobytes(), r.finish, r.text, r.segments)
        + ((None,) if r.routes is None else (r.routes.tolist(), r.routes.dtype, r.routes.shape))
        for r in one.rollouts
    ]


def verdicts(one: Group) -> list[Any]:
    return [(r.verdict, r.reward) for r in one.rollouts]


def test_groups_routes_and_verdicts_come_back_bit_for_bit_whichever_rank_wrote_them(tmp_path: Path) -> None:
    for rank in range(2):
        journal = opened(tmp_path / "journal", rank, "run")
        for number in range(rank, 6, 2):
            journal.add_group(3, group(number))
            if number < 4:
                journal.add_verdicts(3, [group(number)])
    again = opened(tmp_path / "journal", 0, "run")
    for number in range(6):
        found = again.group(3, PROMPTS[number], decode)
        assert found is not None
        assert facts(found[0]) == facts(group(number))
        assert found[1] == (number < 4)
        if found[1]:
            assert verdicts(found[0]) == verdicts(group(number))
        assert again.group(2, PROMPTS[number], decode) is None  # of another step
    for other in (
        Prompt("q/0", "problem 0", "gold 0", (0, 1), 0),  # another prompt at the same place,
        Prompt("p/0", "problem 0", "gold 0", (0, 2), 0),  # the same name with another text,
        Prompt("p/0", "problem 0", "gold 1", (0, 1), 0),  # or with another answer
    ):
        assert again.group(3, other, decode) is None


def test_steps_of_verdicts_come_back_bit_for_bit_and_where_there_are_none_frames_keep_their_form(
    tmp_path: Path,
) -> None:
    one = group(2)
    scores = [0.1, -0.0, 1 / 3, 5e-324, 1e300]
    steps = tuple(Step(2 * place, 2 * place + 1, score) for place, score in enumerate(scores))
    one.rollouts[0].verdict = Verdict("correct", "so", steps)
    journal = opened(tmp_path, 0, "run")
    for each in (one, group(0)):
        journal.add_group(3, each)
        journal.add_verdicts(3, [each])
    found = opened(tmp_path, 0, "run").group(3, PROMPTS[2], decode)
    assert found is not None and found[1] and verdicts(found[0]) == verdicts(one)
    assert repr(found[0].rollouts[0].verdict.steps) == repr(steps)  # -0.0 is 0.0, and is not
    assert all(type(step) is Step for step in found[0].rollouts[0].verdict.steps)
    # What was written before there were steps has three entries a verdict, and so has what has none.
    with_steps, without = [
        f.header for f in read_frames(tmp_path / "step-00003.rank-0") if f.header["kind"] == "verdicts"
    ]
    assert [len(entry) for entry in with_steps["verdicts"]] == [4, 3, 3]
    assert without["verdicts"] == [["wrong", "no ✓ answer", 0.1 * sample] for sample in range(3)]
    found = opened(tmp_path, 0, "run").group(3, PROMPTS[0], decode)
    assert found is not None and verdicts(found[0]) == verdicts(group(0))


def test_what_other_weights_or_a_run_with_other_options_sampled_is_not_believed(tmp_path: Path) -> None:
    journal = opened(tmp_path, 0, "run")
    journal.published(4, "old weights")
    journal.add_group(3, group(0))
    journal.add_scores(3, batch([0]))
    for run, weights, every, found in (
        ("run", "old weights", False, True),
        ("run", "new weights", False, False),
        ("run", "new weights", True, True),  # checkpoint.replay: all
        ("other run", "old weights", True, False),
    ):
        again = opened(tmp_path, 0, run, every)
        again.published(4, weights)
        assert (again.group(3, PROMPTS[0], decode) is not None) == found
        # Scores are cheap to have again, and of no other weights' rollouts.
        assert (again.scores(3, batch([0]).rollouts) is not None) == (found and weights == "old weights")


def test_a_group_that_older_weights_began_is_believed_only_where_any_weights_are(tmp_path: Path) -> None:
    one = group(2)
    longest = max(one.rollouts, key=lambda rollout: len(rollout.tokens))
    longest.segments = Segment(1, 3), Segment(len(longest.tokens) - 1, 4)
    opened(tmp_path, 0, "run").add_group(3, one)
    assert opened(tmp_path, 0, "run").group(3, PROMPTS[2], decode) is None
    found = opened(tmp_path, 0, "run", any_weights=True).group(3, PROMPTS[2], decode)
    assert found is not None and facts(found[0]) == facts(one)
    longest.segments = (Segment(len(longest.tokens), 4),)
    opened(tmp_path, 0, "run").add_group(3, one)
    now = opened(tmp_path, 0, "run")
    assert now.group(3, PROMPTS[2], decode) is not None
    now.published(5, "")
    assert now.group(3, PROMPTS[2], decode) is None


def other_tokens(one: Group) -> Group:
    """The responses of other weights, as long as these."""
    for rollout in one.rollouts:
        rollout.tokens = rollout.tokens + 1
        rollout.text = decode(rollout.tokens)
    return one


def test_verdicts_belong_to_the_responses_that_were_graded_and_scores_to_those_that_were_scored(tmp_path: Path) -> None:
    def of_weights(rank: int, weights: str) -> Journal:
        journal = opened(tmp_path, rank, "run")
        journal.published(4, weights)
        return journal

    before = of_weights(0, "W1")
    before.add_group(3, group(0))
    before.add_verdicts(3, [group(0)])
    of_weights(1, "W2").add_group(3, other_tokens(group(0)))  # sampled anew, and killed before it was graded
    found = of_weights(0, "W2").group(3, PROMPTS[0], decode)
    assert found is not None
    assert (facts(found[0]), found[1]) == (facts(other_tokens(group(0))), False)
    assert {r.verdict.outcome for r in found[0].rollouts} == {"invalid"}
    found = of_weights(0, "W1").group(3, PROMPTS[0], decode)
    assert found is not None and (facts(found[0]), found[1]) == (facts(group(0)), True)

    of_weights(0, "W2").add_scores(3, batch([0]))
    assert of_weights(0, "W2").scores(3, batch([0]).rollouts) is not None
    assert of_weights(0, "W2").scores(3, other_tokens(group(0)).rollouts) is None


@pytest.mark.parametrize("ranks", [(0, 1), (1, 0)])
def test_what_these_weights_sampled_is_found_whichever_file_holds_what_others_did(
    tmp_path: Path, ranks: tuple[int, int]
) -> None:
    for rank, weights in zip(ranks, ("W1", "W2"), strict=True):
        journal = opened(tmp_path, rank, "run", any_weights=True)
        journal.published(4, weights)
        one = group(0) if weights == "W1" else other_tokens(group(0))
        journal.add_group(3, one)
        journal.add_verdicts(3, [one])
    for weights, wanted in (("W1", group(0)), ("W2", other_tokens(group(0)))):
        journal = opened(tmp_path, 0, "run", any_weights=True)
        journal.published(4, weights)
        found = journal.group(3, PROMPTS[0], decode)
        assert found is not None and (facts(found[0]), found[1]) == (facts(wanted), True)


def test_a_journal_that_cannot_be_written_ends_the_run_with_the_name_of_its_file(tmp_path: Path) -> None:
    (tmp_path / "journal").write_text("")  # no folder
    with pytest.raises(RunFailed, match=r"journal/step-00003.rank-0: cannot write it: "):
        opened(tmp_path / "journal", 0, "run").add_group(3, group(0))


def test_a_group_whose_grading_failed_is_graded_again(tmp_path: Path) -> None:
    one = group(2)
    one.rollouts[1].verdict = Verdict("invalid", "grader exceeded 1.0 s")
    journal = opened(tmp_path, 0, "run")
    journal.add_group(3, one)
    journal.add_verdicts(3, [one])
    again = opened(tmp_path, 0, "run")
    found = again.group(3, PROMPTS[2], decode)
    assert found is not None
    assert not found[1]
    again.add_verdicts(3, [group(2)])  # this time with a verdict: it counts
    found = opened(tmp_path, 0, "run").group(3, PROMPTS[2], decode)
    assert found is not None
    assert found[1]
    assert verdicts(found[0]) == verdicts(group(2))


def test_a_file_cut_or_damaged_anywhere_loses_groups_and_never_gives_a_wrong_one(tmp_path: Path) -> None:
    journal = opened(tmp_path, 0, "run")
    for number in range(4):
        journal.add_group(3, group(number))
    path = tmp_path / "step-00003.rank-0"
    whole = path.read_bytes()
    ends = [frame.offset + frame.header["bytes"] for frame in read_frames(path)]
    rng = random.Random(0)
    for trial in range(300):
        data = bytearray(whole)
        place = rng.randrange(len(data))
        if trial % 2:
            data[place] ^= 1 << rng.randrange(8)
        else:
            del data[place:]
        path.write_bytes(data)
        found = opened(tmp_path, 0, "run")
        for number in range(4):
            one = found.group(3, PROMPTS[number], decode)
            assert one is None or facts(one[0]) == facts(group(number)), (trial, number)
            if ends[number] <= place:
                assert one is not None, (trial, number)


def test_what_is_written_behind_a_torn_frame_is_found_once_that_was_cut_off(tmp_path: Path) -> None:
    journal = opened(tmp_path, 0, "run")
    for number in range(3):
        journal.add_group(3, group(number))
    path = tmp_path / "step-00003.rank-0"
    path.write_bytes(path.read_bytes()[:-5])
    opened(tmp_path, 0, "run").add_group(3, group(4))
    found = opened(tmp_path, 0, "run")
    assert [n for n in range(6) if found.group(3, PROMPTS[n], decode) is not None] == [0, 1, 4]


def batch(numbers: list[int], replay: bool = True) -> Batch:
    rollouts = [rollout for number in numbers for rollout in group(number).rollouts]
    lengths = torch.tensor([len(r.tokens) for r in rollouts])
    values = torch.from_numpy(np.concatenate([r.logprobs for r in rollouts]))
    empty: Any = None
    return Batch(
        rollouts,
        empty,
        empty,
        1,
        empty,
        empty,
        empty,
        lengths,
        empty,
        values,
        old_logprobs=values * 1.5,
        entropy=-values,
        rerouted=None if not replay else torch.tensor([7 * n + r.sample for n in numbers for r in group(n).rollouts]),
    )


def test_scores_come_back_bit_for_bit_for_any_selection_of_rollouts_and_only_if_none_is_missing(tmp_path: Path) -> None:
    opened(tmp_path, 0, "run").add_scores(3, batch([0, 2]))
    opened(tmp_path, 1, "run").add_scores(3, batch([1]))
    found = opened(tmp_path, 5, "run")
    for numbers in ([0, 2], [1], [2, 1, 0]):  # as they were, and as another layout deals them out
        wanted = batch(numbers)
        scores = found.scores(3, wanted.rollouts)
        assert scores is not None
        (old, entropy), rerouted = scores
        assert torch.equal(torch.from_numpy(old), wanted.old_logprobs)
        assert torch.equal(torch.from_numpy(entropy), wanted.entropy)
        assert rerouted == wanted.rerouted.tolist()
    assert found.scores(3, batch([0, 3]).rollouts) is None
    assert found.scores(4, batch([0]).rollouts) is None
    opened(tmp_path, 2, "run").add_scores(3, batch([4], replay=False))
    scores = opened(tmp_path, 5, "run").scores(3, batch([4]).rollouts)
    assert scores is not None and scores[1] is None
    path = tmp_path / "step-00003.rank-1"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    assert opened(tmp_path, 0, "run").scores(3, batch([1]).rollouts) is None


def test_only_steps_before_the_oldest_kept_checkpoint_are_forgotten_of_all_ranks(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        for rank in range(2):
            opened(tmp_path, rank, "run").add_group(step, group(0, step))
    opened(tmp_path, 0, "run").forget(before=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"step-{step:05d}.rank-{rank}" for step in (2, 3) for rank in (0, 1)
    ]


def test_scores_are_of_the_tokens_that_were_trained_on(tmp_path: Path) -> None:
    scored = batch([2])
    opened(tmp_path, 0, "run").add_scores(3, scored)
    found = opened(tmp_path, 0, "run")
    assert found.scores(3, scored.rollouts) is not None
    longest = max(scored.rollouts, key=lambda rollout: len(rollout.tokens))
    longest.segments = (Segment(len(longest.tokens), 4),)  # what has no score is asked for now
    assert found.scores(3, scored.rollouts) is None


@pytest.mark.parametrize(("form", "whose"), [(None, "an earlier version (journal format 1)"), (3, "a later version")])
def test_a_journal_of_another_version_is_refused_by_its_name_with_what_to_do(
    tmp_path: Path, form: int | None, whose: str
) -> None:
    path = tmp_path / "step-00003.rank-0"
    samples = [[0, 7, 3, "stop", 4, 2]]  # as format 1 had it: the weight version, the number of tokens
    header = {"kind": "group", "prompt": 0, "of": "run ", "asked": "", "samples": samples, "routes": []}
    payload = bytes(2 * 12)
    header |= {"bytes": len(payload), "blake3": blake3(payload).hexdigest()} | ({"format": form} if form else {})
    text = json.dumps(header).encode()
    path.write_bytes(blake3(text).hexdigest().encode() + b" " + text + b"\n" + payload)
    before = path.read_bytes()
    for read in (check_format, lambda folder: opened(folder, 1, "run")):
        with pytest.raises(RequestError) as refused:
            read(tmp_path)
        assert str(refused.value).startswith(f"{path}: it was written by {whose}")
        for words in ("reads format 2", "provenance.json", "choose another --run-dir"):
            assert words in str(refused.value)
    assert path.read_bytes() == before


@pytest.mark.parametrize("junk", [b"\x00" * 100, b"{}\n", b"abc {}\n", b"\n\n", "ü".encode() * 50 + b"\n"])
def test_a_file_that_holds_something_else_holds_nothing(tmp_path: Path, junk: bytes) -> None:
    (tmp_path / "step-00003.rank-0").write_bytes(junk)
    assert opened(tmp_path, 0, "run").group(3, PROMPTS[0], decode) is None
    assert (tmp_path / "step-00003.rank-0").read_bytes() == b""


class _Met:
    """A rank of a world whose ranks come one after the other: `agree` tells the first that it lacks the rest."""

    def __init__(self, rank: int, said: list[dict[str, Any]]) -> None:
        self.rank, self.world, self._said = rank, len(said), said

    def agree(self, tag: str, value: Any, op: Any) -> Any:
        self._said[self.rank][tag] = json.loads(json.dumps(value))
        if any(tag not in said for said in self._said):
            raise _Waits
        return op([said[tag] for said in self._said])


class _Waits(Exception):
    pass


def found_by_all(folder: Path, world: int, first_step: int = 0) -> list[Any]:
    """What `find` gives, or raises, on every rank."""
    said: list[dict[str, Any]] = [{} for _ in range(world)]
    results: list[Any] = [_Waits()] * world
    while any(isinstance(result, _Waits) for result in results):
        for rank in range(world):
            try:
                results[rank] = find(folder, _Met(rank, said), first_step)
            except (_Waits, RequestError, RunFailed) as error:
                results[rank] = error
    return results


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_rank_of_any_world_finds_all_that_ranks_of_another_wrote(tmp_path: Path, world: int) -> None:
    for number in range(6):
        journal = opened(tmp_path, number % 3, "run")
        journal.add_group(3 + number % 2, group(number, 3 + number % 2))
        journal.add_verdicts(3 + number % 2, [group(number)])
        journal.add_scores(3 + number % 2, batch([number]))
    with (tmp_path / "step-00003.rank-1").open("ab") as file:
        file.write(b"a torn frame")
    for found in found_by_all(tmp_path, world):
        journal = Journal(tmp_path, 0, "run", found, AtOnce())
        journal.published(4, "")
        for number in range(6):
            here = journal.group(3 + number % 2, PROMPTS[number], decode)
            assert here is not None and here[1] and facts(here[0]) == facts(group(number, 3 + number % 2))
            assert journal.scores(3 + number % 2, batch([number]).rollouts) is not None
            assert journal.group(4 - number % 2, PROMPTS[number], decode) is None
    assert not (tmp_path / "step-00003.rank-1").read_bytes().endswith(b"torn frame")
    for found in found_by_all(tmp_path, world, first_step=4):  # of steps that are done nothing is read
        assert not list(found.frames(3, "group", 0)) and list(found.frames(4, "group", 1))


def test_what_one_rank_cannot_read_ends_the_start_of_all_with_its_name(tmp_path: Path) -> None:
    for rank in range(3):
        opened(tmp_path, rank, "run").add_group(3, group(rank))
    text = json.dumps({"kind": "group", "format": 1, "bytes": 0}).encode()
    path = tmp_path / "step-00003.rank-1"
    path.write_bytes(blake3(text).hexdigest().encode() + b" " + text + b"\n")
    for said in found_by_all(tmp_path, 3):
        assert isinstance(said, RequestError) and str(said).startswith(f"{path}: it was written by an earlier version")
    path.unlink()
    path.mkdir()
    for said in found_by_all(tmp_path, 3):
        assert isinstance(said, RunFailed) and str(said) == f"{path}: cannot read it: Is a directory"


def test_what_this_start_adds_to_a_file_is_not_taken_for_what_was_there(tmp_path: Path) -> None:
    opened(tmp_path, 0, "run").add_group(3, group(0))
    now = opened(tmp_path, 0, "run")
    now.add_group(3, other_tokens(group(0)))
    found = now.group(3, PROMPTS[0], decode)
    assert found is not None and facts(found[0]) == facts(group(0))
    assert len(list(find(tmp_path, Alone(), 0).frames(3, "group", 0))) == 2
