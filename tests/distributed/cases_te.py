"""The learner on Transformer Engine's layer spec: its own Python over stand-ins for its kernels, which are those of
tests/harness/te_on_cpu."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.algorithm.advantage import assemble
from a3po_megatron.algorithm.objectives.clipped import Clipped
from a3po_megatron.batch import Collected
from a3po_megatron.config import ClippedOptions, Config, Settings, TisOptions
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.read import read_facts
from tests.distributed.cases_learner import (
    LR,
    TEMPERATURE,
    Watched,
    as_hf,
    batch_of,
    literal_loss,
    literal_old,
    same_weights,
    settings,
    share,
)
from tests.harness.fp8_rounding import quantised
from tests.harness.ranks import Case, CaseRanks
from tests.harness.saves_at_once import save
from tests.harness.tiny_models import VOCAB, hf_logprobs, hf_model, hf_tensors_of, make_collected, resolved
from tools.bringup.measure import relative
from tools.bringup.rank import TINY, make_model
from tools.bringup.te import whole

GROUPS, SIZE = 5, 4
CLIP = (0.99, 99.0)  # hardly ever: a token that clips on one side only would be an error larger than all rounding
# Every size a multiple of 128, so that FP8's blocks are whole ones.
DENSE = TINY | {"vocab_size": VOCAB, "num_hidden_layers": 2}
MODELS: dict[str, dict[str, Any]] = {
    "dense": DENSE,
    "biased_untied": DENSE
    | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "tie_word_embeddings": False},
    "experts": DENSE
    | {"architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2}
    | {"moe_intermediate_size": 128, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
}
# Of all experts, weighted: in FP8 some tokens near a tie would go to others than in float64.
MODELS["all_experts"] = MODELS["experts"] | {"num_experts_per_tok": 4}


def make_models(folder: Path) -> None:
    for name, sizes in MODELS.items():
        make_model(sizes, folder=folder / name)


def rollouts_of(folder: Path) -> Collected:
    """Random rollouts, as if the model of the folder had sampled them: old log-probs are near its own."""
    model, collected = hf_model(folder, torch.bfloat16).double(), make_collected(groups=GROUPS, size=SIZE)
    with torch.no_grad():
        for group in collected.groups:
            for rollout in group.rollouts:
                exact = hf_logprobs(model, rollout.prompt.tokens, rollout.tokens, TEMPERATURE)
                rollout.logprobs = exact.float().numpy()
    return collected


CLIPPED = Clipped(ClippedOptions(clip_low=CLIP[0], clip_high=CLIP[1]), TisOptions())


def options_for(folder: Path, tensor: int, data: int, precision: str = "bf16", **sections: dict[str, Any]) -> Settings:
    switches = sections.pop("learner", {})
    parallel = {"sequence": tensor > 1, **sections.pop("parallel", {})}
    made = settings(folder, tensor, data, model={"dtype": "bfloat16"}, parallel=parallel, **sections)
    values = made.model_dump(mode="json")
    values["learner"] |= {"precision": precision, "micro_batch_tokens": 100, "bf16_layers": (0, 0), **switches}
    return resolved(Config.model_validate(values))


def literal_gradients(
    folder: Path, collected: Collected, dtype: torch.dtype, precision: str | None = None
) -> dict[str, Tensor]:
    """Of the literal loss, from the HF model with weights rounded to bf16, computed in this dtype; `precision`: with
    the operands of linear layers rounded to FP8."""
    model = hf_model(folder, torch.bfloat16).to(dtype)
    whole = assemble(collected, Config.model_fields["advantage"].default, 1)
    old = list(literal_old(whole).split(whole.lengths.tolist()))
    named = dict(model.named_parameters())
    kept = [
        p for name, p in named.items() if name.endswith(("embed_tokens.weight", "lm_head.weight", "mlp.gate.weight"))
    ]
    rounding = quantised(kept, blockwise=precision == "fp8-blockwise") if precision else contextlib.nullcontext()
    with rounding:
        literal_loss(model, collected, old, CLIP).backward()
    return hf_tensors_of({name: p.grad for name, p in named.items() if p.grad is not None})


def one_update(
    ranks: CaseRanks,
    kind: str,
    tensor: int,
    data: int,
    precision: str = "bf16",
    switches: dict[str, Any] | None = None,
    **parallel: Any,
) -> dict[str, Any]:
    """Of one update: the gradient's distance from float64, ours and that of rounding alone; how far the weights are
    from AdamW's in float64 along our own gradient; which products were computed in what."""
    import transformer_engine_torch as tex

    folder = ranks.folder / kind
    cluster, facts = ranks.arrange(tensor, data=data, **parallel), read_facts(folder)
    collected = ranks.once(f"rollouts-{kind}", lambda: rollouts_of(folder))
    exact = ranks.once(f"exact-{kind}", lambda: literal_gradients(folder, collected, torch.float64))
    # The noise that is allowed: plain PyTorch's in bf16, or that of FP8 operands in float64.
    noisy = (torch.bfloat16,) if precision == "bf16" else (torch.float64, precision)
    plain = ranks.once(f"plain-{kind}-{precision}", lambda: literal_gradients(folder, collected, *noisy))
    optimizer = {"distributed": False, "clip_grad": 0.0}
    learner = Watched(
        cluster,
        facts,
        options_for(folder, tensor, data, precision, parallel=parallel, optimizer=optimizer, learner=switches or {}),
    )
    mine = share(collected, cluster.coordinates.data, cluster.data)
    before = {name: each.double() for name, each in as_hf(learner, learner.parameters()).items()}
    tex.CALLS.clear()
    learner.update(batch_of(collected, mine), CLIPPED)
    calls = Counter(tex.CALLS)
    ours = learner.gradients[0]
    after = as_hf(learner, learner.parameters())
    # The first step of Adam: a moment over its own root; float32 masters start as the bf16 weights.
    steps = {name: LR * g.double() / (g.double().abs() + 1e-8) for name, g in ours.items()}
    wanted = {name: before[name] - step for name, step in steps.items()}
    wrong = [float(((after[n].double() - w).abs() / w.abs().clamp(min=1e-4)).max()) for n, w in wanted.items()]
    return {
        "ours": relative(whole(ours), whole(exact)),
        "plain": relative(whole(plain), whole(exact)),
        "missing": len(exact.keys() ^ ours.keys()),
        "step": max(wrong),
        "calls": dict(calls),
    }


