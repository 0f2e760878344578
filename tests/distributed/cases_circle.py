"""The circle on real ranks: real Megatron shards, real vLLM engines, publish between them (tests/test_circle.py)."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from a3po_megatron.batch import Batch, Verdict
from a3po_megatron.config import Config, load_config
from a3po_megatron.data.order import named_seed
from a3po_megatron.errors import PublishError, RunFailed
from a3po_megatron.learner.learner import Learner
from a3po_megatron.learner.micro_batch import micro_batch
from a3po_megatron.model import cut
from a3po_megatron.parts import Parts, build
from a3po_megatron.reward.math import grade
from a3po_megatron.rollout.engine import Completion, Request, in_order
from a3po_megatron.rollout.vllm_engine import VllmEngine
from a3po_megatron.run.stop import Interrupt
from a3po_megatron.train import train
from a3po_megatron.weights import publish, witness
from tests.harness.ranks import ROOT, CaseRanks
from tests.harness.taking import take
from tests.harness.tiny_models import make_checkpoint, resolved, save_tokenizer

EXAMPLE = ROOT / "configs/arithmetic.yaml"
FEW = "trainer.prompts_per_step=8"  # of 32, of which nothing here has need
# Two mini-batches a step. A coin grades: every step has groups with spread, whatever the model says.
UNSEEN = ("publish.witness_at_start=false", "publish.canary_tokens=4")  # what the weights are is others' subject
SHORT = ("trainer.prompts_per_step=4", "rollout.max_tokens=8", *UNSEEN)
BRIEF = (*SHORT, "rollout.max_tokens=32")  # some responses end, others are cut off
# Dropping a part of a fused tensor would leave that part uninitialised, and NaN in the engine's cache for good.
STALE, DROPPED = "model.layers.1.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight"


class InProcess:
    """Grades here and now with a plain function: what is graded how is not these cases' subject."""

    def __init__(self, grader: Callable[[str, str], Verdict]) -> None:
        self.grader = grader

    def submit(self, items: Sequence[Any]) -> Future[list[Verdict]]:
        future: Future[list[Verdict]] = Future()
        future.set_result([self.grader(response, answer) for response, answer, *_ in items])
        return future


class Forgetful(VllmEngine):
    """An engine that does not take up one of the tensors it is fed: what only the canary can see."""

    forgets: str | None = None

    def _with_head(self, stream: Any) -> Iterator[tuple[str, Tensor]]:
        return (item for item in super()._with_head(stream) if item[0] != self.forgets)


# vLLM makes the groups of an engine with the first one of a process, experts' too: experts come first, and engines over
# one rank and over two have processes of their own.
NARROW = (
    ("qwen3_moe", ["parallel.context=2", "parallel.expert=2"]),
    ("llama31", ["parallel.pipeline=2"]),
    ("qwen3", ["parallel.pipeline=2", "parallel.virtual=2"]),
    ("qwen2", ["parallel.tensor=2", "parallel.sequence=true"]),
)
WIDE = (
    ("qwen3_moe", ["parallel.data=2", "parallel.expert=2", "rollout.expert=2"]),
    ("qwen3_moe", ["parallel.pipeline=2", "rollout.expert=2"]),
    ("yarn_fractions", ["parallel.data=2"]),
)
# What the others imply: `make soak` runs them.
NARROW_IMPLIED = (
    ("qwen3_moe", ["parallel.data=2", "parallel.expert=2"]),
    ("qwen3_moe", ["parallel.pipeline=2"]),
)
WIDE_IMPLIED = (
    ("qwen3_moe", ["parallel.data=2"]),
    ("qwen3", ["parallel.pipeline=2"]),
)


def publishes_into_engines_of_one_rank(ranks: CaseRanks) -> dict[str, Any]:
    return _all_publish(ranks, NARROW)


def publishes_into_engines_of_two_ranks(ranks: CaseRanks) -> dict[str, Any]:
    return _all_publish(ranks, WIDE, "rollout.tensor=2")


def implied_publishes_into_engines_of_one_rank(ranks: CaseRanks) -> dict[str, Any]:
    return _all_publish(ranks, NARROW_IMPLIED)


def implied_publishes_into_engines_of_two_ranks(ranks: CaseRanks) -> dict[str, Any]:
    return _all_publish(ranks, WIDE_IMPLIED, "rollout.tensor=2")


