"""The hand-over learner → engine, and its proof.

    plan agreed → stream (names, shapes, dtypes, finite, complete: checked before the engine sees a tensor) → engine
    → checksums of the shards against those of what the engine got → canary: log-probs of learner and engine

Anything unequal is a PublishError that names the tensor, raised on every rank: nothing is sampled from weights that
were not proven. Which fault each net catches: a tensor altered, moved, stale or missing on its way to the engine fails
its checksum or the stream's check, by name; a tensor that the engine itself failed to take up fails the checksum of the
engine's own tensors where they can be read back (strength `engine`; `requantised`: of FP8 their codes, not the scales,
whose layout is the kernel's), else it shows in the canary.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3
from torch import Tensor

from ..config import PublishSettings
from ..data.order import named_seed
from ..errors import PublishError, RunFailed
from ..model.cut import HfTensor, Piece, pieces, tensors
from ..model.facts import ModelFacts
from ..model.layout import Layout
from ..ranks.agree import first, same
from ..ranks.groups import Ranks
from ..rollout.engine import Engine, Request
from ..run.journal import Journal
from ..telemetry.catalogue import Phase
from ..telemetry.clock import phase
from .export import export_stream
from .fuse import FusedExperts
from .load import finite
from .receipt import Receipt, shard_checksums, tensor_sum, wrap
from .route import plan
from .transfer import Groups, Parameters, Timings, fresh, gather, kept_in
from .witness import Scored, lacks_room, largest_difference

Sequences = Sequence[tuple[Sequence[int], Sequence[int]]]
# (prompt and response tokens of each, their routes or None) → log-probs of each response
Logprobs = Callable[[Sequences, Sequence[np.ndarray] | None], list[Tensor]]
MEAN_SHARE = 1 / 20


class Published(Protocol):
    """Whose weights are published: the learner."""

    def parameters(self) -> Parameters: ...

    def logprobs(self, sequences: Sequences, routes: Sequence[np.ndarray] | None = None) -> list[Tensor]: ...


class Publisher:
    """Publishes again and again between one learner layout and one engine; holds the plan and the weight version."""

    def __init__(
        self,
        ranks: Ranks,
        facts: ModelFacts,
        layout: Layout,
        options: PublishSettings,
        canary: Sequence[Sequence[int]],
        engine_experts: Callable[[int], tuple[int, int]] | None = None,  # of a global rank; None: all of them
        dtype: torch.dtype = torch.float32,  # of the engine's weights
    ) -> None:
        self.ranks, self.facts, self.options = ranks, facts, options
        self.canary = [Request(prompt, named_seed("canary", number)) for number, prompt in enumerate(canary)]
        self.version = 0
        self.scored: Scored = {}  # the last canary, as the learner scored it
        self._strength: str | None = None
        by_rank = [pieces(facts, layout, place) for place in layout.places()]
        self.rank = ranks.replica_group.rank()
        self.pieces = by_rank[self.rank]
        every = (0, facts.experts.count if facts.experts else 0)
        self.replica = dist.get_process_group_ranks(ranks.replica_group)
        experts = [engine_experts(rank) if engine_experts else every for rank in self.replica]
        self.tensors = tensors(facts)
        self.plan = plan(layout, by_rank, list(self.tensors), options.bucket_bytes, dtype.itemsize, experts)
        self.export_plan = self.plan  # whole models, for who writes them down
        if any(needed != every for needed in experts):
            whole = [every] * len(by_rank)
            self.export_plan = plan(layout, by_rank, list(self.tensors), options.bucket_bytes, dtype.itemsize, whole)
        # Both follow from the plan alone, and take a second where it is a large one.
        self.digest, self.received = self.plan.digest(), self.plan.received(self.rank)
        self.groups = Groups(
            stage=ranks.coordinates.pipeline,
            within=ranks.within,
            stages=ranks.pipeline_group,
            tensor=ranks.tensor_group,
            experts=ranks.expert_group,
        )

    def publish(
        self,
        parameters: Parameters,  # this rank's shard
        logprobs: Logprobs,  # the learner's, at temperature 1
        engine: Engine,
    ) -> Receipt:
        """Brings the shards into the engine; returns the receipt. Raises PublishError on every rank if unproven."""
        with phase(Phase.PUBLISH):
            start, timings = time.perf_counter(), Timings()
            self.ranks.agree("publish plan", [self.replica, self.digest], one_plan_a_replica)
            coming = {tensor.name: tensor for tensor in self.plan.tensors(self.rank)}
            if {tensor.name: tensor for tensor in self.export_plan.tensors(self.rank)} != self.tensors:
                raise RunFailed("the publish plan does not hold exactly the tensors of the model")
            expected = self._expected(parameters, engine.dtype)
            timings.receipt += time.perf_counter() - start
            got: dict[str, int] = {}
            inside: dict[str, int] = {}  # what the engine's own tensors should then amount to
            quantised = engine.quantised if engine.receipt_strength == "requantised" else None
            fused = FusedExperts(self.facts) if engine.fused_experts else None
            allocate = fused.allocate if fused else fresh
            stream = checked(
                gather(self.plan, parameters, self.groups, engine.dtype, allocate, timings),
                coming,
                engine.dtype,
                got,
                timings,
                quantised,
                inside,
            )
            # A fault in the first bucket shows before the engine begins: one that stops on its way is of no use.
            stream = itertools.chain(list(itertools.islice(stream, 1)), stream)
            loading = time.perf_counter()
            spent = timings.gather + timings.send + timings.receipt
            engine.load(fused.fuse(stream) if fused else stream)
            spent = timings.gather + timings.send + timings.receipt - spent
            timings.load = time.perf_counter() - loading - spent
            self._compare({name: expected[name] for name in coming}, got)
            if engine.receipt_strength != "stream":
                start_back = time.perf_counter()
                compare_back(self.ranks, engine, expected | inside, f"publish {self.version + 1}")
                timings.receipt += time.perf_counter() - start_back
            timings.resume = time.perf_counter()
            engine.forget()
            timings.resume = time.perf_counter() - timings.resume
            strength = self.ranks.agree("receipt strength", engine.receipt_strength, same)
            if self._strength not in (None, strength):
                raise PublishError(f"the receipt's strength changed from {self._strength} to {strength}")
            self._strength = strength
            self.version += 1
            engine.weight_version = self.version
            seconds = time.perf_counter() - start
            canary = self._canary(logprobs, engine) if self.canary else (None, None)
            return Receipt(
                version=self.version,
                weights=blake3(json.dumps([str(engine.dtype), expected]).encode()).hexdigest(),
                strength=strength,
                tensors=len(coming),
                bytes=sum(tensor.numel * kept_in(tensor, engine.dtype).itemsize for tensor in coming.values()),
                received_bytes=sum(
                    count * (getattr(torch, own) if own else engine.dtype).itemsize
                    for own, count in self.received.items()
                ),
                seconds=seconds,
                timings=timings,
                canary=canary[0],
                canary_mean=canary[1],
            )

    def export(self, parameters: Parameters, dtype: torch.dtype, source: Path, target: Path) -> None:
        """Writes the weights as an HF folder, on rank 0. A collective over all ranks."""
        if 0 in self.replica:
            stream = itertools.chain.from_iterable(gather(self.export_plan, parameters, self.groups, dtype))
            order = self.export_plan.tensors(self.rank)
            export_stream(stream, order, dtype, source, target if self.ranks.rank == 0 else None)
        self.ranks.agree("export", True, all)

    def lacks_room_for_witness(self, dtype: torch.dtype) -> str | None:
        """Why the witness cannot be asked, the same on all ranks; None: it can."""
        lacking = lacks_room(self.facts, dtype) if self.ranks.rank == 0 else None
        return self.ranks.agree("room for the witness", lacking, first)

    def witness(self, parameters: Parameters, dtype: torch.dtype, source: Path, scratch: Path) -> float:
        """Holds the learner against transformers on the last canary. Raises PublishError on every rank if they differ.

        Rank 0 holds the whole model while it is asked.
        """
        with phase(Phase.PUBLISH):
            self.export(parameters, dtype, source, scratch)
            worst = 0.0
            if self.ranks.rank == 0:
                try:
                    worst = largest_difference(scratch, self.scored, dtype)
                finally:
                    shutil.rmtree(scratch)
            worst, bound = self.ranks.agree("witness", worst, lambda values: values[0]), self.options.witness_bound
            if not worst <= bound:  # NaN too
                raise PublishError(
                    f"publish {self.version}: the learner and transformers, on an export of the learner's weights, "
                    f"differ by {worst:.2e} in a log-prob of the canary (bound {bound:.0e}): the learner's model is "
                    f"not the one that {source} describes"
                )
            return worst

    def _expected(self, parameters: Parameters, dtype: torch.dtype) -> dict[str, int]:
        names = list(self.tensors)
        sums = shard_checksums(self.pieces, parameters, dtype, names)
        if self.ranks.replica_group.size() > 1:
            dist.all_reduce(sums, group=self.ranks.replica_group)  # int64 sums wrap modulo 2^64, as they should
        return dict(zip(names, sums.tolist(), strict=True))

    def _compare(self, expected: dict[str, int], got: dict[str, int]) -> None:
        wrong = [name for name, value in expected.items() if got.get(name) != value]
        verdicts = self.ranks.agree("receipt", wrong, list)
        for rank, names in enumerate(verdicts):
            if names:
                raise PublishError(
                    f"publish {self.version + 1}: on rank {rank} the engine was fed other weights than the learner "
                    f"holds: {names[0]}" + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
                )

    def _canary(self, logprobs: Logprobs, engine: Engine) -> tuple[float, float]:
        """Every engine continues the same prompts; the learner says how likely it finds those very tokens. Returns the
        largest difference and the mean one, of the rank where it is worst."""
        bound = self.options.canary_bound
        completions = engine.probe(self.canary, self.options.canary_tokens)
        mine = [
            ((tuple(request.prompt), tuple(completion.tokens.tolist())), completion.routes)
            for request, completion in zip(self.canary, completions, strict=True)
        ]
        # Engines of one replica should have drawn the same tokens; where one did not, the learner scores its own too.
        asked = {_key(*one): one for part in self.ranks.gather_batch_group(mine) for one in part}
        routes = [r for _, r in asked.values() if r is not None] or None  # of all, or of none
        learner = dict(zip(asked, logprobs([pair for pair, _ in asked.values()], routes), strict=True))
        differences = [
            learner[_key(*one)] - torch.from_numpy(completion.logprobs)
            for one, completion in zip(mine, completions, strict=True)
        ]
        # The witness routes by itself: so must the learner, for it.
        pairs = list(dict.fromkeys(pair for pair, _ in asked.values()))
        self.scored = dict(zip(pairs, logprobs(pairs, None) if routes else learner.values(), strict=True))
        apart = torch.cat(differences).abs()
        apart_here = [float(apart.max()), float(apart.mean())]  # torch keeps a NaN, Python's max loses it
        by_rank = self.ranks.agree("canary", apart_here, list)
        for rank, (largest, mean) in enumerate(by_rank):
            if not (largest <= bound and mean <= bound * MEAN_SHARE):  # NaN too
                raise PublishError(
                    f"publish {self.version}: the engine of rank {rank} and the learner differ by {largest:.2e} in a "
                    f"log-prob of the canary (bound {bound:.0e}), by {mean:.2e} in the mean (bound "
                    f"{bound * MEAN_SHARE:.0e}): every tensor was sent, but the engine does not use these weights"
                )
        return max(largest for largest, _ in by_rank), max(mean for _, mean in by_rank)


def compare_back(ranks: Ranks, engine: Engine, expected: dict[str, int], what: str) -> None:
    """Holds the engine's own tensors against the checksums of what it was to take up. Collective.

    Raises PublishError on every rank, naming `what`, the rank and the tensor, where they are not equal.
    """
    names = list(expected)
    pieces, tensors = engine.holdings()
    whole = [piece for piece in pieces if piece.numel == math.prod(piece.shape)]
    cut = [piece for piece in pieces if piece.numel < math.prod(piece.shape)]
    names_of_whole = [piece.tensor for piece in whole]
    sums = torch.stack([shard_checksums(cut, tensors, None, names), _held(cut, names)])
    if ranks.engine_group is not None:
        dist.all_reduce(sums, group=ranks.engine_group)
    shapes = {piece.tensor: piece.shape for piece in cut}
    wanted = dict(expected)
    for name, held in zip(names, sums[1].tolist(), strict=True):
        if name in shapes:  # keys and values are there several times where an engine has more ranks than KV heads
            wanted[name] = wrap(expected[name] * (held // math.prod(shapes[name])))
    sums_here = dict(zip(names, sums[0].tolist(), strict=True))
    sums_here |= dict(zip(names_of_whole, shard_checksums(whole, tensors, None, names_of_whole).tolist(), strict=True))
    here = {piece.tensor for piece in pieces}
    wrong = [name for name in names if name in here and sums_here[name] != wanted[name]]
    for rank, missed in enumerate(ranks.agree("engine's tensors", wrong, list)):
        if missed:
            raise PublishError(
                f"{what}: the engine of rank {rank} was sent {missed[0]}, but does not hold it"
                + (f", nor {len(missed) - 1} more tensors" if len(missed) > 1 else "")
            )


def _held(pieces: Iterable[Piece], names: list[str]) -> Tensor:
    """How many elements of each tensor the pieces hold, [len(names)] int64."""
    held = dict.fromkeys(names, 0)
    for piece in pieces:
        held[piece.tensor] += piece.numel
    return torch.tensor(list(held.values()), dtype=torch.int64)


def _key(pair: tuple[tuple[int, ...], tuple[int, ...]], routes: np.ndarray | None) -> tuple[Any, ...]:
    return *pair, None if routes is None else routes.tobytes()


def one_plan_a_replica(values: list[tuple[list[int], str]]) -> None:
    """For `agree`: ValueError where two ranks of a replica have different plans."""
    for rank, (ranks, digest) in enumerate(values):
        if digest != values[ranks[0]][1]:
            raise ValueError(f"rank {rank} has another plan than rank {ranks[0]} of its replica")


def checked(
    stream: Iterable[Sequence[tuple[str, Tensor]]],
    coming: Mapping[str, HfTensor],
    dtype: torch.dtype,  # of the model
    sums: dict[str, int],
    timings: Timings,
    quantised: Callable[[str, Tensor], Tensor] | None = None,
    inside: dict[str, int] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Hands on HF tensors that come in parts, each part only after its check; at the end `sums` has the checksum of
    what was handed on, and `inside` that of what the engine makes of it (`quantised`). The host waits for the device
    once a part, and not once a tensor.

    Raises PublishError for a tensor that is unknown, given twice, of another shape or dtype, not finite, or missing at
    the end: vLLM itself would take most of these silently, or be unusable afterwards.
    """
    came: dict[str, list[Tensor]] = {}  # name → its sum, and that of what the engine makes of it: [] on the device
    for part in stream:
        start = time.perf_counter()
        for name, tensor in part:
            if name not in coming or name in came:
                raise PublishError(f"publish: {name} is {'sent twice' if name in came else 'no tensor of this model'}")
            shape, kind = coming[name].shape, kept_in(coming[name], dtype)
            if tuple(tensor.shape) != shape or tensor.dtype != kind:
                raise PublishError(
                    f"publish: {name} is {tuple(tensor.shape)} {tensor.dtype}, the engine needs {shape} {kind}"
                )
            made = [] if quantised is None else [quantised(name, tensor)]
            came[name] = [tensor_sum(each) for each in (tensor, *made)]
        sound = torch.stack([finite(tensor) for _, tensor in part]).tolist() if part else []
        for (name, _), is_finite in zip(part, sound, strict=True):
            if not is_finite:
                raise PublishError(f"publish: {name} holds a value that is not finite")
        timings.receipt += time.perf_counter() - start
        yield from part
    if missing := [name for name in coming if name not in came]:
        raise PublishError(f"publish: {missing[0]} was not sent ({len(missing)} tensors missing)")
    for place, found in enumerate([sums] if inside is None or quantised is None else [sums, inside]):
        if came:
            found |= zip(came, torch.stack([each[place] for each in came.values()]).tolist(), strict=True)


