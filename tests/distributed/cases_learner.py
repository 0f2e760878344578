"""Cases for the learner on real ranks, against plain PyTorch on the HF model in float64 (tests/test_learner.py)."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.batch import Batch, Collected
from a3po_megatron.config import Config, Settings
from a3po_megatron.learner.learner import Learner
from a3po_megatron.learner.micro_batch import MicroBatch, micro_batch
from a3po_megatron.model.cut import hf_tensors
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.groups import Ranks
from tests.harness.ranks import Case, CaseRanks
from tests.harness.tiny_models import (
    CLIPPED,
    hf_logprobs,
    hf_model,
    hf_tensors_of,
    literal_token_weights,
    make_collected,
    resolved,
    trained_places,
    with_tools,
)

TEMPERATURE, STEP, LR, NAN = 0.8, 20, 1e-2, float("nan")


def settings(folder: Path, tensor: int, data: int, **changes: dict[str, Any]) -> Settings:
    config = Config.model_validate(
        {
            "model": {"path": str(folder), **changes.get("model", {})},
            "data": {"path": "builtin:arithmetic"},
            "parallel": {"tensor": tensor, "data": data, **changes.get("parallel", {})},
            "rollout": {"temperature": TEMPERATURE, **changes.get("rollout", {})},
            "optimizer": {"lr": LR, "weight_decay": 0.0, **changes.get("optimizer", {})},
            # Small, so that every mini-batch takes several micro-batches.
            "learner": {"micro_batch_tokens": 64, **changes.get("learner", {})},
            "trainer": {"steps": 10, "mini_batches": 1},
        }
    )
    return resolved(config)


def literal_old(batch: Batch) -> torch.Tensor:
    """Old log-probs away from the current ones, so that ratios clip on either side and the dual clip bites."""
    generator = torch.Generator().manual_seed(3)
    return batch.rollout_logprobs + 0.4 * torch.randn(len(batch.rollout_logprobs), generator=generator)


def literal_loss(
    model: torch.nn.Module, collected: Collected, old: list[torch.Tensor], clip: tuple[float, float] = (0.2, 0.28)
) -> torch.Tensor:
    """The paper's objective, rollout by rollout and token by token, from the HF model alone: over the tokens that are
    trained on, after all that were read."""
    rollouts = [(group, r) for group in collected.groups for r in group.rollouts]
    positive = [r.verdict.outcome == "correct" for _, r in rollouts]
    chosen = [trained_places(r) for _, r in rollouts]
    ranked = [[float(o[t]) for t in places] for o, places in zip(old, chosen, strict=True)]
    weights = literal_token_weights(ranked, positive, STEP, 0.2, 2.0, 0.005)
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    for (group, rollout), old_logprobs, places, weight in zip(rollouts, old, chosen, weights, strict=True):
        rewards = torch.tensor([r.reward for r in group.rollouts], dtype=torch.float64)
        advantage = (rollout.reward - rewards.mean()) / (rewards.std(correction=1) + 1e-6)
        logprobs = hf_logprobs(model, rollout.prompt.tokens, rollout.tokens, TEMPERATURE)
        sampled = torch.from_numpy(rollout.logprobs).double()
        for t, token_weight in zip(places, weight, strict=True):
            shaped = token_weight * advantage
            ratio = torch.exp(logprobs[t] - old_logprobs[t].double())
            surrogate = torch.min(ratio * shaped, ratio.clamp(1 - clip[0], 1 + clip[1]) * shaped)
            if shaped < 0:
                surrogate = torch.max(surrogate, 3.0 * shaped)
            correction = torch.exp(old_logprobs[t].double() - sampled[t]).clamp(max=2.0)
            total = total - surrogate * correction
            tokens += 1
    return total / tokens


def learner_in(ranks: CaseRanks, folder: Path, layout: dict[str, int]) -> tuple[Ranks, Learner]:
    """Ranks in a layout and their learner, whose optimizer leaves gradients as they are."""
    cluster = ranks.arrange(**layout)
    more = {name: size for name, size in layout.items() if name not in ("tensor", "data")}
    sgd = {"name": "sgd", "distributed": False, "clip_grad": 0.0}
    config = settings(folder, layout.get("tensor", 1), layout.get("data", 1), parallel=more, optimizer=sgd)
    return cluster, Learner(cluster, read_facts(folder), config)


def share(collected: Collected, replica: int, replicas: int) -> Collected:
    """What one replica's engines would have sampled."""
    return Collected(collected.groups[replica::replicas], [], collected.accepted, {})