def _all_publish(ranks: CaseRanks, layouts: Sequence[tuple[str, list[str]]], *more: str) -> dict[str, Any]:
    return {" ".join([kind, *layout]): _publishes(ranks, kind, [*layout, *more]) for kind, layout in layouts}


def _publishes(ranks: CaseRanks, kind: str, options: list[str]) -> dict[str, Any]:
    """Three publishes in a row, with other weights each time: canaries, and bytes that came from the other rank."""
    folder = ranks.folder / kind
    if ranks.rank == 0 and not folder.exists():
        # 48 and 24 are no sizes that vLLM's CPU kernel for experts takes.
        wide = {"hidden_size": 128, "moe_intermediate_size": 64} if kind == "qwen3_moe" else {}
        make_checkpoint(folder, kind, num_hidden_layers=4, **wide)
    torch.distributed.barrier()
    made = parts(ranks, 1, 1, *options, f"model.path={folder}", "rollout.max_tokens=16")
    engine, learner, prompts = made.engine, made.learner, made.prompts
    found: dict[str, Any] = {"canary": [], "received": 0, "bytes": 0}
    for _ in range(3):
        receipt = made.publish()
        found["canary"].append(receipt.canary)
        found["received"], found["bytes"] = receipt.received_bytes, receipt.bytes
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.mul_(1.05)
    requests = [Request(prompt.tokens, seed) for seed, prompt in enumerate(take(prompts, 4))]
    found["tokens"] = [completion.tokens.tolist() for completion in in_order(engine.sample(requests))]
    return found


def parts(
    ranks: CaseRanks,
    tensor: int,
    data: int,
    *overrides: str,
    engine_of: type[VllmEngine] = Forgetful,
    **backend: Any,
) -> Parts:
    """A run's parts; `backend`: where its record is to differ from the CPU's."""
    options = [f"parallel.tensor={tensor}", f"parallel.data={data}", "publish.canary_tokens=8", *overrides]
    return built(ranks, f"run-{tensor}-{data}", options, InProcess(grade), engine_of=engine_of, backend=backend)


def built(
    ranks: CaseRanks,
    name: str,
    options: Sequence[str],
    graders: InProcess,
    backend: dict[str, Any] | None = None,
    **of: Any,
) -> Parts:
    """The parts of a run in a folder of this name."""
    config = resolved(load_config(EXAMPLE, list(options)))
    cluster = ranks.arrange(**config.parallel.model_dump(), engine_ranks=config.rollout.tensor)
    cluster.backend = dataclasses.replace(cluster.backend, **backend or {})
    folder = ranks.folder / name
    os.makedirs(folder / "rollouts", exist_ok=True)
    return build(folder, config, cluster, graders, interrupt=Interrupt(), **of)


def publish_faults(ranks: CaseRanks) -> dict[str, Any]:
    """What each fault between learner and engine is reported as; tensor parallel 2."""
    made = parts(ranks, tensor=2, data=1)
    engine, learner = made.engine, made.learner
    whole = publish.gather
    found: dict[str, Any] = {}

    def attempt(name: str, damage: Callable[[str, Tensor], Tensor | None] | None) -> None:
        def damaged(*args: Any) -> Iterator[list[tuple[str, Tensor]]]:
            for part in whole(*args):
                changed = [(name, damage(name, tensor) if damage else tensor) for name, tensor in part]
                yield [(name, tensor) for name, tensor in changed if tensor is not None]

        publish.gather = damaged
        try:
            receipt = made.publish()
            found[name] = f"ok, version {receipt.version}, {receipt.strength}, canary {receipt.canary:.1e}"
            assert receipt.canary is not None
            assert receipt.canary < 1e-4
        except PublishError as error:
            found[name] = str(error)
        finally:
            publish.gather = whole

    attempt("sound", None)
    before = {name: tensor.clone() for part in whole(*_gather_arguments(made)) for name, tensor in part}

    def flipped(name: str, tensor: Tensor) -> Tensor:
        if name == STALE:
            tensor = tensor.clone()
            tensor.view(torch.int32)[3, 5] ^= 1  # the last bit of one mantissa
        return tensor

    def swapped(name: str, tensor: Tensor) -> Tensor:
        return tensor[[1, 0, *range(2, len(tensor))]] if name == STALE else tensor

    def misshapen(name: str, tensor: Tensor) -> Tensor:
        return tensor[:-1] if name == STALE else tensor

    def not_a_number(name: str, tensor: Tensor) -> Tensor:
        return tensor * float("nan") if name == STALE else tensor

    attempt("flipped bit", flipped)
    attempt("swapped rows", swapped)
    attempt("misshapen", misshapen)
    attempt("other dtype", lambda name, tensor: tensor.bfloat16() if name == STALE else tensor)
    attempt("not a number", not_a_number)
    with torch.no_grad():
        for parameter in learner.parameters().values():
            parameter.add_(0.01 * torch.ones_like(parameter))
    attempt("stale", lambda name, tensor: before[name] if name == STALE else tensor)
    attempt("sound again", None)
    for forgotten in (DROPPED, "lm_head.weight"):
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.mul_(1.05)
        engine.forgets = forgotten
        attempt(f"engine forgets {forgotten}", None)
    engine.forgets = None
    attempt("sound at last", None)
    # Only the end of a stream shows it, with vLLM in the middle of a reload: of no use afterwards.
    attempt("missing", lambda name, tensor: None if name == STALE else tensor)
    return found


