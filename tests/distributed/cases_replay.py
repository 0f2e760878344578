"""Cases for routing replay on real ranks, against transformers in float64 that is sent the same way
(tests/test_replay.py). Routes follow from a sequence's tokens; they differ from token to token and layer to layer."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.batch import Collected
from a3po_megatron.config import Config, PublishSettings, Settings, load_config
from a3po_megatron.data.order import named_seed
from a3po_megatron.errors import PublishError, RunFailed
from a3po_megatron.files.run_folder import step_files
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.layout import layout_of
from a3po_megatron.model.read import read_facts
from a3po_megatron.parts import build
from a3po_megatron.rollout.engine import Completion
from a3po_megatron.rollout.vllm_engine import VllmEngine, checked_routes
from a3po_megatron.run.journal import read_frames
from a3po_megatron.run.stop import Interrupt
from a3po_megatron.train import train
from a3po_megatron.weights.publish import Publisher
from tests.distributed.cases_circle import EXAMPLE, SHORT, InProcess, coin, rows_of
from tests.distributed.cases_learner import (
    TEMPERATURE,
    _case,
    as_hf,
    batch_of,
    literal_loss,
    literal_old,
    settings,
    share,
)
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import CLIPPED, hf_logprobs, hf_model, hf_tensors_of, make_collected, resolved

LAYERS, EXPERTS, PER_TOKEN = 5, 8, 3
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}


def routes_of(tokens: tuple[int, ...]) -> np.ndarray:
    """Routes [T, L, k] of a sequence of T + 1 tokens: any experts at all."""
    draw = np.random.default_rng(named_seed("routes", *tokens))
    order = np.argsort(draw.random((len(tokens) - 1, LAYERS, EXPERTS)), axis=2)
    return order[:, :, :PER_TOKEN].astype(np.uint8)


class Sent:
    """transformers' model, each of whose gates takes the experts that it is told, with its own probabilities."""

    def __init__(self, folder: Path) -> None:
        self.model = hf_model(folder)
        self.given: torch.Tensor | None = None  # [T + 1, L, k]; None: the gates choose
        self.chosen: list[torch.Tensor] = []  # by layer: what the gates would have chosen, [T + 1, k]
        self.model.register_forward_pre_hook(self._look_up)
        self.replay = True
        for number, layer in enumerate(self.model.model.layers):
            layer.mlp.gate.forward = self._gate(number, layer.mlp.gate)

    def _look_up(self, _: Any, inputs: tuple[torch.Tensor]) -> None:
        self.chosen = []
        routes = routes_of(tuple(inputs[0][0].tolist()))
        whole = np.concatenate([routes, np.broadcast_to(np.arange(PER_TOKEN), (1, LAYERS, PER_TOKEN))])  # the last
        self.given = torch.from_numpy(whole.astype(np.int64)) if self.replay else None

    def _gate(self, number: int, gate: Any) -> Any:
        def forward(hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
            logits = F.linear(hidden.reshape(-1, hidden.shape[-1]), gate.weight)
            probabilities = torch.softmax(logits, dim=-1)
            own = probabilities.topk(PER_TOKEN, dim=-1).indices
            self.chosen.append(own)
            experts = own if self.given is None else self.given[:, number]
            scores = probabilities.gather(1, experts)
            return logits, scores / scores.sum(dim=-1, keepdim=True) if gate.norm_topk_prob else scores, experts

        return forward

    def own_routes(self, tokens: tuple[int, ...]) -> np.ndarray:
        """What the gates choose, [T, L, k], without being told."""
        self.replay = False
        with torch.no_grad():
            self.model(torch.tensor([tokens]))
        self.replay = True
        return torch.stack(self.chosen, dim=1)[:-1].numpy().astype(np.uint8)


def with_routes(collected: Collected, routes: Any = routes_of) -> Collected:
    for group in collected.groups:
        for rollout in group.rollouts:
            rollout.routes = routes((*rollout.prompt.tokens, *rollout.tokens.tolist()))
    return collected


def config_of(
    folder: Path, tensor: int, data: int, extra: dict[str, Any], replay: bool = True, limit: int = 64, **parallel: Any
) -> Settings:
    optimizer = {"name": "sgd", "clip_grad": 0.0}
    small = {"micro_batch_tokens": limit}
    values = settings(folder, tensor, data, optimizer=optimizer, parallel=parallel, learner=small).model_dump()
    values["rollout"]["routing_replay"] = replay
    values["megatron"]["extra"] = extra
    return resolved(Config.model_validate(values))


def loaded(learner: Learner) -> bool:
    """Whether any router still holds routes."""
    replays = [replay for chunk in learner.pipeline.replays.values() for _, replay in chunk._replays]
    assert replays
    return any(replay.experts is not None or replay.rerouted is not None or replay.counting for replay in replays)


@dataclasses.dataclass
class Literal:
    """A folder's model along `routes_of`, by transformers in float64."""

    loss: float
    gradients: dict[str, torch.Tensor]  # as HF tensors
    logprobs: dict[str, torch.Tensor]  # by rollout
    rerouted: dict[str, int]  # by rollout: tokens that a gate would have sent elsewhere
    alone: torch.Tensor  # log-probs of `ALONE`, where the gates choose


def literal_update(folder: Path) -> Literal:
    collected, sent = with_routes(make_collected(groups=5, size=4)), Sent(folder)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    loss = literal_loss(sent.model, collected, list(literal_old(whole).split(whole.lengths.tolist())))
    loss.backward()
    grads = hf_tensors_of({name: p.grad for name, p in sent.model.named_parameters() if p.grad is not None})
    logprobs, counts = {}, {}
    with torch.no_grad():
        for rollout in whole.rollouts:
            logprobs[rollout.name] = hf_logprobs(sent.model, rollout.prompt.tokens, rollout.tokens, TEMPERATURE)
            own, given = (values[:-1].sort(dim=2).values for values in (torch.stack(sent.chosen, dim=1), sent.given))
            counts[rollout.name] = int((own != given).any(dim=2).sum())
        sent.replay = False
        alone = [hf_logprobs(sent.model, prompt, np.array(response), 1.0) for prompt, response in ALONE]
    return Literal(float(loss), grads, logprobs, counts, torch.cat(alone))


def replayed(
    ranks: CaseRanks, kind: str, tensor: int, data: int, extra: dict[str, Any] | None = None, **parallel: Any
) -> dict[str, float]:
    """Score and update along injected routes: differences from transformers sent the same way, and what stays."""
    folder = ranks.folder / kind
    cluster = ranks.arrange(tensor, data=data, **parallel)
    collected = with_routes(make_collected(groups=5, size=4))
    mine = share(collected, cluster.coordinates.data, cluster.data)
    exact = ranks.once(f"replay-{kind}", lambda: literal_update(folder))

    learner = Learner(cluster, read_facts(folder), config_of(folder, tensor, data, extra or {}, **parallel))
    before = learner.logprobs(ALONE)
    scored = learner.score(dataclasses.replace(batch_of(collected, mine), old_logprobs=None))
    after = learner.logprobs(ALONE)
    stats = learner.update(batch_of(collected, mine), CLIPPED)
    ours = as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})
    names = [rollout.name for rollout in scored.rollouts]
    counts = torch.tensor([exact.rerouted[name] for name in names])
    grads = exact.gradients
    return {
        "micro_batches": len(learner._micro_batches(scored, range(len(scored.rollouts)))),
        "score": float((scored.old_logprobs - torch.cat([exact.logprobs[name] for name in names])).abs().max()),
        "rerouted": float((scored.rerouted - counts).abs().max()),
        "loss": abs(stats.reported["learner/loss"] - exact.loss),
        "gradient": max(float((ours[n] - g).abs().max() / g.abs().max().clamp(min=1e-9)) for n, g in grads.items()),
        "gate": min(float(ours[n].abs().max()) for n in grads if n.endswith("mlp.gate.weight")),
        "alone": float((torch.cat(before) - exact.alone).abs().max()),
        "moved": max(float((a - b).abs().max()) for a, b in zip(after, before, strict=True)),
        "left": float(loaded(learner)),
    }


