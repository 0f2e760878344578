"""Cases for the learner's throughput switches on real ranks (tests/test_switches.py)."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import optimizer_config

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.shaping import shape
from a3po_megatron.algorithm.statistics import batch_metrics, batch_sums
from a3po_megatron.batch import Collected
from a3po_megatron.config import Config, Settings, ShapingOptions
from a3po_megatron.learner import overlap
from a3po_megatron.learner.learner import Learner, Update
from a3po_megatron.model.read import read_facts
from tests.distributed.cases_learner import LR, STEP, as_sampled, batch_of, same_weights, settings, share
from tests.harness.ranks import CaseRanks
from tests.harness.saves_at_once import save
from tests.harness.tiny_models import CLIPPED, make_checkpoint, make_collected

BUCKET = 4_000  # elements: several buckets, of which the last is the head's alone where the model has one
MINI_BATCHES = 3

# Name → (model, tensor, data, further options of the layout).
LAYOUTS: dict[int, dict[str, tuple[str, int, int, dict[str, Any]]]] = {
    2: {
        "dp2": ("qwen3", 1, 2, {}),
        "dp2 untied": ("qwen2", 1, 2, {}),
        "cp2": ("qwen3", 1, 1, {"context": 2}),
        "ep2": ("qwen3_moe", 1, 2, {"expert": 2}),
    },
    4: {
        "tp2 sp dp2": ("qwen3", 2, 2, {"sequence": True}),
        "pp2 vp2 dp2": ("qwen3_deep", 1, 2, {"pipeline": 2, "virtual": 2}),
    },
}
OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
SWITCHES: dict[str, dict[str, Any]] = {
    "reduce": {"overlap_grad_reduce": True},
    "reduce and gather": OVERLAP,
    "selective": {"recompute": "selective"},
    "full": {"recompute": "full"},
    "all": OVERLAP | {"recompute": "full"},
}


def with_switches(made: Settings, **learner: Any) -> Settings:
    return made.model_copy(update={"learner": made.learner.model_copy(update=learner)})


@contextmanager
def small_buckets() -> Iterator[None]:
    """Megatron's buckets are of 40 million elements and more."""
    config = functools.partial(DistributedDataParallelConfig, bucket_size=BUCKET)
    with mock.patch.object(overlap, "DistributedDataParallelConfig", config):
        yield


# What implies the others; `make soak` has every switch in every layout.
CROSSING = {2: ("dp2 untied", "ep2"), 4: ("pp2 vp2 dp2",)}
IMPLYING = {2: ("reduce and gather", "selective", "all"), 4: ("all",)}


def switched(ranks: CaseRanks) -> dict[str, Any]:
    return _switched(ranks, CROSSING[ranks.world], IMPLYING[ranks.world])


def all_switched(ranks: CaseRanks) -> dict[str, Any]:
    return _switched(ranks, LAYOUTS[ranks.world], SWITCHES)


def _switched(ranks: CaseRanks, layouts: Iterable[str], switches: Collection[str]) -> dict[str, Any]:
    """Of layouts and switches: whether two steps of three mini-batches, a score between them, end as without; and signs
    that the switch did what it is for."""
    found: dict[str, Any] = {}
    collected = make_collected(groups=6, size=4)
    for layout in layouts:
        kind, tensor, data, parallel = LAYOUTS[ranks.world][layout]
        folder = ranks.folder / kind
        cluster, facts = ranks.arrange(tensor, data=data, **parallel), read_facts(folder)
        mine = share(collected, cluster.coordinates.data, cluster.data)
        # Clipped, a norm that is summed in another order would move all weights.
        options = settings(folder, tensor, data, parallel=parallel, optimizer={"clip_grad": 0.0})
        learner = Learner(cluster, facts, options)
        plain_passes = _count_mlps(learner)
        plain = _two_steps(learner, mine)
        for name in switches:
            with small_buckets():
                learner = Learner(cluster, facts, with_switches(options, **SWITCHES[name]))
            passes = _count_mlps(learner)
            other = _two_steps(learner, mine)
            groups = [group for chunk in learner.chunks for group in chunk.bucket_groups]
            found[f"{layout}, {name}"] = {
                "equal": all(torch.equal(a, b) for a, b in zip(plain[0], other[0], strict=True)),
                "told": [[u.reported, u.gradient_norm] for u in (*plain[1], *other[1])],
                "buckets": len(groups),
                "in the backward": all(not group.is_first_batch for group in groups),
                "passes": passes[0] / plain_passes[0],
            }
    return found


