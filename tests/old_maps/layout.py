"""Which slice of which HF tensor is which slice of which Megatron parameter, on which rank. Pure index arithmetic.

Loading, publish, export, conversion and checksums all read this one map. A `Piece` cuts both sides along one dimension:

    parameter[.., offset : offset + length, ..]  ==  hf_tensor[.., start : start + length, ..]     along `dim`

A *replica* is the smallest set of ranks that holds every weight: PP stages of R ranks each, where R ranks share the
dense weights as (tensor, data) and the experts as (expert tensor, expert, copies), both with the first fastest:

    j = tensor + TP * data  =  expert_tensor + ETP * (expert + EP * copy)         j = 0 … R - 1,   R = lcm(TP, ETP * EP)

Invariants: over the ranks of one replica every HF element has exactly one piece with `owner`; every parameter element
lies in exactly one piece, padding of the vocabulary aside.

Facts of the Megatron side: `linear_qkv` is grouped by KV head, [q … q, k, v] per group; `linear_fc1` is [gate; up] of
the *rank's own* rows; embedding and output rows are padded to a multiple of TP; a tied model with PP > 1 has its
embedding on the first stage and a copy as `output_layer` on the last; virtual stages deal layers out round robin. The
Transformer Engine spec fuses norms into the projections that follow them and groups a rank's experts into one module.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from a3po_megatron.config import ParallelOptions
from a3po_megatron.errors import RequestError
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.ranks.topology import stage_ranks

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
Scheme = Literal["local", "te"]


@dataclass(frozen=True)
class Layout:
    """How one replica's ranks share the model."""

    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1  # model chunks per pipeline rank
    expert: int = 1
    expert_tensor: int | None = None  # None: the same as tensor
    stages: tuple[int, ...] | None = None  # layers of each chunk in the order of the model; None: as even as they go
    scheme: Scheme = "local"

    @property
    def etp(self) -> int:
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def stage_ranks(self) -> int:
        """R: the ranks of one pipeline stage of a replica."""
        return stage_ranks(self.tensor, self.expert, self.etp)

    def places(self) -> tuple[Place, ...]:
        """The ranks of one replica, stage after stage."""
        return tuple(self.place(p, j) for p in range(self.pipeline) for j in range(self.stage_ranks))

    def place(self, pipeline: int, within: int) -> Place:
        """The rank `within` (j above) a stage."""
        return Place(
            pipeline=pipeline,
            tensor=within % self.tensor,
            data=within // self.tensor,
            expert_tensor=within % self.etp,
            expert=within // self.etp % self.expert,
            copy=within // (self.etp * self.expert),
        )

    def chunk_layers(self, layers: int, pipeline: int) -> tuple[range, ...]:
        """The layers of each model chunk of one pipeline rank."""
        counts = self.stages or _even(layers, self.pipeline * self.virtual)
        ends = [sum(counts[: k + 1]) for k in range(len(counts))]
        chunks = (virtual * self.pipeline + pipeline for virtual in range(self.virtual))
        return tuple(range(ends[k] - counts[k], ends[k]) for k in chunks)


@dataclass(frozen=True)
class Place:
    """Where one rank stands in its replica."""

    pipeline: int = 0
    tensor: int = 0
    data: int = 0
    expert_tensor: int = 0
    expert: int = 0
    copy: int = 0  # of the experts


@dataclass(frozen=True)
class Piece:
    tensor: str  # HF name
    shape: tuple[int, ...]  # of the whole HF tensor
    chunk: int  # which of the rank's model chunks (virtual stages) holds the parameter
    parameter: str  # Megatron name within the chunk
    dim: int  # the dimension that is cut; all others are whole
    start: int  # in the HF tensor, along dim
    offset: int  # in the parameter, along dim
    length: int
    owner: bool  # this rank answers for these elements (receipts, export): one rank of a replica does
    numel: int = field(init=False, repr=False, compare=False)

    @property
    def key(self) -> tuple[int, str]:
        """The parameter, among all of the rank's model chunks."""
        return self.chunk, self.parameter

    def __post_init__(self) -> None:
        object.__setattr__(self, "numel", math.prod(self.shape) // self.shape[self.dim] * self.length)


def layout_of(parallel: ParallelOptions, scheme: Scheme = "local") -> Layout:
    """The options of a layout as the map's own type."""
    return Layout(
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        virtual=parallel.virtual,
        expert=parallel.expert,
        expert_tensor=parallel.expert_tensor,
        stages=parallel.stages,
        scheme=scheme,
    )


def layer_tensors(facts: ModelFacts, layer: int) -> dict[str, tuple[int, ...]]:
    """Name → shape of one layer's HF tensors."""
    hidden, q, kv = facts.hidden, facts.heads * facts.head_dim, facts.kv_heads * facts.head_dim
    prefix = f"model.layers.{layer}."
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}input_layernorm.weight": (hidden,)}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, hidden)
        if facts.qkv_bias:
            shapes[f"{prefix}self_attn.{name}_proj.bias"] = (rows,)
    if facts.qk_norm:
        shapes[f"{prefix}self_attn.q_norm.weight"] = (facts.head_dim,)
        shapes[f"{prefix}self_attn.k_norm.weight"] = (facts.head_dim,)
    shapes[f"{prefix}self_attn.o_proj.weight"] = (hidden, q)
    shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
    if facts.experts is None:
        mlps = {f"{prefix}mlp.": facts.ffn}
    else:
        shapes[f"{prefix}mlp.gate.weight"] = (facts.experts.count, hidden)
        mlps = {f"{prefix}mlp.experts.{e}.": facts.experts.ffn for e in range(facts.experts.count)}
    for name, ffn in mlps.items():
        shapes[f"{name}gate_proj.weight"] = shapes[f"{name}up_proj.weight"] = (ffn, hidden)
        shapes[f"{name}down_proj.weight"] = (hidden, ffn)
    return shapes