def bits(learner: Learner, collected: Collected, mine: Collected) -> list[torch.Tensor]:
    """Everything that a score and an update come to."""
    scored = learner.score(dataclasses.replace(batch_of(collected, mine), old_logprobs=None))
    learner.update(batch_of(collected, mine), CLIPPED)
    gradients = [p.main_grad.clone() for p in learner.parameters().values()]
    return [scored.old_logprobs, scored.entropy, *gradients, *(p.detach() for p in learner.parameters().values())]


def own_routes_of(folder: Path) -> dict[tuple[int, ...], np.ndarray]:
    """Sequence → what the gates choose for it."""
    rollouts = [r for group in make_collected(groups=3, size=4).groups for r in group.rollouts]
    sent = Sent(folder)
    return {s: sent.own_routes(s) for s in ((*r.prompt.tokens, *r.tokens.tolist()) for r in rollouts)}


def own_routes_change_nothing(ranks: CaseRanks) -> dict[str, Any]:
    return _own_routes(ranks, PLAIN[ranks.world])


def own_routes_change_nothing_elsewhere(ranks: CaseRanks) -> dict[str, Any]:
    return _own_routes(ranks, PLAIN_IMPLIED[ranks.world])


def _own_routes(ranks: CaseRanks, layouts: dict[str, tuple[int, dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    """With replay of what the router chooses itself, in this order or another, and without replay."""
    folder, found = ranks.folder / "moe", {}
    own = ranks.once("own-routes", lambda: own_routes_of(folder))
    for name, (data, parallel, extra) in layouts.items():
        cluster = ranks.arrange(1, data=data, **parallel)
        results = []
        for replay, backwards in ((False, False), (True, False), (True, True)):
            step = -1 if backwards else 1
            collected = with_routes(make_collected(groups=3, size=4), lambda t: own[t][:, :, ::step].copy())  # noqa: B023
            config = config_of(folder, 1, data, extra, replay, **parallel)
            learner = Learner(cluster, read_facts(folder), config)
            results.append(bits(learner, collected, share(collected, cluster.coordinates.data, cluster.data)))
        plain, *others = results
        found[name] = [all(torch.equal(a, b) for a, b in zip(plain, other, strict=True)) for other in others]
    return found


def each_micro_batch_has_its_own(ranks: CaseRanks) -> dict[str, Any]:
    """One rank: which experts count for what."""
    folder = ranks.folder / "moe"
    cluster, sent = ranks.arrange(1), Sent(folder)
    learner = Learner(cluster, read_facts(folder), config_of(folder, 1, 1, {}, limit=40))
    collected = make_collected(groups=3, size=4)

    def score(routes: Any) -> Any:
        batch = assemble(with_routes(collected, routes), Config.model_fields["advantage"].default, 1)
        return learner.score(batch)

    own = score(sent.own_routes)
    shuffled = score(lambda t: np.random.default_rng(0).permutation(sent.own_routes(t)))
    flipped = []  # by rollout, in the last layer alone, which no router looks at

    def flip(tokens: tuple[int, ...]) -> np.ndarray:
        routes = sent.own_routes(tokens)
        chosen = np.flatnonzero(np.random.default_rng(len(tokens)).random(len(routes)) < 0.4)
        for token in chosen:
            routes[token, -1, 0] = min(set(range(EXPERTS)) - set(routes[token, -1].tolist()))
        flipped.append(len(chosen))
        return routes

    rerouted = score(flip).rerouted
    routed = learner._micro_batches(own, range(len(own.rollouts)))
    bare = [dataclasses.replace(part, routes=None, rollout=None) for part in routed]
    forward = learner.pipeline.forward
    others = learner._micro_batches(shuffled, range(len(shuffled.rollouts)))
    mixed = forward([part for pair in zip(others, bare, strict=True) for part in pair], 1.0, with_entropy=False)
    counts = [part.targets.numel() for part in routed for _ in range(2)]
    plain = forward(bare, 1.0, with_entropy=False)
    without = dataclasses.replace(own, rollouts=[dataclasses.replace(r, routes=None) for r in own.rollouts])
    try:
        learner.score(dataclasses.replace(without, old_logprobs=None))
        said = ""
    except RunFailed as error:
        said = str(error)
    return {
        "own": own.rerouted.tolist(),
        "shuffled": float((shuffled.old_logprobs - own.old_logprobs).abs().max()),
        "flipped": [flipped, rerouted.tolist()],
        "micro_batches": len(routed),
        "bare": torch.equal(torch.cat(mixed.split(counts, dim=1)[1::2], dim=1), plain),
        "missing": said,
        "left": loaded(learner),
    }


def an_exception_leaves_nothing(ranks: CaseRanks) -> bool:
    folder = ranks.folder / "moe"
    cluster = ranks.arrange(1)
    learner = Learner(cluster, read_facts(folder), config_of(folder, 1, 1, {}))
    batch = assemble(with_routes(make_collected(groups=2, size=4)), Config.model_fields["advantage"].default, 1)
    batch.rollouts[0].routes = batch.rollouts[0].routes[:, :, :1]
    with contextlib.suppress(ValueError, RuntimeError):
        learner.score(batch)
        raise AssertionError("routes of another shape were taken")
    return loaded(learner)


class Probed:
    """What a publish's canary asks of an engine: completions with routes, and log-probs along routes, maybe others."""

    dtype, receipt_strength = torch.float32, "stream"

    def __init__(self, sent: Sent, told: Any) -> None:
        self.sent, self.told = sent, told

    def probe(self, requests: Any, max_tokens: int) -> list[Completion]:
        completions = []
        for number, request in enumerate(requests):
            tokens = np.arange(number, number + max_tokens) % 60
            with torch.no_grad():
                logprobs = hf_logprobs(self.sent.model, tuple(request.prompt), tokens, 1.0).float().numpy()
            routes = self.told((*request.prompt, *tokens.tolist()))
            completions.append(Completion(tokens, logprobs, "length", routes))
        return completions


def canary(ranks: CaseRanks) -> dict[str, Any]:
    """The canary of an engine that chose as it says, of one that did not, and of one that says nothing."""
    folder = ranks.folder / "moe"
    cluster, facts, sent = ranks.arrange(1, data=2, expert=2), read_facts(folder), Sent(folder)
    config = config_of(folder, 1, 2, {}, expert=2)
    learner = Learner(cluster, facts, config)
    options = PublishSettings(canary_tokens=6, canary_bound=1e-4, witness_bound=1e-4)
    publisher = Publisher(cluster, facts, layout_of(config.parallel), options, [(3, 4, 5), (6,), (7, 8)])
    found: dict[str, Any] = {}
    for name, told in (
        ("as it says", routes_of),
        ("another way", lambda tokens: np.roll(routes_of(tokens), 1, axis=0)),
        ("says nothing", lambda tokens: None),
    ):
        try:
            found[name], _ = publisher._canary(learner.logprobs, Probed(sent, told))
        except PublishError as error:
            found[name] = str(error)
    # What the witness is shown: the learner's own way.
    with contextlib.suppress(PublishError):
        publisher._canary(learner.logprobs, Probed(sent, routes_of))
    sent.replay = False
    with torch.no_grad():
        found["witness"] = max(
            float((ours - hf_logprobs(sent.model, prompt, np.array(response), 1.0)).abs().max())
            for (prompt, response), ours in publisher.scored.items()
        )
    return found


class Watched(VllmEngine):
    """The real engine on a CPU, which cannot say which experts it chose: its routers are watched, one request at a
    time, so that their rows are that request's tokens in order.

    Of each rollout's first token, in the last layer, it names another expert: that reaches no log-prob of a response.
    """

    mute = False

    def __init__(self, folder: Path, facts: Any, stops: Any, options: Any, *more: Any) -> None:
        super().__init__(folder, facts, stops, options.model_copy(update={"routing_replay": False}), *more)
        self.rows: dict[int, list[np.ndarray]] = {}
        self._llm.apply_model(self._watch)

    def _watch(self, model: torch.nn.Module) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        for module in model.modules():
            if isinstance(module, MoERunner):
                module.router.set_capture_fn(functools.partial(self._record, module.layer_id))

    def _record(self, layer: int, experts: torch.Tensor) -> None:
        self.rows.setdefault(layer, []).append(experts.numpy().astype(np.uint8))

    def sample(self, requests: Any, **options: Any) -> Any:
        def asked() -> Any:
            for request in requests:
                assert not (self.mute and request), "sampled anew"
                yield request

        for finished in super().sample(asked(), **options):
            for _, completion in finished:
                others = sorted(set(range(EXPERTS)) - set(completion.routes[0, -1].tolist()))
                completion.routes[0, -1, 0] = others[0]
            yield finished

    def _complete(self, requests: Any, *how: Any, **named: Any) -> Any:
        for number, request in enumerate(requests):
            self.rows = {}
            for finished in super()._complete([request], *how, **named):
                for _, completion in finished:
                    routes = np.stack([np.concatenate(self.rows[layer]) for layer in sorted(self.rows)], axis=1)
                    read = len(request.prompt) + len(completion.tokens) - 1
                    routes = checked_routes(routes, read, self._facts)
                    yield [(number, dataclasses.replace(completion, routes=routes))]


def the_loop(ranks: CaseRanks) -> dict[str, Any]:
    """Two steps of the whole loop with routes of the real engine; then the second one again, from the journal alone."""
    folder, found = ranks.folder / "loop", {}
    model = ranks.folder / "wide"  # of sizes that vLLM's kernels take
    layout = ["parallel.tensor=1", "parallel.data=2", "parallel.expert=2", f"model.path={model}"]
    # They are sampled one by one.
    few = ["trainer.rollouts_per_prompt=4", "checkpoint.every_steps=1", *SHORT, "trainer.prompts_per_step=2"]
    few += ["publish.canary_prompts=2", "publish.canary_tokens=4"]
    wanted = [*layout, "rollout.routing_replay=true", "trainer.steps=2", *few]
    config = resolved(load_config(EXAMPLE, wanted))
    os.makedirs(folder / "rollouts", exist_ok=True)
    for again in (False, True):
        if again and ranks.rank == 0:
            shutil.rmtree(folder / "checkpoints" / "step-000002")
        torch.distributed.barrier()
        Watched.mute = again
        cluster = ranks.arrange(**config.parallel.model_dump())
        train(build(folder, config, cluster, InProcess(coin), interrupt=Interrupt(), engine_of=Watched))
    found["rows"] = rows_of(folder)
    frames = [frame for path in step_files(folder / "journal") for frame in read_frames(path)]
    found["scores"] = [frame.header["rerouted"] for frame in frames if frame.header["kind"] == "scores"]
    found["shapes"] = [shape for f in frames if f.header["kind"] == "group" for shape in f.header["routes"]]
    return found


ALONE = [((3, 4, 5), tuple(range(6, 20))), ((7,), (1, 2, 3))]
# World size → name → (data, further options of the layout, megatron.extra): none of them pads a sequence, which would
# change how many rows an expert multiplies at once, and so perhaps the last bit.
PLAIN: dict[int, dict[str, tuple[int, dict[str, Any], dict[str, Any]]]] = {
    1: {"alone": (1, {}, {})},
    2: {"ep2": (2, {"expert": 2}, {}), "pp2 recompute": (1, {"pipeline": 2}, FULL)},
}
PLAIN_IMPLIED: dict[int, dict[str, tuple[int, dict[str, Any], dict[str, Any]]]] = {
    1: {"recompute": (1, {}, FULL)},
    2: {"pp2": (1, {"pipeline": 2}, {})},
}
# World size → name → (model, tensor, data, megatron.extra and further options of the layout)
GRID: dict[int, dict[str, tuple[str, int, int, dict[str, Any]]]] = {
    1: {
        "alone": ("moe", 1, 1, {}),
        "raw": ("moe_raw", 1, 1, {}),
        "full": ("moe", 1, 1, {"extra": FULL}),
        "two_of_five": ("moe", 1, 1, {"extra": FULL | {"recompute_method": "block", "recompute_num_layers": 2}}),
        "moe": ("moe", 1, 1, {"extra": MOE}),
    },
    2: {
        "tp2_sp": ("moe", 2, 1, {"sequence": True}),
        "tp2_sp_full": ("moe", 2, 1, {"sequence": True, "extra": FULL}),
        "tp2_ep2_etp1_sp": ("moe", 2, 1, {"sequence": True, "expert": 2, "expert_tensor": 1}),
        "pp2": ("moe", 1, 1, {"pipeline": 2}),
        "pp2_full": ("moe", 1, 1, {"pipeline": 2, "extra": FULL}),
        "pp2_moe": ("moe", 1, 1, {"pipeline": 2, "extra": MOE}),
        "pp2_vp2": ("moe", 1, 1, {"pipeline": 2, "virtual": 2}),
        "pp2_vp2_full": ("moe", 1, 1, {"pipeline": 2, "virtual": 2, "extra": FULL}),
        "pp2_uneven": ("moe", 1, 1, {"pipeline": 2, "stages": [2, 3], "extra": FULL}),
        "dp2": ("moe", 1, 2, {}),
        "ep2": ("moe", 1, 2, {"expert": 2}),
        "ep2_full": ("moe", 1, 2, {"expert": 2, "extra": FULL}),
        "cp2": ("moe", 1, 1, {"context": 2}),
        "cp2_ep2_full": ("moe", 1, 1, {"context": 2, "expert": 2, "extra": FULL}),
    },
    4: {
        "tp2_cp2_ep2_sp": ("moe", 2, 1, {"context": 2, "expert": 2, "sequence": True}),
        "tp2_pp2_sp_full": ("moe", 2, 1, {"pipeline": 2, "sequence": True, "extra": FULL}),
        "cp2_pp2_full": ("moe", 1, 1, {"context": 2, "pipeline": 2, "extra": FULL}),
        "ep2_pp2_vp2_full": ("moe", 1, 2, {"expert": 2, "pipeline": 2, "virtual": 2, "extra": FULL}),
        "tp2_dp2_ep4_etp1_sp": ("moe", 2, 2, {"expert": 4, "expert_tensor": 1, "sequence": True}),
    },
}
FURTHER = {
    1: [own_routes_change_nothing, each_micro_batch_has_its_own, an_exception_leaves_nothing],
    2: [own_routes_change_nothing, canary, the_loop],
    4: [],
}
CASES = {
    world: [_case(replayed, f"replayed_{name}", *cell) for name, cell in cells.items()] for world, cells in GRID.items()
}
# What others imply, with recomputation or another dimension beside: `make soak` runs them.
IMPLIED = tuple(
    f"replayed_{name}"
    for name in (
        *("full", "tp2_sp", "pp2", "pp2_full", "pp2_vp2", "pp2_vp2_full", "dp2", "ep2", "ep2_full", "cp2"),
        *("tp2_pp2_sp_full", "cp2_pp2_full", "tp2_dp2_ep4_etp1_sp"),
    )
)
for _made in CASES.values():
    for _one in _made:
        _one.__module__ = __name__
        globals()[_one.__name__] = _one