def _two_steps(learner: Learner, mine: Collected) -> tuple[list[torch.Tensor], list[Update]]:
    """Every weight, and the log-probs of a score between the steps."""
    first = learner.update(as_sampled(mine, MINI_BATCHES), CLIPPED)
    fresh = as_sampled(mine, MINI_BATCHES)
    fresh.old_logprobs = None
    between = learner.score(fresh).old_logprobs
    assert between is not None
    second = learner.update(as_sampled(mine, MINI_BATCHES), CLIPPED)
    return [*(p.detach().clone() for p in learner.parameters().values()), between], [first, second]


def _count_mlps(learner: Learner) -> list[int]:
    """How often the first layer's MLP computes in training, from now on."""
    count = [0]

    def counted(module: torch.nn.Module, _: Any) -> None:
        count[0] += module.training

    mlp = learner.chunks[0].module.decoder.layers[0].mlp
    # Megatron's mixture of experts is entered once, and computes again what is within.
    getattr(mlp, "router", mlp).register_forward_pre_hook(counted)
    return count


# Where there is no Transformer Engine, Megatron compares its version all the same.
@mock.patch.object(optimizer_config, "is_te_min_version", mock.Mock(return_value=False))
def on_host(ranks: CaseRanks) -> dict[str, Any]:
    """Masters and moments on the host, in bf16 training: three updates beside those of Megatron's own optimizer, whose
    checkpoint each takes up from the other."""
    kind, found = "qwen3", {}
    folder, collected = ranks.folder / kind, make_collected(groups=6, size=4)
    layouts: list[tuple[int, dict[str, int]]] = [(ranks.world, {})]
    if ranks.world > 1:
        layouts.append((1, {"pipeline": ranks.world}))
    for data, parallel in layouts:
        cluster, facts = ranks.arrange(1, data=data, **parallel), read_facts(folder)
        mine = share(collected, cluster.coordinates.data, cluster.data)
        options = {
            on: settings(
                folder,
                1,
                data,
                model={"dtype": "bfloat16"},
                parallel=parallel,
                optimizer={"on_host": on, "weight_decay": 0.1},
            )
            for on in (False, True)
        }
        learners = {on: Learner(cluster, facts, made) for on, made in options.items()}
        updates = {
            on: [each.update(as_sampled(mine, MINI_BATCHES), CLIPPED) for _ in range(2)]
            for on, each in learners.items()
        }
        states = {on: _states(each) for on, each in learners.items()}
        target = ranks.folder / f"host-{ranks.world}-{data}"
        ends: dict[str, Any] = {}
        for on, learner in learners.items():
            place = target / str(on)
            save(learner, place)
            learner.update(as_sampled(mine, MINI_BATCHES), CLIPPED)
            for of, made in options.items():
                again = Learner(cluster, facts, made, place)
                taken = _states(again)
                again.update(as_sampled(mine, MINI_BATCHES), CLIPPED)
                ends[f"{on} by {of}"] = {
                    "taken": all(torch.equal(taken[name], value) for name, value in states[on].items()),
                    "weights": same_weights(learner, again),
                    "after": _apart(_states(learner), _states(again)),
                }
        found[f"data {data} {parallel}"] = {
            "apart": _apart(states[False], states[True]),
            "norms": [[u.gradient_norm for u in each] for each in updates.values()],
            "ends": ends,
        }
    return found


def _states(learner: Learner) -> dict[str, torch.Tensor]:
    """This rank's share of float32 masters and moments as a checkpoint holds them."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values

    tensors = [each for each in nested_values(learner.sharded_state()["optimizer"]) if hasattr(each, "key")]
    return {each.key: each.data.clone() for each in tensors if isinstance(getattr(each, "data", None), torch.Tensor)}


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two learners' states, relative to each tensor's largest value."""
    assert a.keys() == b.keys()
    apart = [float((a[n] - b[n]).abs().max() / a[n].abs().max().clamp(min=1e-12)) for n in a if a[n].numel()]
    return max(apart, default=0.0)


