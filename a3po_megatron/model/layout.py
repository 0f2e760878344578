"""Which slice of which HF tensor is which slice of which Megatron parameter, on which rank. Pure index arithmetic.

Loading, publish, export and checksums all read this one map. A `Piece` cuts both sides along the same dimension:

    parameter[.., offset : offset + length, ..]  ==  hf_tensor[.., start : start + length, ..]     along `dim`

Invariants: over the ranks of one replica every HF element has exactly one piece with `owner`; every parameter element
lies in exactly one piece, padding of the vocabulary aside.

Facts of the Megatron side (local spec): `linear_qkv` is grouped by KV head, [q … q, k, v] per group; `linear_fc1` is
[gate; up] of the *rank's own* rows; embedding and output rows are padded to a multiple of the tensor-parallel size.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import RequestError
from .family import Family

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"


@dataclass(frozen=True)
class Piece:
    tensor: str  # HF name
    shape: tuple[int, ...]  # of the whole HF tensor
    parameter: str  # Megatron name
    dim: int  # the dimension that is cut; all others are whole
    start: int  # in the HF tensor, along dim
    offset: int  # in the parameter, along dim
    length: int
    owner: bool  # this rank answers for these elements (receipts, export): one rank of a replica does

    @property
    def numel(self) -> int:
        count = self.length
        for dim, size in enumerate(self.shape):
            count *= 1 if dim == self.dim else size
        return count


def hf_tensors(family: Family) -> dict[str, tuple[int, ...]]:
    """Name → shape of every HF tensor, in the order of the layers."""
    hidden, ffn = family.hidden, family.ffn
    q, kv = family.heads * family.head_dim, family.kv_heads * family.head_dim
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (family.vocab, hidden)}
    for layer in range(family.layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        for name, rows in (("q", q), ("k", kv), ("v", kv)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
            if family.qkv_bias:
                shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
        if family.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (family.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (family.head_dim,)
        shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}mlp.gate_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}mlp.up_proj.weight"] = (ffn, hidden)
        shapes[f"{prefix}mlp.down_proj.weight"] = (hidden, ffn)
    shapes[FINAL_NORM] = (hidden,)
    if not family.tied:
        shapes[HEAD] = (family.vocab, hidden)
    return shapes


def padded_vocab(family: Family, tensor: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks: padded no further than they must be."""
    return -(-family.vocab // tensor) * tensor


def check_layout(family: Family, tensor: int) -> None:
    """Raises RequestError where the model does not divide by the tensor-parallel size."""
    for name, size in (
        ("num_attention_heads", family.heads),
        ("num_key_value_heads", family.kv_heads),
        ("intermediate_size", family.ffn),
    ):
        if size % tensor:
            raise RequestError(f"parallel.tensor = {tensor} does not divide the model's {name} = {size}")


def pieces(family: Family, tensor: int, rank: int) -> tuple[Piece, ...]:
    """The map of tensor-parallel rank `rank` of `tensor`, in the order of the layers."""
    check_layout(family, tensor)
    shapes = hf_tensors(family)
    found: list[Piece] = []

    def cut(name: str, parameter: str, dim: int, start: int, offset: int, length: int, owner: bool = True) -> None:
        if length > 0:
            found.append(Piece(name, shapes[name], parameter, dim, start, offset, length, owner))

    def whole(name: str, parameter: str) -> None:
        cut(name, parameter, 0, 0, 0, shapes[name][0], owner=rank == 0)

    def split(name: str, parameter: str, dim: int) -> None:
        share = shapes[name][dim] // tensor
        cut(name, parameter, dim, rank * share, 0, share)

    def vocabulary(name: str, parameter: str) -> None:
        share = padded_vocab(family, tensor) // tensor
        start = rank * share
        cut(name, parameter, 0, start, 0, min(share, family.vocab - start))

    def attention(hf: str, megatron: str, kind: str) -> None:
        per_group = family.heads // family.kv_heads * family.head_dim  # query rows of one KV group
        groups = family.kv_heads // tensor
        for local in range(groups):
            group, row = rank * groups + local, local * (per_group + 2 * family.head_dim)
            for name, rows in (("q", per_group), ("k", family.head_dim), ("v", family.head_dim)):
                cut(f"{hf}{name}_proj.{kind}", f"{megatron}.{kind}", 0, group * rows, row, rows)
                row += rows

    vocabulary(EMBEDDING, "embedding.word_embeddings.weight")
    for layer in range(family.layers):
        hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        whole(f"{hf}input_layernorm.weight", f"{megatron}input_layernorm.weight")
        attention(f"{hf}self_attn.", f"{megatron}self_attention.linear_qkv", "weight")
        if family.qkv_bias:
            attention(f"{hf}self_attn.", f"{megatron}self_attention.linear_qkv", "bias")
        if family.qk_norm:
            whole(f"{hf}self_attn.q_norm.weight", f"{megatron}self_attention.q_layernorm.weight")
            whole(f"{hf}self_attn.k_norm.weight", f"{megatron}self_attention.k_layernorm.weight")
        split(f"{hf}self_attn.o_proj.weight", f"{megatron}self_attention.linear_proj.weight", 1)
        whole(f"{hf}post_attention_layernorm.weight", f"{megatron}pre_mlp_layernorm.weight")
        share = family.ffn // tensor
        for half, name in enumerate(("gate", "up")):
            parameter = f"{megatron}mlp.linear_fc1.weight"
            cut(f"{hf}mlp.{name}_proj.weight", parameter, 0, rank * share, half * share, share)
        split(f"{hf}mlp.down_proj.weight", f"{megatron}mlp.linear_fc2.weight", 1)
    whole(FINAL_NORM, "decoder.final_layernorm.weight")
    if not family.tied:
        vocabulary(HEAD, "output_layer.weight")
    return tuple(found)