def _case(name: str, kind: str, tensor: int, data: int, **parallel: Any) -> Case:
    case: Case = functools.partial(one_update, kind=kind, tensor=tensor, data=data, **parallel)
    case.__qualname__, case.__module__ = name, __name__
    globals()[name] = case
    return case


FP8 = ("fp8-blockwise", "fp8-tensorwise")
UPDATES = {
    1: [
        _case("dense", "dense", 1, 1),
        _case("biased_untied", "biased_untied", 1, 1),
        _case("experts", "experts", 1, 1),
        *(_case(f"{kind}_{fp8}", kind, 1, 1, precision=fp8) for kind in ("dense", "all_experts") for fp8 in FP8),
    ],
    2: [
        _case("tensor", "dense", 2, 1, sequence=False),
        _case("sequence", "dense", 2, 1, sequence=True),
        _case("sequence_untied", "biased_untied", 2, 1, sequence=True),
        _case("pipeline", "dense", 1, 1, pipeline=2),
        _case("data", "dense", 1, 2),
        _case("spread_experts", "experts", 1, 2, expert=2),
        _case("cut_experts", "experts", 2, 1, sequence=True),
    ],
}
# With switches on: what is recomputed must be what the forward computed, quantised copies of weights included.
FUSED = {"fused_rope": True, "fused_swiglu": True}
SWITCHED = [
    _case("fused", "dense", 1, 1, switches=FUSED),
    _case("fused_experts", "experts", 1, 1, switches=FUSED),
    _case("recomputed_fp8-blockwise", "dense", 1, 1, precision="fp8-blockwise", switches={"recompute": "full"}),
    _case(
        "recomputed_experts_fp8-blockwise",
        *("all_experts", 1, 1),
        precision="fp8-blockwise",
        switches={"recompute": "selective"},
    ),
]
# What the others imply, each of whose dimensions one of them has: `make soak` runs these.
IMPLIED = ("biased_untied", "experts", "dense_fp8-tensorwise", "all_experts_fp8-blockwise", "sequence", "data")


def chosen(world: int, implied: bool = False) -> list[Case]:
    return [case for case in UPDATES[world] if (case.__qualname__ in IMPLIED) is implied]


def named(ranks: CaseRanks) -> list[str]:
    """Parameters of the model that the map lacks, and entries of the map that the model lacks, over layouts."""
    wrong, kinds = [], ("dense", "biased_untied", "experts")
    for kind, (tensor, pipeline, expert) in itertools.product(kinds, ((2, 1, 1), (1, 2, 1), (1, 1, 2))):
        if expert > 1 and kind != "experts":
            continue
        parallel = {"pipeline": pipeline, "expert": expert, "sequence": tensor > 1}
        data = 2 // tensor // pipeline
        cluster, folder = ranks.arrange(tensor, data=data, **parallel), ranks.folder / kind
        # Loading refuses what the map does not cover, element for element; the shapes are the model's own.
        learner = Learner(cluster, read_facts(folder), options_for(folder, tensor, data, parallel=parallel))
        mine, theirs = {piece.key for piece in learner.pieces}, learner.parameters().keys()
        wrong += [f"{kind} {parallel}: {key}" for key in mine ^ theirs]
    return wrong


def packed(ranks: CaseRanks) -> dict[str, list[int]]:
    """Tokens of every micro-batch under tensor and sequence parallelism, by precision."""
    collected, found = make_collected(groups=GROUPS, size=SIZE), {}
    folder = ranks.folder / "dense"
    cluster = ranks.arrange(2, data=1, sequence=True)
    for precision in ("bf16", "fp8-blockwise", "fp8-tensorwise"):
        learner = Learner(cluster, read_facts(folder), options_for(folder, 2, 1, precision))
        batch = batch_of(collected, share(collected, 0, 1))
        parts = learner._micro_batches(batch, range(len(batch.rollouts)))
        found[precision] = [part.tokens.shape[1] for part in parts]
    return found


def saved(ranks: CaseRanks) -> dict[str, bool]:
    """A checkpoint with Transformer Engine's extra states comes back as it was, and trains on as it would have."""
    folder, target = ranks.folder / "dense", ranks.folder / "saved"
    cluster, facts = ranks.arrange(1, data=2), read_facts(folder)
    collected = make_collected(groups=GROUPS, size=SIZE)
    batch = functools.partial(batch_of, collected, share(collected, cluster.coordinates.data, 2))
    learner = Learner(cluster, facts, options_for(folder, 1, 2))
    learner.update(batch(), CLIPPED)
    save(learner, target)
    again = Learner(cluster, facts, options_for(folder, 1, 2), target)
    equal = {"weights": same_weights(learner, again)}
    for each in (learner, again):
        each.update(batch(), CLIPPED)
    return equal | {"after a further step": same_weights(learner, again)}
