"""A family from outside the package: Qwen3's experts behind a router with a bias, which Megatron keeps as a buffer.

As DeepSeek-V3 has it (`e_score_correction_bias`, float32 whatever the model's dtype), chosen by sigmoids.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from megatron.core import dist_checkpointing
from safetensors.torch import load_file, save_file
from torch import Tensor

from a3po_megatron.config import Config
from a3po_megatron.errors import PublishError
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.cut import EngineRank, cut, tensors
from a3po_megatron.model.facts import ModelFacts, Param, Part
from a3po_megatron.model.families.moe import QWEN3_MOE
from a3po_megatron.model.families.registry import FAMILIES
from a3po_megatron.model.read import read_facts
from a3po_megatron.run.store import Saving
from a3po_megatron.weights.publish import Publisher
from tests.harness.ranks import CaseRanks
from tests.harness.saves_at_once import write_whole
from tests.harness.tiny_models import make_checkpoint, resolved

BIAS = "mlp.gate.e_score_correction_bias"


def layer(facts: ModelFacts) -> tuple[Param, ...]:
    assert facts.experts is not None
    parts = (Part(BIAS, facts.experts.count),)
    bias = Param("mlp.router.expert_bias", BIAS, parts, width=None, buffer=True, dtype="float32")
    return *QWEN3_MOE.layer(facts), bias


def megatron(facts: ModelFacts) -> dict[str, Any]:
    return {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


BIASED = dataclasses.replace(QWEN3_MOE, architecture="BiasedForCausalLM", layer=layer, megatron=megatron)
LAYOUTS: dict[str, dict[str, Any]] = {
    "experts": {"data": 2, "expert": 2},
    "stages": {"pipeline": 2},
    "tensor": {"tensor": 2, "sequence": True},
}


def biased_checkpoint(folder: Path) -> Path:
    """Weights in bfloat16, biases in float32 that bfloat16 cannot hold."""
    make_checkpoint(folder, "qwen3_moe")
    config = json.loads((folder / "config.json").read_text())
    config |= {"architectures": [BIASED.architecture], "dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(7)
    found = {name: tensor.bfloat16() for name, tensor in load_file(folder / "model.safetensors").items()}
    for number in range(config["num_hidden_layers"]):
        bias = 0.5 * torch.randn(config.get("num_experts", config.get("num_local_experts")), generator=generator)
        assert not torch.equal(bias, bias.bfloat16().float())
        found[f"model.layers.{number}.{BIAS}"] = bias
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    return folder


class Recording:
    """Stands for an engine of this family, which vLLM does not have: keeps what it is sent where its map says."""

    dtype, receipt_strength, weight_version, fused_experts = torch.bfloat16, "engine", 0, False

    def __init__(self, facts: ModelFacts) -> None:
        assert facts.experts is not None
        self.facts, self.got = facts, dict[str, Tensor]()
        self.pieces = cut(facts, EngineRank(1, 0, (0, facts.experts.count)))

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self.got = {name: tensor.clone() for name, tensor in stream}

    def holdings(self) -> Any:
        held: dict[tuple[int, str], Tensor] = {}
        for piece in sorted(self.pieces, key=lambda piece: piece.offset):
            part = self.got[piece.tensor].narrow(piece.dim, piece.start, piece.length)
            held[piece.key] = torch.cat([held[piece.key], part]) if piece.key in held else part
        return self.pieces, held

    def forget(self) -> None:
        pass


class OneBitOff(Recording):
    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        super().load(stream)
        self.got[f"model.layers.1.{BIAS}"].view(torch.int32)[0] ^= 1


def _bits_differ(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    alike = found.keys() == wanted.keys()
    assert alike, found.keys() ^ wanted.keys()
    return [
        name
        for name, tensor in wanted.items()
        if found[name].dtype != tensor.dtype
        or not torch.equal(found[name].contiguous().view(torch.uint8), tensor.contiguous().view(torch.uint8))
    ]


def a_routers_bias(ranks: CaseRanks) -> dict[str, Any]:
    with mock.patch.dict(FAMILIES, {BIASED.architecture: BIASED}):
        return _loaded_published_and_saved(ranks)


def _loaded_published_and_saved(ranks: CaseRanks) -> dict[str, Any]:
    source = ranks.folder / "model"
    stored = load_file(source / "model.safetensors")
    found = {}
    for name, parallel in LAYOUTS.items():
        wanted = Config.model_validate(
            {
                "model": {"path": str(source), "dtype": "bfloat16"},
                "data": {"path": str(source / "config.json")},
                "parallel": parallel,
                "publish": {"canary_prompts": 0, "bucket_bytes": 4096},
            }
        )
        config, facts = resolved(wanted), read_facts(source)
        cluster = ranks.arrange(**config.parallel.model_dump())
        learner = Learner(cluster, facts, config)
        publisher = Publisher(cluster, facts, learner.layout, config.publish, [])
        engine = Recording(facts)
        receipt = publisher.publish(learner.parameters(), learner.logprobs, engine)  # type: ignore[arg-type]
        exported = ranks.folder / f"{name}-exported"
        publisher.export(learner.parameters(), torch.bfloat16, source, exported)
        found[name] = {
            "published otherwise": _bits_differ(engine.got, stored),
            "exported otherwise": _bits_differ(load_file(exported / "model.safetensors"), stored),
            "strength": receipt.strength,
            "bytes": receipt.bytes - sum(tensor.nbytes for tensor in stored.values()),
        }
        try:
            publisher.publish(learner.parameters(), learner.logprobs, OneBitOff(facts))  # type: ignore[arg-type]
            found[name]["one bit"] = "unnoticed"
        except PublishError as error:
            found[name]["one bit"] = str(error)
        found[name]["saved otherwise"] = _saved_otherwise(ranks, name, learner)
        pair = ((3, 4, 5), (6, 7, 8, 9, 10))
        before = learner.logprobs([pair])[0]
        for (_, parameter), tensor in learner.parameters().items():
            if parameter.endswith("expert_bias"):
                tensor.copy_(torch.linspace(9, -9, len(tensor)))
        found[name]["it chooses"] = not torch.equal(learner.logprobs([pair])[0], before)
    fixed = {name for name, tensor in tensors(facts).items() if tensor.dtype}
    assert fixed == {name for name in stored if name.endswith(BIAS)}
    return found


def _saved_otherwise(ranks: CaseRanks, name: str, learner: Learner) -> list[str]:
    """What a checkpoint of Megatron's gives back otherwise."""
    folder = ranks.folder / f"{name}-saved"
    folder.mkdir(exist_ok=True)
    wanted = {key: value.detach().clone() for key, value in learner.parameters().items()}
    state = {part: value for part, value in learner.sharded_state().items() if part != "optimizer"}
    write_whole(Saving(state, folder))
    with torch.no_grad():
        for value in learner.parameters().values():
            value.fill_(7.0)
    state = {part: value for part, value in learner.sharded_state().items() if part != "optimizer"}
    loaded = dist_checkpointing.load(state, str(folder))
    for chunk in learner.chunks:
        chunk.module.load_state_dict(loaded["model"])
    return [str(key) for key, value in learner.parameters().items() if not torch.equal(value, wanted[key])]
