"""Cases for the throughput switches that Transformer Engine or DeepEP take, over their stand-ins
(tests/test_te.py)."""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import torch
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.transformer.moe.token_dispatcher import MoEFlexTokenDispatcher

from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from tests.distributed.cases_learner import LR, Watched, as_hf, batch_of, share
from tests.distributed.cases_te import CLIPPED, FUSED, GROUPS, SIZE, one_update, options_for
from tests.harness.ranks import CaseRanks
from tests.harness.saves_at_once import save
from tests.harness.tiny_models import make_collected

MOMENTS = {"moment_dtype": "bfloat16", "clip_grad": 0.0}


def fused_rope_is_run(ranks: CaseRanks) -> int:
    """How often Transformer Engine's rotary embedding is asked for in one update."""
    kernel = rope_utils.fused_apply_rotary_pos_emb_thd
    with mock.patch.object(rope_utils, "fused_apply_rotary_pos_emb_thd", side_effect=kernel) as asked:
        one_update(ranks, "dense", 1, 1, switches=FUSED)
    return asked.call_count


def flex(ranks: CaseRanks) -> dict[str, Any]:
    """One update with DeepEP's dispatcher, and one with Megatron's own, in each layout of experts; and how many of
    DeepEP's were built."""
    found: dict[str, Any] = {}
    layouts: dict[str, tuple[int, int, dict[str, Any]]] = {
        "spread": (1, 2, {"expert": 2}),
        "cut": (2, 1, {"sequence": True}),
    }
    for name, (tensor, data, layout) in layouts.items():
        for dispatcher in ("alltoall", "flex"):
            begin = MoEFlexTokenDispatcher.__init__
            with mock.patch.object(MoEFlexTokenDispatcher, "__init__", autospec=True, side_effect=begin) as built:
                switches = {"expert_dispatcher": dispatcher}
                update = one_update(ranks, "experts", tensor, data, switches=switches, **layout)
            found[f"{name}, {dispatcher}"] = update | {"flex": built.call_count}
    return found


def moments_by_hand(ranks: CaseRanks) -> dict[str, float]:
    """Two updates with moments in bf16, against AdamW in float64 whose moments are rounded between the two."""
    folder = ranks.folder / "dense"
    cluster, facts, collected = ranks.arrange(1), read_facts(folder), make_collected(groups=GROUPS, size=SIZE)
    learner = Watched(cluster, facts, options_for(folder, 1, 1, optimizer=MOMENTS))
    exact = {name: each.double() for name, each in as_hf(learner, learner.parameters()).items()}
    for _ in range(2):
        learner.update(batch_of(collected, share(collected, 0, 1)), CLIPPED)
    moments = {name: (torch.zeros_like(each), torch.zeros_like(each)) for name, each in exact.items()}
    for step, gradients in enumerate(learner.gradients, start=1):
        for name, gradient in gradients.items():
            first, second = (moment.bfloat16().double() for moment in moments[name])
            first = 0.9 * first + 0.1 * gradient.double()
            second = 0.95 * second + 0.05 * gradient.double() ** 2
            moments[name] = first, second
            exact[name] = exact[name] - LR * first / (1 - 0.9**step) / ((second / (1 - 0.95**step)).sqrt() + 1e-8)
    masters = _masters(learner)
    held = {str(value.dtype) for state in _states(learner) for name, value in state.items() if name.startswith("exp")}
    weights = as_hf(learner, learner.parameters())
    return {
        "masters": _apart(masters, exact),
        "weights": float(all(torch.equal(weights[name].float(), m.bfloat16().float()) for name, m in masters.items())),
        "held": float(held == {"torch.bfloat16"}),
    }


def _states(learner: Learner) -> list[dict[str, torch.Tensor]]:
    return [state for each in learner.optimizer.chained_optimizers for state in each.optimizer.state.values()]


def _masters(learner: Learner) -> dict[str, torch.Tensor]:
    """Of one rank that holds everything: float32 masters as HF tensors."""
    (optimizer,) = learner.optimizer.chained_optimizers
    values = {}
    for key, parameter in learner.parameters().items():
        states = optimizer._get_main_param_and_optimizer_states(parameter)
        values[key] = states["param"].view(parameter.shape)
    return as_hf(learner, values)


def _apart(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name].double() - b[name]).abs().max()) for name in b)


def moments_saved(ranks: CaseRanks) -> dict[str, bool]:
    """A checkpoint of moments in bf16 comes back as it was, and trains on as it would have."""
    folder, target = ranks.folder / "dense", ranks.folder / "moments"
    cluster, facts = ranks.arrange(1, data=2), read_facts(folder)
    collected, options = make_collected(groups=GROUPS, size=SIZE), options_for(folder, 1, 2, optimizer=MOMENTS)
    batch = functools.partial(batch_of, collected, share(collected, cluster.coordinates.data, 2))
    learner = Learner(cluster, facts, options)
    learner.update(batch(), CLIPPED)
    save(learner, target)
    again = Learner(cluster, facts, options, target)
    equal = {"states": _same(_states(learner), _states(again))}
    for each in (learner, again):
        each.update(batch(), CLIPPED)
    return equal | {"after a further step": _same(_states(learner), _states(again))}


def host_saved(ranks: CaseRanks) -> dict[str, Any]:
    """A checkpoint of an optimizer on the host and one of Transformer Engine's Adam, taken up by each: counts of steps
    before and after, and how far the next update leads from the one of who saved it."""
    folder, found = ranks.folder / "dense", {}
    cluster, facts = ranks.arrange(1, data=2), read_facts(folder)
    collected = make_collected(groups=GROUPS, size=SIZE)
    batch = functools.partial(batch_of, collected, share(collected, cluster.coordinates.data, 2))
    options = {on: options_for(folder, 1, 2, optimizer={"on_host": on, "clip_grad": 0.0}) for on in (False, True)}
    for before, made in options.items():
        learner, target = Learner(cluster, facts, made), ranks.folder / f"host-{before}"
        for _ in range(2):
            learner.update(batch(), CLIPPED)
        save(learner, target)
        learner.update(batch(), CLIPPED)
        for after, taken in options.items():
            again = Learner(cluster, facts, taken, target)
            counts = [_count(again)]
            again.update(batch(), CLIPPED)
            found[f"{before} by {after}"] = {
                "counts": [*counts, _count(again)],
                "apart": max(
                    float((a.float() - b.float()).abs().max())
                    for a, b in zip(learner.parameters().values(), again.parameters().values(), strict=True)
                ),
            }
    return found


def _count(learner: Learner) -> int:
    """Updates that the optimizer says it made."""
    (optimizer,) = learner.optimizer.chained_optimizers
    groups = {int(group["step"]) for group in optimizer.optimizer.param_groups if group["params"]}
    steps = {int(state["step"]) for state in optimizer.optimizer.state.values() if "step" in state}
    (count,) = groups | steps
    return count


def _same(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]]) -> bool:
    pairs = list(zip(a, b, strict=True))
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in pairs)