def witness_faults(ranks: CaseRanks) -> dict[str, str]:
    """What transformers says of a sound learner, and of one whose map of tensors is wrong in every room alike."""
    found = {}
    whole = cut._cut_block
    for name in ("sound", "gate and up swapped"):

        def swapped(*args: Any) -> Iterator[cut.Piece]:
            for piece in whole(*args):
                split = piece.tensor.endswith(("gate_proj.weight", "up_proj.weight"))
                half = piece.length if split and isinstance(args[1], cut.LearnerRank) else 0
                yield dataclasses.replace(piece, offset=half - piece.offset) if half else piece

        cut._cut_block = whole if name == "sound" else swapped
        try:
            made = parts(ranks, 2, 1, "publish.canary_bound=1e9")
            learner = made.learner
            made.publish()  # at this bound neither canary nor witness refuses
            if name == "sound":
                found["no room"] = _publish_without_room(made)
            publisher = made.publish.publisher
            publisher.options = publisher.options.model_copy(update={"witness_bound": 1e-4})
            folder, scratch = Path(made.settings.model.path), ranks.folder / "witness"
            try:
                worst = publisher.witness(learner.parameters(), torch.float32, folder, scratch)
                found[name] = f"agree to {worst:.1e}" if worst < 1e-4 else f"differ by {worst}"
            except PublishError as error:
                found[name] = str(error)
            assert not scratch.exists()
        finally:
            cut._cut_block = whole
    return found


def _publish_without_room(made: Parts) -> str:
    """What a start says on a host that cannot hold the model once more."""
    said: list[str] = []
    made.publish._first = True
    with mock.patch.object(witness, "available_bytes", return_value=1000):
        if made.ranks.rank == 0:
            with mock.patch.object(made.recorder._progress, "say", said.append):
                receipt = made.publish()
        else:
            receipt = made.publish()
    assert receipt.witness is None
    return "".join(said)


def _gather_arguments(made: Parts) -> tuple[Any, ...]:
    return made.publish.publisher.plan, made.learner.parameters(), made.publish.publisher.groups, torch.float32


class Slow:
    """An engine whose steps take longer."""

    def __init__(self, engine: VllmEngine) -> None:
        self._engine, self.weight_version = engine, engine.weight_version

    def sample(self, *arguments: Any, **options: Any) -> Iterator[list[tuple[int, Completion]]]:
        with contextlib.closing(self._engine.sample(*arguments, **options)) as steps:
            for done in steps:
                time.sleep(0.05)
                yield done


def one_slow_engine(ranks: CaseRanks) -> dict[str, Any]:
    """As below, with an engine on rank 1 that is slow."""
    return one_step_of_rollouts(ranks, slow=1)


def one_step_of_rollouts(ranks: CaseRanks, slow: int | None = None) -> dict[str, Any]:
    """Tokens of one step's rollouts by name; with one rank also in another order, again, and one by one."""
    options = ["parallel.tensor=1", f"parallel.data={ranks.world}", FEW, *UNSEEN]
    made = built(ranks, f"sampled-{slow}", options, InProcess(grade), engine_of=Forgetful)
    engine = made.engine
    made.publish()
    if ranks.rank == slow:
        made.intake.sampler.engine = Slow(engine)  # type: ignore[assignment]
    collected = made.intake.next(0)
    rollouts = [r for group in collected.sampled for r in group.rollouts]
    result = {
        "tokens": {r.name: r.tokens.tolist() for r in rollouts},
        "logprobs": {r.name: r.logprobs.tolist() for r in rollouts},
        "accepted": collected.accepted,
        "metrics": {name: value for name, value in collected.metrics.items() if "idle" not in name},  # seconds
        "surplus": made.intake.state()["surplus"],
        "finish": sorted({r.finish for r in rollouts}),
    }
    if ranks.world == 1:
        requests = [Request(r.prompt.tokens, r.seed) for r in rollouts]
        backwards = in_order(engine.sample(requests[::-1]))[::-1]
        alone = [in_order(engine.sample([request]))[0] for request in requests[:8]]
        for other in (backwards, alone):
            for rollout, completion in zip(rollouts, other, strict=False):
                assert rollout.tokens.tolist() == completion.tokens.tolist(), rollout.name
    return result