def batch_of(collected: Collected, mine: Collected, mini_batches: int = 1) -> Batch:
    """The batch of one replica's share, with the literal old log-probs of the whole batch cut to it."""
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = dict(zip((r.name for r in whole.rollouts), literal_old(whole).split(whole.lengths.tolist()), strict=True))
    batch = assemble(mine, Config.model_fields["advantage"].default, mini_batches)
    batch.old_logprobs = torch.cat([torch.zeros(0), *(old[r.name] for r in batch.rollouts)])
    batch.entropy = torch.zeros_like(batch.old_logprobs)
    return shape(batch, STEP, Config.model_fields["shaping"].default)


def as_sampled(mine: Collected, mini_batches: int) -> Batch:
    """A replica's batch whose old log-probs are the sampler's."""
    made = assemble(mine, Config.model_fields["advantage"].default, mini_batches)
    made.old_logprobs, made.entropy = made.rollout_logprobs.clone(), torch.zeros_like(made.rollout_logprobs)
    return shape(made, STEP, Config.model_fields["shaping"].default)


def same_weights(a: Learner, b: Learner) -> bool:
    theirs = b.parameters()
    return all(torch.equal(p, theirs[key]) for key, p in a.parameters().items())


def as_hf(learner: Learner, values: dict[tuple[int, str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per-parameter tensors of all ranks of a replica, laid out as HF tensors."""
    group = learner.ranks.replica_group
    gathered: list[Any] = [None] * group.size()
    mine = [(p, values[p.key].detach().narrow(p.dim, p.offset, p.length).clone()) for p in learner.pieces if p.owner]
    dist.all_gather_object(gathered, mine, group=group)
    whole: dict[str, torch.Tensor] = {}
    for piece, part in (item for rank in gathered for item in rank):
        target = whole.setdefault(piece.tensor, torch.full(piece.shape, float("nan")))
        target.narrow(piece.dim, piece.start, piece.length).copy_(part)
    return whole


@dataclasses.dataclass
class Literal:
    """One update of a folder's model by plain PyTorch, in float64."""

    loss: float
    norm: float  # of the gradient
    logprobs: dict[str, torch.Tensor]  # by rollout
    gradients: dict[str, torch.Tensor]  # as HF tensors, as are
    moved: dict[str, torch.Tensor]  # the parameters after a step of SGD
    second_loss: float  # after a step of AdamW with the gradient clipped to 1


def literal_update(folder: Path, tools: bool, groups: int) -> Literal:
    collected, model = make_collected(groups=groups, size=4), hf_model(folder)
    collected = with_tools(collected) if tools else collected
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = list(literal_old(whole).split(whole.lengths.tolist()))
    loss = literal_loss(model, collected, old)
    loss.backward()
    gradients = hf_tensors_of({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    with torch.no_grad():
        logprobs = {r.name: hf_logprobs(model, r.prompt.tokens, r.tokens, TEMPERATURE) for r in whole.rollouts}
        moved = hf_tensors_of({name: p - LR * p.grad for name, p in model.named_parameters()})
    norm = torch.sqrt(sum(g.square().sum() for g in gradients.values()))
    adam = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    adam.step()
    second = literal_loss(model, collected, old)
    return Literal(float(loss), float(norm), logprobs, gradients, moved, float(second))


def padding_share(cluster: Ranks, collected: Collected, held: int) -> float:
    """Of what all ranks computed: each model-parallel rank computes all tokens of its replica."""
    everywhere = torch.tensor([float(held)])
    dist.all_reduce(everywhere)
    rollouts = [rollout for group in collected.groups for rollout in group.rollouts]
    read = sum(len(rollout.prompt.tokens) + len(rollout.tokens) - 1 for rollout in rollouts)
    return 1 - read * cluster.tensor * cluster.pipeline / float(everywhere)


def one_update(ranks: CaseRanks, kind: str, tensor: int, data: int, **parallel: Any) -> dict[str, float]:
    """Differences of one layout's update from the reference."""
    folder = ranks.folder / kind
    tools, groups = parallel.pop("tools", False), parallel.pop("groups", 3)
    layout = {name: value for name, value in parallel.items() if name != "micro_batch_tokens"}
    cluster = ranks.arrange(tensor, data=data, **layout)
    facts = read_facts(folder)
    collected = make_collected(groups=groups, size=4)
    collected = with_tools(collected) if tools else collected
    mine = share(collected, cluster.coordinates.data, cluster.data)
    exact = ranks.once(f"update-{kind}-{tools}-{groups}", lambda: literal_update(folder, tools, groups))
    limit = {"micro_batch_tokens": parallel.pop("micro_batch_tokens", 64)}

    def learner_with(**optimizer: Any) -> Learner:
        options = settings(folder, tensor, data, optimizer=optimizer, parallel=parallel, learner=limit)
        return Learner(cluster, facts, options)

    results: dict[str, float] = {}
    # Gradients and parameters: SGD, where an error is not normalised away, without the distributed optimizer.
    learner = learner_with(name="sgd", distributed=False, clip_grad=0.0)
    scored = learner.score(dataclasses.replace(batch_of(collected, mine), old_logprobs=None))
    logprobs = torch.cat([exact.logprobs[r.name] for r in scored.rollouts])
    if scored.trained is not None:
        logprobs[~scored.trained] = 0.0  # nobody asks for them
    assert (scored.trained is not None) == tools
    results["score"] = float((scored.old_logprobs - logprobs).abs().max())
    results["padding"] = padding_moves(learner, batch_of(collected, mine))
    held, packed = [], learner._packed

    def recorded(contents: Any) -> list[MicroBatch]:
        parts = packed(contents)
        held.extend(part.tokens.numel() for part in parts)
        return parts

    with mock.patch.object(learner, "_packed", recorded):
        stats = learner.update(batch_of(collected, mine), CLIPPED)
    results["padding_share"] = abs(stats.padding - padding_share(cluster, collected, sum(held)))
    results["loss"] = abs(stats.reported["learner/loss"] - exact.loss)
    results["norm_sgd"] = abs(stats.gradient_norm / exact.norm - 1)
    ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
    results["missing"] = len(hf_tensors(facts).keys() ^ ours.keys())
    # An expert that no token chose has a gradient of exactly 0.
    results["gradient"] = max(
        float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in exact.gradients.items()
    )
    moved = as_hf(learner, learner.parameters())
    results["parameter"] = max(float((moved[n] - w).abs().max()) for n, w in exact.moved.items())
    # The distributed optimizer: clipping and a second step.
    learner = learner_with()
    results["norm"] = abs(learner.update(batch_of(collected, mine), CLIPPED).gradient_norm / exact.norm - 1)
    second = learner.update(batch_of(collected, mine), CLIPPED).reported["learner/loss"]
    results["second_loss"] = abs(second - exact.second_loss)
    return results


def padding_moves(learner: Learner, batch: Batch) -> float:
    """By how much micro-batches of padding alone, before and after the others, change gradients and sums."""
    parts = learner._micro_batches(batch, range(len(batch.rollouts)))
    long = parts[0].tokens.shape[1] if learner.layout.virtual > 1 else learner.multiple
    at = learner.ranks.context, learner.ranks.coordinates.context
    padding = [micro_batch([], [], long, at) for _ in range(learner.layout.pipeline)]
    found = []
    for micro_batches in (parts, [*padding, *parts, *padding]):
        sums = learner._accumulate(micro_batches, batch, CLIPPED, 0).sums
        found.append([sums, *(p.main_grad.clone() for p in learner.parameters().values())])
    assert any(bool(g.any()) for g in found[0][1:])
    return max(float((b - a).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in zip(*found, strict=True))


class Watched(Learner):
    """Keeps the gradient of every mini-batch as HF tensors (optimizer.distributed and clip_grad must be off)."""

    def _step(self, number: int) -> float:
        self.gradients = getattr(self, "gradients", [])
        self.gradients.append(as_hf(self, {key: p.main_grad for key, p in self.parameters().items()}))
        return super()._step(number)


@dataclasses.dataclass
class Halves:
    """Two mini-batches of two groups each, one after the other, by plain PyTorch in float64."""

    logprobs: dict[str, torch.Tensor]  # by rollout, before both
    losses: list[float]
    counts: list[int]  # response tokens of each
    norms: list[float]
    gradients: list[dict[str, torch.Tensor]]
    moved: dict[str, torch.Tensor]  # the parameters after both


def literal_halves(folder: Path) -> Halves:
    collected, model = make_collected(groups=4, size=4), hf_model(folder)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = list(literal_old(whole).split(whole.lengths.tolist()))
    with torch.no_grad():
        logprobs = {r.name: hf_logprobs(model, r.prompt.tokens, r.tokens, TEMPERATURE) for r in whole.rollouts}
    halves = Halves(logprobs, [], [], [], [], {})
    for half in (slice(0, 2), slice(2, 4)):
        groups = collected.groups[half]
        loss = literal_loss(model, Collected(groups, [], [], {}), old[4 * half.start : 4 * half.stop])
        model.zero_grad()
        loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        with torch.no_grad():
            for name, p in model.named_parameters():
                p -= LR * grads[name]
        halves.losses.append(float(loss))
        halves.counts.append(sum(len(r.tokens) for group in groups for r in group.rollouts))
        halves.gradients.append(hf_tensors_of(grads))
        halves.norms.append(float(torch.sqrt(sum(g.square().sum() for g in halves.gradients[-1].values()))))
    halves.moved = hf_tensors_of({name: p.detach() for name, p in model.named_parameters()})
    return halves


def share_of_padding(ranks: CaseRanks, kind: str, tensor: int, data: int, **parallel: Any) -> dict[str, float]:
    """Two mini-batches over two replicas of which one has no rollout of the first and the other none of the second,
    or of which one has nothing at all: differences from the literal mini-batches, one after the other."""
    folder = ranks.folder / kind
    cluster, facts = ranks.arrange(tensor, data=data, **parallel), read_facts(folder)
    collected = make_collected(groups=4, size=4)
    exact = ranks.once(f"halves-{kind}", lambda: literal_halves(folder))
    optimizer = {"name": "sgd", "distributed": False, "clip_grad": 0.0}
    options = settings(folder, tensor, data, parallel=parallel, optimizer=optimizer)
    results: dict[str, float] = {}
    for shares in (([0, 1], [2, 3]), ([0, 1, 2, 3], [])):
        groups = [collected.groups[index] for index in shares[cluster.coordinates.data]]
        mine = Collected(groups, [], collected.accepted, {})
        learner = Watched(cluster, facts, options)
        scored = learner.score(dataclasses.replace(batch_of(collected, mine, 2), old_logprobs=None))
        logprobs = torch.cat([torch.zeros(0), *(exact.logprobs[r.name] for r in scored.rollouts)])
        batch = batch_of(collected, mine, 2)
        assert len(set(batch.mini_batch.tolist())) < 2 or not shares[1]
        stats = learner.update(batch, CLIPPED)
        moved = as_hf(learner, learner.parameters())
        mean = sum(a * b for a, b in zip(exact.losses, exact.counts, strict=True)) / sum(exact.counts)
        differences = {
            "score": max((scored.old_logprobs - logprobs).abs().tolist(), default=0.0),
            "loss": abs(stats.reported["learner/loss"] - mean),
            "norm_sgd": abs(stats.gradient_norm / (sum(exact.norms) / 2) - 1),
            "gradient": max(
                float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-9))
                for ours, grads in zip(learner.gradients, exact.gradients, strict=True)
                for n, g in grads.items()
            ),
            "parameter": max(float((moved[n] - w).abs().max()) for n, w in exact.moved.items()),
        }
        results = {name: max(value, results.get(name, 0.0)) for name, value in differences.items()}
    return results


def literal_step(folder: Path) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of a step whose old log-probs are the model's own."""
    collected, model = make_collected(groups=5, size=4), hf_model(folder)
    rollouts = [r for group in collected.groups for r in group.rollouts]
    with torch.no_grad():
        exact = [hf_logprobs(model, r.prompt.tokens, r.tokens, TEMPERATURE).float() for r in rollouts]
    loss = literal_loss(model, collected, exact)
    loss.backward()
    return float(loss), hf_tensors_of({name: p.grad for name, p in model.named_parameters() if p.grad is not None})


def whole_steps(ranks: CaseRanks) -> dict[str, Any]:
    return _whole_steps(ranks, STEPS[ranks.world])


def all_whole_steps(ranks: CaseRanks) -> dict[str, Any]:
    return _whole_steps(ranks, ALL_STEPS[ranks.world])


def _whole_steps(ranks: CaseRanks, layouts: list[tuple[int, int, int, int]]) -> dict[str, Any]:
    """Score, shape and update in one go, for layouts of this many ranks: errors against the literal step, and what
    each rollout's tokens were given."""
    folder, found = ranks.folder / "qwen3", {}
    facts, collected = read_facts(folder), make_collected(groups=5, size=4)
    loss, grads = ranks.once("step", lambda: literal_step(folder))
    for tensor, context, pipeline, data in layouts:
        cluster = ranks.arrange(tensor, context=context, pipeline=pipeline, data=data)
        parallel = {"context": context, "pipeline": pipeline}
        options = settings(folder, tensor, data, parallel=parallel, optimizer={"name": "sgd", "distributed": False})
        learner = Learner(cluster, facts, options)
        batch = learner.score(
            assemble(
                share(collected, cluster.coordinates.data, cluster.data), Config.model_fields["advantage"].default, 1
            )
        )
        shape(batch, STEP, Config.model_fields["shaping"].default)
        stats = learner.update(batch, CLIPPED)
        ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
        # main_grad holds the clipped gradient: what was clipped away is the norm's.
        scale = max(1.0, stats.gradient_norm)
        errors = [float((ours[n] * scale - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in grads.items()]
        pieces = zip(
            batch.rollouts,
            *(v.split(batch.lengths.tolist()) for v in (batch.old_logprobs, batch.token_weights)),
            strict=True,
        )
        found[f"tp{tensor} cp{context} pp{pipeline} dp{data}"] = {
            "loss": abs(stats.reported["learner/loss"] - loss),
            "gradient": max(errors),
            "tokens": {r.name: [old.tolist(), weights.tolist()] for r, old, weights in pieces},
        }
    return found


# World size → (tensor, context, pipeline, data): those that cross dimensions; and all, by `make soak`.
STEPS = {1: [(1, 1, 1, 1)], 2: [(1, 1, 1, 2)], 4: [(2, 2, 1, 1), (1, 2, 2, 1)]}
ALL_STEPS = {
    1: [(1, 1, 1, 1)],
    2: [(2, 1, 1, 1), (1, 2, 1, 1), (1, 1, 2, 1), (1, 1, 1, 2)],
    4: [(2, 2, 1, 1), (1, 2, 1, 2), (1, 2, 2, 1), (1, 4, 1, 1)],
}


class Broken(Learner):
    """A learner one of whose gradients may come out as NaN, on rank 1 and in one mini-batch only."""

    breaks: int | None = None  # which mini-batch
    finite: tuple[bool, ...] = ()  # whether this rank's gradients of each mini-batch were

    def _accumulate(self, *args: Any) -> Any:
        found = super()._accumulate(*args)
        named = {name: p.main_grad for (_, name), p in self.parameters().items()}
        if self.ranks.rank == 1 and len(self.finite) == self.breaks:
            # The last of all, or of an expert: in the last chunk, or in the buffer that experts have to themselves.
            [g for name, g in named.items() if ".experts." in name or not self.facts.experts][-1].view(-1)[3] = NAN
        self.finite += (all(bool(torch.isfinite(g).all()) for g in named.values()),)
        return found


def spoil(batch: Batch, tokens: torch.Tensor, exact: torch.Tensor, how: str) -> None:
    """Puts into a batch, at some of these tokens, what makes its loss not finite."""
    row = batch.rollout_index[tokens]
    if how == "advantage":
        batch.advantages[row[0]] = NAN
    elif how == "token weight":
        batch.token_weights[tokens[0]] = NAN
    elif how == "overflow":
        # Ratios far beyond the clip have a gradient of 0, however large the advantage; the sum of the losses is inf.
        chosen = tokens[batch.advantages[row] > 0]
        batch.old_logprobs[chosen] = batch.rollout_logprobs[chosen] = exact[chosen] - 10
        batch.token_weights[chosen] = 1.5e38
        assert float(batch.advantages[batch.rollout_index[chosen]].sum()) * 1.28 * 1.5 > 3.5


# Name → (model, tensor, data, further settings)
REJECTING: dict[str, tuple[str, int, int, dict[str, Any]]] = {
    "tp2": ("qwen3", 2, 1, {}),
    "tp2 sp": ("qwen3", 2, 1, {"parallel": {"sequence": True}}),
    "dp2": ("qwen3", 1, 2, {}),
    "dp2 whole": ("qwen3", 1, 2, {"optimizer": {"distributed": False}}),
    "pp2": ("qwen3", 1, 1, {"parallel": {"pipeline": 2}}),
    "pp2 vp2": ("qwen3_deep", 1, 1, {"parallel": {"pipeline": 2, "virtual": 2}}),
    "cp2": ("qwen3", 1, 1, {"parallel": {"context": 2}}),
    "ep2": ("qwen3_moe", 1, 2, {"parallel": {"expert": 2}}),
    "dp2 bf16": ("qwen3", 1, 2, {"model": {"dtype": "bfloat16"}}),
    "tp2 sp bf16": ("qwen3", 2, 1, {"model": {"dtype": "bfloat16"}, "parallel": {"sequence": True}}),
}
FAULTS = ("gradient", "advantage", "token weight", "overflow")


def rejected_updates(ranks: CaseRanks) -> dict[str, Any]:
    """In every layout one of the faults, in turn."""
    return _rejected(ranks, [(FAULTS[at % len(FAULTS)],) for at in range(len(REJECTING))])


def all_rejected_updates(ranks: CaseRanks) -> dict[str, Any]:
    """Every fault in every layout."""
    return _rejected(ranks, [FAULTS] * len(REJECTING))


def _rejected(ranks: CaseRanks, faults: list[tuple[str, ...]]) -> dict[str, Any]:
    """Of three mini-batches one breaks on one rank: what every layout's ranks hold and say after each of its faults."""
    found: dict[str, Any] = {}
    collected = make_collected(groups=6, size=4)
    for at, (layout, (kind, tensor, data, changes)) in enumerate(REJECTING.items()):
        folder = ranks.folder / kind
        cluster, facts = ranks.arrange(tensor, data=data, **changes.get("parallel", {})), read_facts(folder)
        options = settings(folder, tensor, data, **changes)
        mine = share(collected, cluster.coordinates.data, cluster.data)

        def batch(mine: Collected = mine) -> Batch:
            return as_sampled(mine, 3)

        for number, fault in enumerate(faults[at]):
            broken = (at + number) % 3
            sound, learner = Learner(cluster, facts, options), Broken(cluster, facts, options)
            before = [p.detach().clone() for p in learner.parameters().values()]
            one, two = batch(), batch()
            chosen = torch.nonzero(two.mini_batch == broken)[:, 0].tolist()
            here = torch.cat([part.index for part in learner._micro_batches(two, chosen)])
            exact = learner.score(batch()).old_logprobs
            if fault == "gradient":
                learner.breaks = broken
            elif cluster.rank == 1:
                spoil(two, here, exact, fault)
            # The sound learner never sees the broken mini-batch: nothing of it may be in the other's weights.
            one.mini_batch = torch.tensor([9 if m == broken else m - (m > broken) for m in one.mini_batch.tolist()])
            one.mini_batches = 2
            wanted, stats = sound.update(one, CLIPPED), learner.update(two, CLIPPED)
            triples = list(zip(sound.parameters().values(), learner.parameters().values(), before, strict=True))
            found[f"{layout}, {fault}, {broken}"] = {
                "rejected": two.rejected,
                "metric": stats.rejected,
                "equal": all(torch.equal(a, b) for a, b, _ in triples),  # false for NaN
                "trained": any(not torch.equal(b, c) for _, b, c in triples),
                "told": [[s.reported["learner/loss"], s.gradient_norm] for s in (wanted, stats)],
                "gradients_finite": learner.finite[broken],
            }
    return found


# World size → name → (model, tensor, data, further options of the layout).
GRID: dict[int, dict[str, tuple[str, int, int, dict[str, Any]]]] = {
    1: {
        "qwen3_tp1": ("qwen3", 1, 1, {}),
        "qwen2_tp1": ("qwen2", 1, 1, {}),
        "llama_tp1": ("llama", 1, 1, {}),
        "llama31_tp1": ("llama31", 1, 1, {}),
        "moe_tp1": ("qwen3_moe", 1, 1, {}),
        "moe_raw_tp1": ("qwen3_moe_raw", 1, 1, {}),
        "tools_tp1": ("qwen3", 1, 1, {"tools": True}),
        "tools_split_40": ("qwen3", 1, 1, {"tools": True, "micro_batch_tokens": 40}),
    },
    2: {
        "qwen3_tp2": ("qwen3", 2, 1, {}),
        "qwen3_tp2_sp": ("qwen3", 2, 1, {"sequence": True}),
        "qwen3_dp2": ("qwen3", 1, 2, {}),
        "qwen3_pp2": ("qwen3", 1, 1, {"pipeline": 2}),
        "qwen3_pp2_vp2": ("qwen3_deep", 1, 1, {"pipeline": 2, "virtual": 2}),
        "qwen2_pp2_vp2": ("qwen2_deep", 1, 1, {"pipeline": 2, "virtual": 2, "stages": [1, 1, 2, 1]}),
        "qwen2_tp2": ("qwen2", 2, 1, {}),
        "llama31_pp2": ("llama31", 1, 1, {"pipeline": 2}),
        "moe_ep2": ("qwen3_moe", 1, 2, {"expert": 2}),
        "moe_tp2_sp": ("qwen3_moe", 2, 1, {"sequence": True}),
        "tools_tp2_sp": ("qwen3", 2, 1, {"tools": True, "sequence": True}),
        "tools_cp2": ("qwen3", 1, 1, {"tools": True, "context": 2}),
        "tools_dp2": ("qwen3", 1, 2, {"tools": True}),
        "qwen3_cp2": ("qwen3", 1, 1, {"context": 2}),
        "qwen2_cp2": ("qwen2", 1, 1, {"context": 2}),
        "llama31_cp2": ("llama31", 1, 1, {"context": 2}),
        "moe_cp2_ep2": ("qwen3_moe", 1, 1, {"context": 2, "expert": 2}),
        "moe_tp2_ep2_etp1_sp": ("qwen3_moe", 2, 1, {"sequence": True, "expert": 2, "expert_tensor": 1}),
    },
    4: {
        "qwen3_tp2_dp2": ("qwen3", 2, 2, {}),
        "tools_pp2_vp2_dp2": ("qwen3_deep", 1, 2, {"tools": True, "pipeline": 2, "virtual": 2}),
        "qwen3_cp4": ("qwen3", 1, 1, {"context": 4}),
        "qwen3_tp2_cp2": ("qwen3", 2, 1, {"context": 2}),
        "qwen3_tp2_cp2_sp": ("qwen3", 2, 1, {"context": 2, "sequence": True}),
        "qwen3_cp2_dp2": ("qwen3", 1, 2, {"context": 2}),
        "qwen2_cp2_pp2": ("qwen2", 1, 1, {"context": 2, "pipeline": 2}),
        "qwen3_cp2_pp2_vp2": ("qwen3_deep", 1, 1, {"context": 2, "pipeline": 2, "virtual": 2}),
        "moe_tp2_cp2_ep2_sp": ("qwen3_moe", 2, 1, {"context": 2, "expert": 2, "sequence": True}),
        "qwen3_tp2_dp2_sp": ("qwen3", 2, 2, {"sequence": True}),
        "qwen3_tp2_pp2": ("qwen3", 2, 1, {"pipeline": 2}),
        "qwen3_tp2_pp2_sp": ("qwen3", 2, 1, {"pipeline": 2, "sequence": True}),
        "qwen3_pp2_dp2": ("qwen3", 1, 2, {"pipeline": 2}),
        "qwen3_pp2_uneven_dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "stages": [2, 3]}),
        "qwen3_tp2_pp2_vp2_sp": ("qwen3_deep", 2, 1, {"pipeline": 2, "virtual": 2, "sequence": True}),
        "qwen3_pp2_vp2_dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "virtual": 2}),
        "qwen2_tp2_pp2_sp": ("qwen2", 2, 1, {"pipeline": 2, "sequence": True}),
        "moe_ep2_pp2": ("qwen3_moe", 1, 2, {"expert": 2, "pipeline": 2}),
        "moe_ep2_pp2_vp2": ("qwen3_moe_deep", 1, 2, {"expert": 2, "pipeline": 2, "virtual": 2}),
        "moe_tp2_dp2_ep2_sp": ("qwen3_moe", 2, 2, {"expert": 2, "sequence": True}),
        "moe_tp2_dp2_ep4_etp1_sp": ("qwen3_moe", 2, 2, {"expert": 4, "expert_tensor": 1, "sequence": True}),
    },
}


# One batch, split over ranks and micro-batches: 1 to 8 of them on a rank.
SPLITS = {
    f"split_dp{data}_{limit}": ("qwen3", 1, data, {"micro_batch_tokens": limit, "groups": 5})
    for data in (1, 2, 4)
    for limit in (100_000, 150, 80, 48)
}
for _name, _cell in SPLITS.items():
    GRID[_cell[2]][_name] = _cell


# One replica of two has padding alone in a mini-batch.
SHARES: dict[int, dict[str, tuple[str, int, int, dict[str, Any]]]] = {
    1: {},
    2: {"share_dp2": ("qwen3", 1, 2, {}), "share_moe_ep2": ("qwen3_moe", 1, 2, {"expert": 2})},
    4: {
        "share_tp2_dp2_sp": ("qwen3", 2, 2, {"sequence": True}),
        "share_cp2_dp2": ("qwen3", 1, 2, {"context": 2}),
        "share_pp2_vp2_dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "virtual": 2}),
    },
}


def _case(of: Any, name: str, kind: str, tensor: int, data: int, parallel: dict[str, Any]) -> Case:
    def case(ranks: CaseRanks) -> dict[str, float]:
        return of(ranks, kind, tensor, data, **parallel)

    case.__qualname__ = case.__name__ = name
    return case


# World size → those that cross the most dimensions, and one of each family and kind of batch; `make soak` runs all of
# them. Of experts under tensor and context parallelism at once, tests/test_replay.py has the gradient.
CROSSING = {
    1: ("qwen3_tp1", "qwen2_tp1", "llama31_tp1", "moe_tp1", "moe_raw_tp1", "tools_split_40", "split_dp1_48"),
    2: (
        *("tools_tp2_sp", "tools_cp2", "llama31_pp2", "qwen2_pp2_vp2"),
        *("moe_cp2_ep2", "moe_tp2_ep2_etp1_sp", "split_dp2_48", "share_moe_ep2"),
    ),
    4: (
        *("qwen3_cp4", "qwen3_tp2_cp2_sp", "qwen3_cp2_pp2_vp2", "qwen2_tp2_pp2_sp"),
        *("moe_ep2_pp2_vp2", "moe_tp2_dp2_ep4_etp1_sp"),
    ),
}
CASES = {
    world: [
        *(_case(one_update, name, *cell) for name, cell in GRID[world].items()),
        *(_case(share_of_padding, name, *cell) for name, cell in SHARES[world].items()),
    ]
    for world in GRID
}
globals().update({case.__name__: case for cases in CASES.values() for case in cases})