def adam_by_hand(ranks: CaseRanks) -> dict[str, float]:
    """Two updates of weights on the host's AdamW against AdamW in float64, along the same gradients."""
    from a3po_megatron.compat.host_adam import HostAdam

    generator = torch.Generator().manual_seed(1)
    shapes = [(7, 5), (3,), (11,)]
    weights = [torch.nn.Parameter(torch.randn(shape, generator=generator).bfloat16()) for shape in shapes]
    exact = [weight.detach().double() for weight in weights]
    moments = [(torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)) for shape in shapes]
    adam = HostAdam([{"params": weights}], lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    adam.make_states()
    for step in (1, 2):
        for index, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=generator)
            weight.decoupled_grad = gradient  # type: ignore[attr-defined]
            first, second = moments[index]
            first.mul_(0.9).add_(gradient.double(), alpha=0.1)
            second.mul_(0.95).add_(gradient.double() ** 2, alpha=0.05)
            exact[index] *= 1 - LR * 0.1
            mean, square = first / (1 - 0.9**step), second / (1 - 0.95**step)
            exact[index] -= LR * mean / (square.sqrt() + 1e-8)
        adam.step()
    masters = [adam.state[weight]["master_param"] for weight in weights]
    return {
        "masters": max(float((m.double() - e).abs().max()) for m, e in zip(masters, exact, strict=True)),
        "rounded": float(all(torch.equal(w, m.bfloat16()) for w, m in zip(weights, masters, strict=True))),
        "steps": float(adam.state[weights[0]]["step"]),
    }


def unscored(ranks: CaseRanks) -> dict[str, Any]:
    """`learner.old_logprobs: rollout`: what a score gives, and the update by it beside one whose batch was given the
    same log-probs."""
    folder = ranks.folder / "qwen3"
    cluster, facts = ranks.arrange(1), read_facts(folder)
    collected, options = make_collected(groups=4, size=4), settings(folder, 1, 1)
    shaping = ShapingOptions(source="rollout")
    learner = Learner(cluster, facts, with_switches(options, old_logprobs="rollout"))
    batch = assemble(collected, Config.model_fields["advantage"].default, 2)
    batch.trained = torch.arange(len(batch.rollout_index)) % 5 > 0
    with mock.patch.object(learner.pipeline, "forward", side_effect=AssertionError("a pass over the batch")):
        batch = learner.score(batch)
    assert batch.old_logprobs is not None
    wanted = [p if t else 0.0 for p, t in zip(batch.rollout_logprobs.tolist(), batch.trained.tolist(), strict=True)]
    metrics = batch_metrics(batch_sums(shape(batch, STEP, shaping), 0), (1.0, 1.0))
    told = learner.update(batch, CLIPPED)
    other = Learner(cluster, facts, options)
    given = assemble(collected, Config.model_fields["advantage"].default, 2)
    given.trained, given.old_logprobs = batch.trained, batch.rollout_logprobs.clone()
    given.entropy = torch.zeros_like(given.rollout_logprobs)
    same = other.update(shape(given, STEP, ShapingOptions()), CLIPPED)
    return {
        "old": batch.old_logprobs.tolist() == wanted,
        "kinds": list(learner.score_kinds),
        "entropy": batch.entropy is None,
        "metrics": {n: metrics[n] for n in ("policy/entropy", "mismatch/logprob_abs_mean", "mismatch/kl_k3")},
        "mean": metrics["policy/old_logprob_mean"],
        "weights": same_weights(learner, other),
        "told": told.reported == same.reported,
    }


def fused_swiglu(ranks: CaseRanks) -> dict[str, float]:
    """Log-probs and gradients with SwiGLU in one piece, beside those of the pieces."""
    found: dict[str, float] = {}
    for kind in ("qwen3", "qwen3_moe"):
        folder = ranks.folder / kind
        cluster, facts, collected = ranks.arrange(1), read_facts(folder), make_collected(groups=4, size=4)
        options = settings(folder, 1, 1, optimizer={"name": "sgd", "distributed": False, "clip_grad": 0.0})
        grads = []
        for fused in (False, True):
            learner = Learner(cluster, facts, with_switches(options, fused_swiglu=fused))
            assert learner.chunks[0].module.config.bias_activation_fusion is fused
            learner.update(batch_of(collected, collected), CLIPPED)
            grads.append([p.main_grad.clone() for p in learner.parameters().values()])
        found[kind] = max(
            float((a - b).abs().max() / a.abs().max().clamp(min=1e-9)) for a, b in zip(*grads, strict=True)
        )
    return found


def models(folder: Path) -> None:
    for kind in ("qwen3", "qwen2"):
        make_checkpoint(folder / kind, kind)
    make_checkpoint(folder / "qwen3_moe", "qwen3_moe", hidden_size=64)
    make_checkpoint(folder / "qwen3_deep", "qwen3", num_hidden_layers=5)
