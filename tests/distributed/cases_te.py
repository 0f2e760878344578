"""The learner on Transformer Engine's layer spec, of which tests/fake_te is a stand-in (tests/test_te.py)."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from a3po_megatron.checkpoint.store import Saving
from a3po_megatron.config import Config
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.family import read_family
from tests.distributed.cases_learner import batch_of, one_update, settings, share
from tests.distributed.runner import Case, Ranks
from tests.distributed.saving import write_whole
from tests.tiny import make_collected


def _case(name: str, kind: str, tensor: int, data: int, **parallel: Any) -> Case:
    case: Case = functools.partial(one_update, kind=kind, tensor=tensor, data=data, **parallel)
    case.__qualname__, case.__module__ = name, __name__
    globals()[name] = case
    return case


UPDATES = {
    1: [_case("dense", "qwen3", 1, 1), _case("biased", "qwen2", 1, 1), _case("experts", "qwen3_moe", 1, 1)],
    2: [
        _case("tensor", "qwen3", 2, 1),
        _case("sequence", "qwen3", 2, 1, sequence=True),
        _case("pipeline", "qwen3", 1, 1, pipeline=2),
        _case("context", "qwen3", 1, 1, context=2),
        _case("spread_experts", "qwen3_moe", 1, 2, expert=2),
        _case("cut_experts", "qwen3_moe", 2, 1, sequence=True),
    ],
}


def named(ranks: Ranks) -> list[str]:
    """Parameters of the model that the map lacks, and entries of the map that the model lacks, over layouts."""
    wrong = []
    for kind, (tensor, pipeline, expert) in itertools.product(
        ("qwen3", "qwen2", "llama31", "qwen3_moe"), ((2, 1, 1), (1, 2, 1), (1, 1, 2))
    ):
        if expert > 1 and kind != "qwen3_moe":
            continue
        parallel = {"pipeline": pipeline, "expert": expert, "sequence": tensor > 1}
        cluster = ranks.arrange(tensor, data=2 // tensor // pipeline, **parallel)
        folder = ranks.folder / kind
        # Loading refuses what the map does not cover, element for element; the shapes are the model's own.
        learner = Learner(
            cluster, read_family(folder), settings(folder, tensor, 2 // tensor // pipeline, parallel=parallel)
        )
        mine, theirs = {piece.key for piece in learner.pieces}, learner.parameters().keys()
        wrong += [f"{kind} {parallel}: {key}" for key in mine ^ theirs]
    return wrong


def fp8_config(folder: Path, tensor: int, precision: str, **learner: Any) -> Config:
    config = settings(folder, tensor, 1, model={"dtype": "bfloat16"}, parallel={"sequence": tensor > 1})
    values = config.model_dump(mode="json")
    values["learner"] |= {"precision": precision, "micro_batch_tokens": 100, **learner}
    return Config.model_validate(values).on("cpu")


def in_fp8(ranks: Ranks) -> dict[str, Any]:
    """Which modules score and update ran in which recipe, over how many tokens, for every precision."""
    import transformer_engine.pytorch as te

    collected, found = make_collected(groups=5, size=4), {}
    for kind, precision, learner in (
        ("wide", "bf16", {}),
        ("wide", "fp8-blockwise", {}),
        ("wide", "fp8-blockwise", {"bf16_layers": (1, 2)}),
        ("wide", "fp8-tensorwise", {}),
        ("wide_moe", "fp8-blockwise", {}),
    ):
        folder = ranks.folder / kind
        cluster = ranks.arrange(2, data=1, sequence=True)
        made = Learner(cluster, read_family(folder), fp8_config(folder, 2, precision, **learner))
        batch = batch_of(collected, share(collected, 0, 1))
        parts = made._micro_batches(batch, range(len(batch.rollouts)))
        te.RUNS.clear()
        scored = made.score(batch_of(collected, share(collected, 0, 1)))
        assert scored.old_logprobs is not None  # it had them: nothing ran
        batch.old_logprobs = None
        made.score(batch)
        score = list(te.RUNS)
        te.RUNS.clear()
        batch = batch_of(collected, share(collected, 0, 1))
        stats = made.update(batch)
        found[f"{kind} {precision} {learner.get('bf16_layers', '')}".strip()] = {
            "score": score,
            "update": list(te.RUNS),
            "tokens": [part.tokens.shape[1] for part in parts],
            "loss": stats["learner/loss"],
            "layers": made.family.layers,
            "dtypes": sorted({str(p.dtype) for p in made.parameters().values()}),
        }
    return found


def saved(ranks: Ranks) -> dict[str, bool]:
    """A checkpoint with Transformer Engine's extra states comes back as it was, and trains on as it would have."""
    folder, target = ranks.folder / "qwen3", ranks.folder / "saved"
    cluster, family = ranks.arrange(1, data=2), read_family(folder)
    collected = make_collected(groups=5, size=4)
    batch = functools.partial(batch_of, collected, share(collected, cluster.coordinates.data, 2))
    learner = Learner(cluster, family, settings(folder, 1, 2))
    learner.update(batch())
    if ranks.rank == 0:
        target.mkdir()
    dist.barrier()
    write_whole(Saving(learner.sharded_state(), target))
    again = Learner(cluster, family, settings(folder, 1, 2), target)
    equal = {"weights": _equal(learner, again)}
    for each in (learner, again):
        each.update(batch())
    return equal | {"after a further step": _equal(learner, again)}


def _equal(a: Learner, b: Learner) -> bool:
    theirs = b.parameters()
    return all(torch.equal(p, theirs[key]) for key, p in a.parameters().items())
