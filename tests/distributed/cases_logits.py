"""Logits of the learner's model and of transformers', for the same checkpoint and sequences (tests/test_logits.py)."""

from __future__ import annotations

import torch
from torch import Tensor

from a3po_megatron.config import MegatronOptions, ModelSettings, ParallelOptions
from a3po_megatron.learner.micro_batch import micro_batch
from a3po_megatron.model.build import build_model, transformer_config
from a3po_megatron.model.cut import pieces
from a3po_megatron.model.layout import layout_of
from a3po_megatron.model.read import read_facts
from a3po_megatron.weights.load import load_shards
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import KINDS, VOCAB, YARNS, hf_model

LENGTHS = (1, 2, 15, 16, 17, 40, 97, 200, 256)  # below, at and beyond the original context of 16 of llama31 and YARNS


def sequences() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in LENGTHS]


@torch.no_grad()
def our_logits(ranks: CaseRanks, kind: str, dtype: str) -> Tensor:
    """[T, V] float32, all sequences in one packed micro-batch."""
    folder, parallel, megatron = ranks.folder / kind, ParallelOptions(), MegatronOptions()
    facts, layout = read_facts(folder), layout_of(parallel)
    options = ModelSettings(path=str(folder), dtype=dtype)
    chunks = build_model(facts, layout, transformer_config(facts, parallel, options, megatron))
    here = pieces(facts, layout, layout.place(0, 0))
    load_shards(folder, facts, here, {(0, name): p for name, p in chunks[0].named_parameters()})
    packed = micro_batch([(tokens, [0]) for tokens in sequences()], [0] * len(LENGTHS))
    logits = chunks[0].eval()(packed.tokens, packed.positions, None, packed_seq_params=packed.packing)
    return logits[0].float()


@torch.no_grad()
def hf_logits(ranks: CaseRanks, kind: str, dtype: torch.dtype) -> Tensor:
    """[T, V] float32, each sequence by itself."""
    model = hf_model(ranks.folder / kind, dtype)
    return torch.cat([model(torch.tensor([tokens])).logits[0] for tokens in sequences()]).float()


def differences(ranks: CaseRanks) -> dict[str, dict[str, float]]:
    """For each kind of model: the error in float32, and that of bfloat16 beside transformers' own."""
    ranks.arrange()
    found = {}
    for kind in (*KINDS, *YARNS):
        reference = hf_logits(ranks, kind, torch.float32)
        exact = our_logits(ranks, kind, "float32")
        rounded = {"our": our_logits(ranks, kind, "bfloat16"), "their": hf_logits(ranks, kind, torch.bfloat16)}
        found[kind] = {"error": float((exact - reference).abs().max() / reference.abs().max())}
        for whose, logits in rounded.items():
            found[kind][f"{whose}_rms"] = float((logits - reference).square().mean().sqrt())
            found[kind][f"{whose}_misses"] = float((logits.argmax(1) != reference.argmax(1)).float().mean())
    return found