def logprobs_are_of_the_sampling_distribution(ranks: CaseRanks) -> float:
    """Largest difference of kept log-probs from the learner's, at a temperature that is not 1."""
    made = parts(ranks, 1, ranks.world, "rollout.temperature=0.7")
    engine, learner, prompts = made.engine, made.learner, made.prompts
    made.publish()
    asked = take(prompts, 16)
    completions = in_order(engine.sample([Request(prompt.tokens, seed) for seed, prompt in enumerate(asked)]))
    worst = 0.0
    for prompt, completion in zip(asked, completions, strict=True):
        packed = micro_batch([(prompt.tokens, completion.tokens.tolist())], [0])
        ours = learner.pipeline.forward([packed], 0.7, with_entropy=False)[0]
        worst = max(worst, float((ours - torch.from_numpy(completion.logprobs)).abs().max()))
    return worst


def layouts_train_alike(ranks: CaseRanks) -> dict[str, Any]:
    """Two steps of the whole loop for every dense layout of two ranks: what they wrote down."""
    rows = {}
    for tensor, data, pipeline, context in ((2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)):
        layout = [f"parallel.tensor={tensor}", f"parallel.data={data}", f"parallel.pipeline={pipeline}"]
        layout.append(f"parallel.context={context}")
        name = f"loop-{tensor}-{data}-{pipeline}-{context}"
        train(built(ranks, name, [*layout, "trainer.steps=2", *BRIEF], InProcess(coin)))
        metrics = ranks.folder / name / "metrics.jsonl"
        if ranks.rank == 0:
            rows[f"{tensor}x{data}x{pipeline}x{context}"] = [
                json.loads(line) for line in metrics.read_text().splitlines()
            ]
    return rows


def run_with(ranks: CaseRanks, name: str, learner: type[Learner], grader: Any, *options: str) -> tuple[str, Path]:
    """The whole loop with another learner in it: what the run died of, and its folder."""
    folder = ranks.folder / name
    try:
        train(built(ranks, name, options, InProcess(grader), learner_of=learner))
        return "it ended", folder
    except RunFailed as error:
        return f"{error} (exit {error.exit_code})", folder


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Patterned(Learner):
    """A learner whose gradient is not finite on rank 1 in the updates that are B; the last letter holds on."""

    pattern = "B"
    calls = 0

    def _accumulate(self, *args: Any) -> Any:
        found = super()._accumulate(*args)
        letter = self.pattern[min(self.calls, len(self.pattern) - 1)]
        self.calls += 1
        if self.ranks.rank == 1 and letter == "B":
            next(iter(self.parameters().values())).main_grad.view(-1)[0] = float("inf")
        return found


def never_finite(ranks: CaseRanks) -> dict[str, Any]:
    """A run whose gradients are not finite on one rank: what it says, and what it leaves."""
    options = ("parallel.tensor=2", "trainer.steps=4", "trainer.max_rejected_updates=3", *SHORT)
    said, folder = run_with(ranks, "never-finite", Patterned, coin, *options)
    kept = {}
    for path in sorted((folder / "rejected").iterdir()):
        entries = torch.load(path)
        kept[path.name] = [len(entries), sum(len(entry["tokens"]) == len(entry["old_logprobs"]) for entry in entries)]
    return {"said": said, "kept": kept, "rejected": [row["policy/rejected_updates"] for row in rows_of(folder)]}


def rejected_in_a_row(ranks: CaseRanks) -> dict[str, Any]:
    """Patterns of sound (g) and broken (B) updates under a limit: what the run says, and its steps' counts."""
    found = {}
    for limit, pattern in ((2, "BggBgBgBBg"), (1, "gBg")):
        learner = type("Patterned", (Patterned,), {"pattern": pattern})
        options = ("parallel.tensor=2", "trainer.steps=5", f"trainer.max_rejected_updates={limit}", *SHORT)
        said, folder = run_with(ranks, f"in-a-row-{limit}", learner, coin, *options)
        found[f"{limit} {pattern}"] = {
            "said": said,
            "rejected": [row["policy/rejected_updates"] for row in rows_of(folder)],
            "kept": sorted(path.name.partition(".rank")[0] for path in (folder / "rejected").iterdir()),
        }
    return found


