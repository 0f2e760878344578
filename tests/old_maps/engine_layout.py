"""Which slice of which HF tensor is which slice of which tensor of vLLM's model, on which rank of an engine.

For reading back what an engine holds (weights/publish.py). Facts of vllm 0.32.0: `qkv_proj` is the rank's own
[q; k; v], k and v the same on several ranks where there are more of them than KV heads; `gate_up_proj` is its own
[gate; up]; embedding and output rows are padded to a multiple of 64, then shared out, and are one tensor where they are
tied; the experts of a layer lie in `w13_weight` [E, 2I, H], again [gate; up], and `w2_weight` [E, H, I], here each
expert by itself (`experts_apart`). Its Triton experts keep that order, others' do not.

A rank answers for all that it holds: tensors that every rank has whole are proven on each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from a3po_megatron.model.facts import ModelFacts

from .layout import EMBEDDING, FINAL_NORM, HEAD, Piece

VOCAB_MULTIPLE = 64
_EXPERTS = ".mlp.experts.routed_experts."


def engine_pieces(facts: ModelFacts, tensor: int, rank: int, experts: tuple[int, int]) -> tuple[Piece, ...]:
    """The map of one rank of an engine of `tensor` ranks; `experts`: first and last + 1 of those it holds."""
    return tuple(_pieces(facts, tensor, rank, experts))


def kv_heads_of_rank(kv_heads: int, tensor: int) -> int:
    """KV heads on each rank of an engine; one, which it shares with others, where there are fewer of them than ranks.

    Raises ValueError where neither number divides the other.
    """
    if max(kv_heads, tensor) % min(kv_heads, tensor):
        raise ValueError(f"{tensor} and {kv_heads}: neither divides the other")
    return max(1, kv_heads // tensor)


def kv_head_share(facts: ModelFacts, tensor: int, rank: int) -> tuple[int, int]:
    """Into how many shares keys and values are cut, and which of them a rank has (vLLM's QKVParallelLinear)."""
    shares = facts.kv_heads // kv_heads_of_rank(facts.kv_heads, tensor)
    return shares, rank * shares // tensor


def experts_apart(parameters: Mapping[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    """vLLM's named parameters, as pieces name them: every expert of a layer's block of them for itself."""
    found: dict[tuple[int, str], Tensor] = {}
    for name, value in parameters.items():
        if _EXPERTS in name:
            found |= {(0, f"{name}.{number}"): expert for number, expert in enumerate(value)}
        else:
            found[0, name] = value
    return found


def _pieces(facts: ModelFacts, tensor: int, rank: int, experts: tuple[int, int]) -> Iterator[Piece]:
    hidden, head_dim = facts.hidden, facts.head_dim
    q, kv = facts.heads * head_dim, facts.kv_heads * head_dim

    def whole(name: str, parameter: str, *shape: int) -> Piece:
        return Piece(name, shape, 0, parameter, 0, 0, 0, shape[0], True)

    def stacked(parameter: str, parts: Sequence[tuple[str, tuple[int, ...], tuple[int, int]]]) -> Iterator[Piece]:
        """HF tensors of which a rank has its share of rows each, one below the other; a share: (of how many, which)."""
        offset = 0
        for name, shape, (of, part) in parts:
            share = shape[0] // of
            yield Piece(name, shape, 0, parameter, 0, part * share, offset, share, True)
            offset += share

    def columns(name: str, parameter: str, rows: int, total: int, of: int = tensor, part: int = rank) -> Piece:
        share = total // of
        return Piece(name, (rows, total), 0, parameter, 1, part * share, 0, share, True)

    def vocabulary(name: str) -> Iterator[Piece]:
        share = -(-facts.vocab // VOCAB_MULTIPLE) * VOCAB_MULTIPLE // tensor
        length = min(share, facts.vocab - rank * share)
        if length > 0:
            yield Piece(name, (facts.vocab, hidden), 0, name, 0, rank * share, 0, length, True)

    mine, kv_share = (tensor, rank), kv_head_share(facts, tensor, rank)
    yield from vocabulary(EMBEDDING)
    for layer in range(facts.layers):
        prefix = f"model.layers.{layer}."
        attention = f"{prefix}self_attn."
        yield whole(f"{prefix}input_layernorm.weight", f"{prefix}input_layernorm.weight", hidden)
        for kind in ("weight", "bias") if facts.qkv_bias else ("weight",):
            yield from stacked(
                f"{attention}qkv_proj.{kind}",
                [
                    (f"{attention}{name}_proj.{kind}", (rows, hidden) if kind == "weight" else (rows,), share)
                    for name, rows, share in (("q", q, mine), ("k", kv, kv_share), ("v", kv, kv_share))
                ],
            )
        if facts.qk_norm:
            for name in ("q_norm", "k_norm"):
                yield whole(f"{attention}{name}.weight", f"{attention}{name}.weight", head_dim)
        yield columns(f"{attention}o_proj.weight", f"{attention}o_proj.weight", hidden, q)
        norm = f"{prefix}post_attention_layernorm.weight"
        yield whole(norm, norm, hidden)
        if facts.experts is None:
            parts = [(f"{prefix}mlp.{half}_proj.weight", (facts.ffn, hidden), mine) for half in ("gate", "up")]
            yield from stacked(f"{prefix}mlp.gate_up_proj.weight", parts)
            yield columns(f"{prefix}mlp.down_proj.weight", f"{prefix}mlp.down_proj.weight", hidden, facts.ffn)
            continue
        yield whole(f"{prefix}mlp.gate.weight", f"{prefix}mlp.gate.weight", facts.experts.count, hidden)
        first, end = experts
        # An expert-parallel engine keeps its experts whole.
        cut = (1, 0) if end - first < facts.experts.count else (tensor, rank)
        for local, number in enumerate(range(first, end)):
            expert, ffn = f"{prefix}mlp.experts.{number}.", facts.experts.ffn
            parts = [(f"{expert}{half}_proj.weight", (ffn, hidden), cut) for half in ("gate", "up")]
            yield from stacked(f"{prefix[:-1]}{_EXPERTS}w13_weight.{local}", parts)
            yield columns(f"{expert}down_proj.weight", f"{prefix[:-1]}{_EXPERTS}w2_weight.{local}", hidden, ffn, *cut)
    yield whole(FINAL_NORM, FINAL_NORM, hidden)
    if not facts.tied:
        yield from vocabulary(HEAD)
