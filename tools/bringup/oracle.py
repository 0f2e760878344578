"""Qwen3 in plain PyTorch, on the CPU, in any dtype: what Transformer Engine and the engine are held against.

Written from the model's definition, one sequence at a time, with nothing of the package but the facts of its config:
no packing, no fused kernels, no shared code. tests/test_bringup.py holds it against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from a3po_megatron.model.facts import ModelFacts


def read_weights(folder: Path, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Leaves that take a gradient."""
    found = load_file(folder / "model.safetensors")
    return {name: value.to(dtype).requires_grad_() for name, value in found.items()}


def logprobs(
    weights: Mapping[str, Tensor],
    facts: ModelFacts,
    prompt: Sequence[int],
    response: Sequence[int],
    temperature: float = 1.0,
) -> Tensor:
    """Log-probs of the response's tokens, in the weights' dtype but the softmax, in float32 at least."""
    tokens = torch.tensor([*prompt, *response])
    hidden = _hidden(weights, facts, tokens[:-1])[len(prompt) - 1 :]
    head = weights["model.embed_tokens.weight" if facts.tied else "lm_head.weight"]
    logits = hidden @ head.t()
    logits = (logits if logits.dtype == torch.float64 else logits.float()) / temperature
    return torch.log_softmax(logits, dim=-1).gather(1, tokens[len(prompt) :, None])[:, 0]


def all_logprobs(
    weights: Mapping[str, Tensor], facts: ModelFacts, sequences: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[Tensor]:
    return [logprobs(weights, facts, prompt, response) for prompt, response in sequences]


def loss(found: Sequence[Tensor], old: Sequence[Tensor], advantages: Tensor) -> Tensor:
    """−Σ r A / T with r = π / π_old: the clipped objective while no ratio leaves the clip's range."""
    total = sum(
        (
            (each - before.to(each)).exp().sum() * advantage
            for each, before, advantage in zip(found, old, advantages.to(found[0]), strict=True)
        ),
        torch.zeros((), dtype=found[0].dtype),
    )
    return -total / sum(len(each) for each in found)


def _hidden(weights: Mapping[str, Tensor], facts: ModelFacts, tokens: Tensor) -> Tensor:
    """[t, H], before the output layer."""
    x = weights["model.embed_tokens.weight"][tokens]
    turn = _rope(facts, len(tokens), x.dtype)
    for number in range(facts.layers):
        layer = f"model.layers.{number}."
        x = x + _attention(
            weights, layer + "self_attn.", facts, _norm(x, weights[layer + "input_layernorm.weight"], facts), turn
        )
        inner = _norm(x, weights[layer + "post_attention_layernorm.weight"], facts)
        gate, up = (inner @ weights[f"{layer}mlp.{which}_proj.weight"].t() for which in ("gate", "up"))
        x = x + (gate * torch.sigmoid(gate) * up) @ weights[layer + "mlp.down_proj.weight"].t()
    return _norm(x, weights["model.norm.weight"], facts)


def _attention(
    weights: Mapping[str, Tensor], layer: str, facts: ModelFacts, x: Tensor, turn: tuple[Tensor, Tensor]
) -> Tensor:
    heads = {}
    for which, count in (("q", facts.heads), ("k", facts.kv_heads), ("v", facts.kv_heads)):
        heads[which] = (x @ weights[f"{layer}{which}_proj.weight"].t()).view(len(x), count, facts.head_dim)
        if facts.qk_norm and which != "v":
            heads[which] = _norm(heads[which], weights[f"{layer}{which}_norm.weight"], facts)
    q, k = (_turned(heads[which], turn) for which in ("q", "k"))
    share = facts.heads // facts.kv_heads
    k, v = (each.repeat_interleave(share, dim=1) for each in (k, heads["v"]))
    scores = torch.einsum("qhd,khd->hqk", q, k) / facts.head_dim**0.5
    future = torch.ones(len(x), len(x), dtype=torch.bool).triu(1)
    wide = scores if scores.dtype == torch.float64 else scores.float()
    mixed = torch.softmax(wide.masked_fill(future, float("-inf")), dim=-1).to(x.dtype)
    return torch.einsum("hqk,khd->qhd", mixed, v).reshape(len(x), -1) @ weights[f"{layer}o_proj.weight"].t()


def _norm(x: Tensor, weight: Tensor, facts: ModelFacts) -> Tensor:
    wide = x if x.dtype == torch.float64 else x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + facts.norm_eps)).to(x.dtype) * weight


def _rope(facts: ModelFacts, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [t, 1, head_dim]."""
    assert facts.rope_scaling is None
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    frequencies = facts.rope_theta ** -(torch.arange(0, facts.head_dim, 2, dtype=wide) / facts.head_dim)
    angles = torch.arange(tokens, dtype=wide)[:, None] * frequencies
    both = torch.cat([angles, angles], dim=-1)[:, None]
    return both.cos().to(dtype), both.sin().to(dtype)


def _turned(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-second, first], dim=-1) * turn[1]