class Publish:
    """The loop's hand-over after every step: publishes, and asks the witness when that is due."""

    def __init__(
        self,
        publisher: Publisher,
        learner: Published,
        engine: Engine,
        journal: Journal,
        source: Path,  # the HF folder of the model
        dtype: torch.dtype,
        scratch: Path,  # where the witness gets the weights
        say: Callable[[str], None],
    ) -> None:
        self.publisher, self._learner, self._engine, self._journal = publisher, learner, engine, journal
        self._source, self._dtype, self._scratch, self._say = source, dtype, scratch, say
        self._first = True

    def __call__(self) -> Receipt:
        """Brings the learner's weights into the engine, with proof. Collective."""
        publisher, options, first_time = self.publisher, self.publisher.options, self._first
        receipt = publisher.publish(self._learner.parameters(), self._learner.logprobs, self._engine)
        self._journal.published(receipt.version, receipt.weights)
        self._first = False
        due = options.witness_every and receipt.version % options.witness_every == 0
        if options.canary_prompts and (due or (first_time and options.witness_at_start)):
            if (lacking := publisher.lacks_room_for_witness(self._dtype)) is None:
                witness = publisher.witness(self._learner.parameters(), self._dtype, self._source, self._scratch)
                receipt = dataclasses.replace(receipt, witness=witness)
                self._say(f"publish {receipt.version}: learner and transformers agree to {witness:.1e}")
            else:
                warning = f"warning: nobody independent has seen these weights: {lacking}"
                self._say(f"publish {receipt.version}: {warning}")
        return receipt

    def export(self, target: Path) -> None:
        """Writes the weights as an HF folder. Collective."""
        self.publisher.export(self._learner.parameters(), self._dtype, self._source, target)