def hf_tensors(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Name → shape of every HF tensor, in the order of the layers."""
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (facts.vocab, facts.hidden)}
    for layer in range(facts.layers):
        shapes |= layer_tensors(facts, layer)
    shapes[FINAL_NORM] = (facts.hidden,)
    if not facts.tied:
        shapes[HEAD] = (facts.vocab, facts.hidden)
    return shapes


def padded_vocab(facts: ModelFacts, tensor: int) -> int:
    """Rows of embedding and output layer over all tensor-parallel ranks: padded no further than they must be."""
    return -(-facts.vocab // tensor) * tensor


def check_layout(facts: ModelFacts, layout: Layout) -> None:
    """Raises RequestError, naming option and field, where the model does not divide by the layout."""

    def divide(option: str, by: int, name: str, size: int) -> None:
        if size % by:
            raise RequestError(f"{option} = {by} does not divide the model's {name} = {size}")

    divide("parallel.tensor", layout.tensor, "num_attention_heads", facts.heads)
    divide("parallel.tensor", layout.tensor, "num_key_value_heads", facts.kv_heads)
    if facts.experts is None:
        divide("parallel.tensor", layout.tensor, "intermediate_size", facts.ffn)
        if layout.expert > 1:
            raise RequestError(f"parallel.expert = {layout.expert}, but the model has no experts")
        if layout.expert_tensor is not None:
            raise RequestError("parallel.expert_tensor has no effect: the model has no experts")
    else:
        divide("parallel.expert_tensor", layout.etp, "moe_intermediate_size", facts.experts.ffn)
        divide("parallel.expert", layout.expert, "num_experts", facts.experts.count)
    chunks = layout.pipeline * layout.virtual
    if layout.virtual > 1 and layout.pipeline == 1:
        raise RequestError(f"parallel.virtual = {layout.virtual} needs parallel.pipeline > 1")
    if chunks > facts.layers:
        raise RequestError(
            f"parallel.pipeline × parallel.virtual = {chunks} chunks are more than the model's {facts.layers} layers"
        )
    if layout.stages is not None and (
        len(layout.stages) != chunks or sum(layout.stages) != facts.layers or min(layout.stages) < 1
    ):
        raise RequestError(
            f"parallel.stages = {list(layout.stages)} must give each of the {chunks} chunks at least one layer, "
            f"{facts.layers} in all"
        )


def pieces(facts: ModelFacts, layout: Layout, place: Place) -> tuple[Piece, ...]:
    """The map of one rank, in the order of the layers."""
    check_layout(facts, layout)
    return tuple(_pieces(facts, layout, place))


def _pieces(facts: ModelFacts, layout: Layout, place: Place) -> Iterator[Piece]:
    tp, rank = layout.tensor, place.tensor
    first_copy = place.data == 0
    last = layout.pipeline - 1

    def vocabulary(name: str, chunk: int, parameter: str, owner: bool) -> Iterator[Piece]:
        share = padded_vocab(facts, tp) // tp
        length = min(share, facts.vocab - rank * share)
        if length > 0:
            shape = (facts.vocab, facts.hidden)
            yield Piece(name, shape, chunk, parameter, 0, rank * share, 0, length, owner)

    if place.pipeline == 0:
        yield from vocabulary(EMBEDDING, 0, "embedding.word_embeddings.weight", first_copy)
    for chunk, layers in enumerate(layout.chunk_layers(facts.layers, place.pipeline)):
        for local, layer in enumerate(layers):
            yield from _layer(facts, layout, place, chunk, local, layer)
    if place.pipeline == last:
        chunk = layout.virtual - 1
        owner = first_copy and rank == 0
        shape = (facts.hidden,)
        yield Piece(FINAL_NORM, shape, chunk, "decoder.final_layernorm.weight", 0, 0, 0, facts.hidden, owner)
        if not facts.tied:
            yield from vocabulary(HEAD, chunk, "output_layer.weight", first_copy)
        elif layout.pipeline > 1:
            yield from vocabulary(EMBEDDING, chunk, "output_layer.weight", False)


def _layer(facts: ModelFacts, layout: Layout, place: Place, chunk: int, local: int, layer: int) -> Iterator[Piece]:
    """One layer's pieces; `local` is its number within the model chunk."""
    tp, rank = layout.tensor, place.tensor
    first_copy = place.data == 0
    hf, megatron = f"model.layers.{layer}.", f"decoder.layers.{local}."
    te = layout.scheme == "te"
    hidden, head_dim = facts.hidden, facts.head_dim
    per_group = facts.heads // facts.kv_heads * head_dim  # query rows of one KV group
    q, kv = facts.heads * head_dim, facts.kv_heads * head_dim

    def whole(name: str, parameter: str, *shape: int) -> Piece:
        return Piece(f"{hf}{name}", shape, chunk, f"{megatron}{parameter}", 0, 0, 0, shape[0], first_copy and rank == 0)

    norm = "self_attention.linear_qkv.layer_norm_weight" if te else "input_layernorm.weight"
    yield whole("input_layernorm.weight", norm, hidden)
    for kind in ("weight", "bias") if facts.qkv_bias else ("weight",):
        parameter, row = f"{megatron}self_attention.linear_qkv.{kind}", 0
        for group in range(rank * facts.kv_heads // tp, (rank + 1) * facts.kv_heads // tp):
            for name, rows, total in (("q", per_group, q), ("k", head_dim, kv), ("v", head_dim, kv)):
                shape = (total, hidden) if kind == "weight" else (total,)
                tensor = f"{hf}self_attn.{name}_proj.{kind}"
                yield Piece(tensor, shape, chunk, parameter, 0, group * rows, row, rows, first_copy)
                row += rows
    if facts.qk_norm:
        yield whole("self_attn.q_norm.weight", "self_attention.q_layernorm.weight", head_dim)
        yield whole("self_attn.k_norm.weight", "self_attention.k_layernorm.weight", head_dim)
    share = q // tp
    yield Piece(
        f"{hf}self_attn.o_proj.weight",
        (hidden, q),
        chunk,
        f"{megatron}self_attention.linear_proj.weight",
        *(1, rank * share, 0, share, first_copy),
    )
    fused = te and facts.experts is None  # before experts the norm stands alone: the router reads its output too
    norm = "mlp.linear_fc1.layer_norm_weight" if fused else "pre_mlp_layernorm.weight"
    yield whole("post_attention_layernorm.weight", norm, hidden)

    def mlp(name: str, fc1: str, fc2: str, ffn: int, parts: int, part: int, owner: bool) -> Iterator[Piece]:
        share = ffn // parts
        for half, projection in enumerate(("gate_proj", "up_proj")):
            tensor = f"{hf}{name}{projection}.weight"
            yield Piece(tensor, (ffn, hidden), chunk, fc1, 0, part * share, half * share, share, owner)
        yield Piece(f"{hf}{name}down_proj.weight", (hidden, ffn), chunk, fc2, 1, part * share, 0, share, owner)

    if facts.experts is None:
        fc1, fc2 = f"{megatron}mlp.linear_fc1.weight", f"{megatron}mlp.linear_fc2.weight"
        yield from mlp("mlp.", fc1, fc2, facts.ffn, tp, rank, first_copy)
        return
    yield whole("mlp.gate.weight", "mlp.router.weight", facts.experts.count, hidden)
    count = facts.experts.count // layout.expert
    for number in range(count):
        if te:
            fc1, fc2 = (f"{megatron}mlp.experts.linear_{fc}.weight{number}" for fc in ("fc1", "fc2"))
        else:
            inside = f"{megatron}mlp.experts.local_experts.{number}."
            fc1, fc2 = f"{inside}linear_fc1.weight", f"{inside}linear_fc2.weight"
        name, ffn = f"mlp.experts.{place.expert * count + number}.", facts.experts.ffn
        yield from mlp(name, fc1, fc2, ffn, layout.etp, place.expert_tensor, place.copy == 0)


def _even(layers: int, chunks: int) -> tuple[int, ...]:
    """As even as they go; the first and last chunk, which also hold embedding and output layer, get no remainder."""
    base, rest = divmod(layers, chunks)
    counts = [base] * chunks
    inner = [*range(1, chunks - 1), 0, chunks - 1] if chunks > 1 else [0]
    for index in inner[:rest]:
        counts[index] += 1
    return tuple(counts)