def score_never_finite(ranks: CaseRanks) -> dict[str, Any]:
    """A run of two replicas, in whose second step one rank's scores hold one NaN: what it says and leaves."""
    made: list[Any] = []

    class Blind(Learner):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)
            self.scored = self.steps = 0

        def score(self, batch: Batch) -> Batch:
            batch = super().score(batch)
            assert batch.old_logprobs is not None
            if self.scored == 1:
                if self.ranks.rank == 1:
                    batch.old_logprobs[3] = float("nan")
                self.batch, self.steps = batch, 0
                self.before = [p.detach().clone() for p in self.parameters().values()]
            self.scored += 1
            return batch

        def _step(self, number: int) -> float:
            self.steps += 1
            return super()._step(number)

    options = ("parallel.tensor=1", "parallel.data=2", "trainer.steps=3", *SHORT)
    said, folder = run_with(ranks, "score-never-finite", Blind, coin, *options)
    (learner,) = made
    entries = [
        (number, entry)
        for number in range(learner.batch.mini_batches)
        for entry in torch.load(folder / "rejected" / f"step-00001.mini-batch-{number}.rank-{ranks.rank}.pt")
    ]
    kept = torch.cat([torch.zeros(0), *(entry["old_logprobs"] for _, entry in entries)])
    return {
        "said": said,
        "files": sorted(path.name for path in (folder / "rejected").iterdir()),
        "kept": [[number, entry["name"], entry["tokens"]] for number, entry in entries],
        "batch": [
            [number, r.name, r.tokens.tolist()]
            for number, r in zip(learner.batch.mini_batch.tolist(), learner.batch.rollouts, strict=True)
        ],
        "bits": torch.equal(kept.view(torch.int32), learner.batch.old_logprobs.view(torch.int32)),
        "nan": torch.nonzero(kept.isnan())[:, 0].tolist(),
        "steps": learner.steps,
        "moved": not all(torch.equal(a, b) for a, b in zip(learner.before, learner.parameters().values(), strict=True)),
        "rows": [row["step"] for row in rows_of(folder)],
    }


def gsm8k_through_the_loop(ranks: CaseRanks) -> dict[str, Any]:
    """Real text, a byte-pair tokenizer and random weights: one step with the real grader, one with spread."""
    data = Path(os.environ["A3PO_TEST_DATA"])
    model, rows = ranks.folder / "bpe-model", ranks.folder / "gsm8k_train.jsonl"
    if ranks.rank == 0:
        with (data / "gsm8k_train.jsonl").open() as file:  # to tokenize all of them takes seconds
            rows.write_text("".join(itertools.islice(file, 500)))
        vocab = 2020
        make_checkpoint(model, "qwen3", vocab_size=vocab, max_position_embeddings=1024)
        save_tokenizer(model, vocab)
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_text((data / "model_configs" / f"tiny_bpe_{name}").read_text())
    torch.distributed.barrier()
    values = {
        "model": {"path": str(model)},
        "data": {"path": str(rows), "template": "qwen", "drop_long_prompts": True},
        "parallel": {"tensor": 2},
        "rollout": {"max_prompt_tokens": 400, "max_tokens": 24, "max_batches": 2},
        "trainer": {
            "steps": 1,
            "prompts_per_step": 4,
            "rollouts_per_prompt": 4,
            "mini_batches": 2,
            "max_empty_steps": 1,
        },
    }
    config = resolved(Config.model_validate(values))
    result: dict[str, Any] = {}
    for name, grader in (("real", grade), ("spread", coin)):
        folder = ranks.folder / f"gsm8k-{name}"
        os.makedirs(folder / "rollouts", exist_ok=True)
        try:
            train(build(folder, config, ranks.arrange(2), InProcess(grader), interrupt=Interrupt()))
            result[name] = (folder / "metrics.jsonl").read_text()
        except RunFailed as error:
            result[name] = str(error)
    return result


def coin(response: str, answer: str) -> Verdict:
    """A verdict drawn from the text: spread without any ability."""
    return Verdict("correct" if named_seed(response, answer) % 2 else "wrong")
