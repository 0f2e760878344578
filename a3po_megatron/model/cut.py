"""Who holds which piece of which HF tensor, under which name. Pure index arithmetic over the families' tables.

    parameter[.., offset : offset + length, ..]  ==  hf_tensor[.., start : start + length, ..]     along `dim`

`cut` gives the pieces of one holder: a rank of the learner (LearnerRank), a rank of an engine (EngineRank), a Megatron
checkpoint (Stored). Loading, publish, export, conversion, checksums, verify and the plan of memory all read them.

Invariants: over the ranks of one replica every HF element has exactly one piece with `owner`; every element of a
parameter lies in exactly one piece, padding of the vocabulary aside. A rank of an engine answers for all that it holds:
tensors that every rank has whole are proven on each.

Of the learner, a tied model with PP > 1 has its embedding on the first stage and a copy as output layer on the last; of
vllm 0.32.0, embedding and output rows are padded to a multiple of 64, then shared out, and are one tensor where they
are tied; keys and values are the same on several ranks where there are more of them than KV heads.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal, Protocol

from .facts import Cut, Family, ModelFacts, Param
from .families import dense
from .families.registry import FAMILIES
from .layout import Layout, Place, check_layout, padded_vocab

VLLM_VOCABULARY = 64  # of which its padded vocabulary is a multiple


@dataclass(frozen=True)
class HfTensor:
    """One tensor of an HF checkpoint."""

    name: str
    shape: tuple[int, ...]
    layer: int | None = None  # None: it stands outside the layers
    expert: int | None = None  # whose it is; None: all tokens pass it
    kind: tuple[int, int] = (0, 0)  # which of its block's parameters, which of that one's parts
    cut: Cut = "whole"
    linear: bool = False  # a linear layer's weight: what computing in FP8 quantises
    buffer: bool = False  # Megatron keeps it as a buffer
    dtype: str | None = None  # what it is kept in, whatever the model's dtype; None: as the model

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Piece:
    hf: HfTensor
    chunk: int  # which of the rank's model chunks (virtual stages) holds the parameter
    parameter: str  # its name within the chunk
    dim: int  # the dimension that is cut; all others are whole
    start: int  # in the HF tensor, along dim
    offset: int  # in the parameter, along dim
    length: int
    owner: bool  # this rank answers for these elements (receipts, export): one rank of a replica does
    numel: int = field(init=False, repr=False, compare=False)

    @property
    def tensor(self) -> str:
        return self.hf.name

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole HF tensor."""
        return self.hf.shape

    @property
    def key(self) -> tuple[int, str]:
        """The parameter, among all of the rank's model chunks."""
        return self.chunk, self.parameter

    def __post_init__(self) -> None:
        shape = self.hf.shape
        object.__setattr__(self, "numel", math.prod(shape) // shape[self.dim] * self.length)


@dataclass(frozen=True)
class Block:
    """Parameters that stand together: those of one layer, or what stands before or behind the layers."""

    where: int | Literal["first", "last"]
    params: tuple[Param, ...]
    chunk: int = 0
    prefix: str = ""  # of the holder's names


@dataclass(frozen=True)
class Share:
    """Which part of a parameter one holder has."""

    name: str  # within the block
    # What is laid one below the other: of each of the parameter's parts (of how many shares, which of them), once or,
    # where the rows of the parts are interleaved, in turns.
    turns: Sequence[Sequence[tuple[int, int]]]
    owner: bool


class Holder(Protocol):
    def blocks(self, facts: ModelFacts) -> Iterator[Block]:
        """Yields the blocks of which it has something, in the order of the model."""

    def experts(self, count: int) -> range:
        """Returns which of a layer's experts it has."""

    def share(self, param: Param, number: int) -> Share:
        """Returns what it has of a parameter; of an expert's, by its number among those that it has."""

    def padded(self, rows: int) -> int:
        """Returns the rows of a vocabulary over all that share them, padding included."""


@dataclass(frozen=True)
class LearnerRank:
    """A rank of the learner, whose parameters are Megatron's."""

    layout: Layout
    place: Place

    def blocks(self, facts: ModelFacts) -> Iterator[Block]:
        layout, stage = self.layout, self.place.pipeline
        if stage == 0:
            yield Block("first", dense.first(facts))
        params = family_of(facts).layer(facts)
        for chunk, layers in enumerate(layout.chunk_layers(facts.layers, stage)):
            for local, layer in enumerate(layers):
                yield Block(layer, params, chunk, dense.MEGATRON_LAYER.format(local))
        if stage == layout.pipeline - 1:
            here = [param for param in dense.last(facts) if layout.pipeline > 1 or not param.copy]
            yield Block("last", tuple(here), layout.virtual - 1)

    def experts(self, count: int) -> range:
        share = count // self.layout.expert
        return range(self.place.expert * share, (self.place.expert + 1) * share)

    def share(self, param: Param, number: int) -> Share:
        layout, place = self.layout, self.place
        if param.experts is None:
            (of, which), first_copy = (layout.tensor, place.tensor), place.data == 0
        else:
            (of, which), first_copy = (layout.etp, place.expert_tensor), place.copy == 0
        turns, owner = [[(of, which)] * len(param.parts)], first_copy and not param.copy
        if param.cut == "whole":
            turns, owner = [[(1, 0)] * len(param.parts)], owner and which == 0
        elif param.groups is not None:
            mine = range(which * param.groups // of, (which + 1) * param.groups // of)
            turns = [[(param.groups, group)] * len(param.parts) for group in mine]
        return Share(self._name(param).format(number), turns, owner)

    def padded(self, rows: int) -> int:
        return padded_vocab(rows, self.layout.tensor)

    def _name(self, param: Param) -> str:
        return param.te if self.layout.scheme == "te" and param.te else param.learner


class Stored(LearnerRank):
    """A Megatron checkpoint: the undivided model, layers and experts under one name. Names are those that Megatron's
    own specs agree on (`sharded_state_dict_keys_map`): norms as Transformer Engine fuses them."""

    def __init__(self) -> None:
        super().__init__(Layout(scheme="te"), Place())

    def blocks(self, facts: ModelFacts) -> Iterator[Block]:
        for block in super().blocks(facts):
            layers = isinstance(block.where, int)
            yield Block(block.where, block.params, prefix=dense.STORED_LAYER if layers else "")

    def _name(self, param: Param) -> str:
        return param.stored or super()._name(param)


@dataclass(frozen=True)
class EngineRank:
    """A rank of an engine, whose parameters are vLLM's."""

    tensor: int  # how many ranks the engine has
    rank: int  # which of them
    held: tuple[int, int]  # first and last + 1 of the experts that it holds

    def blocks(self, facts: ModelFacts) -> Iterator[Block]:
        yield Block("first", dense.first(facts))
        params = family_of(facts).layer(facts)
        for layer in range(facts.layers):
            yield Block(layer, params, prefix=dense.HF_LAYER.format(layer))
        yield Block("last", tuple(param for param in dense.last(facts) if not param.copy))

    def experts(self, count: int) -> range:
        return range(*self.held)

    def share(self, param: Param, number: int) -> Share:
        of, which = self.tensor, self.rank
        if param.experts is not None and len(self.experts(param.experts)) < param.experts:
            of, which = 1, 0  # an expert-parallel engine keeps its experts whole
        turn = [(1, 0)] * len(param.parts)
        if param.cut != "whole":
            turn = [head_share(part.heads, of, which) if part.heads else (of, which) for part in param.parts]
        return Share(param.engine.format(number), [turn], True)

    def padded(self, rows: int) -> int:
        return -(-rows // VLLM_VOCABULARY) * VLLM_VOCABULARY


def cut(facts: ModelFacts, holder: Holder) -> tuple[Piece, ...]:
    """Returns what a holder has of the model, in the order of the layers.

    Raises RequestError, naming option and field, where the model does not divide by the learner's layout.
    """
    if isinstance(holder, LearnerRank):
        check_layout(facts, holder.layout)
    table = _tensors(facts)
    return tuple(piece for block in holder.blocks(facts) for piece in _cut_block(block, holder, table))


def pieces(facts: ModelFacts, layout: Layout, place: Place) -> tuple[Piece, ...]:
    """Returns what a rank of the learner has."""
    return cut(facts, LearnerRank(layout, place))


@dataclass(frozen=True)
class Held:
    """A parameter as one holder has it, padding of the vocabulary included."""

    chunk: int
    param: Param
    elements: int


def held(facts: ModelFacts, holder: Holder) -> tuple[Held, ...]:
    """Returns every parameter of a holder, in the order in which Megatron registers them: what memory planning counts.

    The same shares as `cut`, of which one layer's are those of all.
    """
    of_layer: dict[int, tuple[Held, ...]] = {}
    found: list[Held] = []
    for block in holder.blocks(facts):
        if isinstance(block.where, int):
            if block.chunk not in of_layer:
                ordered = sorted(_held_block(block, holder), key=lambda each: dense.registered(each.param))
                of_layer[block.chunk] = tuple(ordered)
            found += of_layer[block.chunk]
        else:
            found += _held_block(block, holder)
    return tuple(found)


def _held_block(block: Block, holder: Holder) -> Iterator[Held]:
    for _, param, number, _ in _each(block.params, holder.experts):
        elements = 0
        for turn in holder.share(param, number).turns:
            for part, (of, _) in zip(param.parts, turn, strict=True):
                rows = holder.padded(part.rows) if param.cut == "vocabulary" else part.rows
                elements += rows * (param.width or 1) // of
        yield Held(block.chunk, param, elements)


def _cut_block(block: Block, holder: Holder, table: _Tensors) -> Iterator[Piece]:
    for index, param, number, expert in _each(block.params, holder.experts):
        share = holder.share(param, number)
        name, offset = block.prefix + share.name, 0
        for turn in share.turns:
            for part, (of, which) in enumerate(turn):
                hf = table[block.where, index, part, expert]
                dim = 1 if param.cut == "columns" else 0
                size = (holder.padded(hf.shape[0]) if param.cut == "vocabulary" else hf.shape[dim]) // of
                length = min(size, hf.shape[dim] - which * size)
                if length > 0:
                    yield Piece(hf, block.chunk, name, dim, which * size, offset, length, share.owner)
                offset += size


def _each(params: Sequence[Param], held: Callable[[int], range]) -> Iterator[tuple[int, Param, int, int | None]]:
    """Every parameter, what experts have expert by expert: which of the block's, itself, the expert's number on the
    holder and in the model."""
    for experts, group in itertools.groupby(enumerate(params), key=lambda item: item[1].experts):
        rows = list(group)
        for number, expert in enumerate(held(experts) if experts else [None]):
            yield from ((index, param, number, expert) for index, param in rows)


# By block, parameter, part and expert
_Tensors = Mapping[tuple[int | str, int, int, int | None], HfTensor]


@cache
def _tensors(facts: ModelFacts) -> _Tensors:
    by_place: dict[tuple[int | str, int, int, int | None], HfTensor] = {}
    by_name: dict[str, HfTensor] = {}
    params = family_of(facts).layer(facts)
    layers = [Block(layer, params) for layer in range(facts.layers)]
    for block in (Block("first", dense.first(facts)), *layers, Block("last", dense.last(facts))):
        layer = block.where if isinstance(block.where, int) else None
        prefix = "" if layer is None else dense.HF_LAYER.format(layer)
        for index, param, _, expert in _each(block.params, range):
            for number, part in enumerate(param.parts):
                name = prefix + part.name.format(expert)
                tensor = HfTensor(
                    name,
                    shape=(part.rows,) if param.width is None else (part.rows, param.width),
                    layer=layer,
                    expert=expert,
                    kind=(index, number),
                    cut=param.cut,
                    linear=param.linear,
                    buffer=param.buffer,
                    dtype=param.dtype,
                )
                by_place[block.where, index, number, expert] = by_name.setdefault(
                    name, tensor
                )  # a copy is no other one
    return by_place


def family_of(facts: ModelFacts) -> Family:
    return FAMILIES[facts.architecture]


@cache
def tensors(facts: ModelFacts) -> dict[str, HfTensor]:
    """Returns every HF tensor by its name, in the order of the layers."""
    return {tensor.name: tensor for tensor in _tensors(facts).values()}


def hf_tensors(facts: ModelFacts) -> dict[str, tuple[int, ...]]:
    """Returns name → shape of every HF tensor, in the order of the layers."""
    return {name: tensor.shape for name, tensor in tensors(facts).items()}


def kv_heads_of_rank(kv_heads: int, tensor: int) -> int:
    """Returns the KV heads on each rank of an engine; one, which it shares with others, where there are fewer of them
    than ranks.

    Raises ValueError where neither number divides the other.
    """
    if max(kv_heads, tensor) % min(kv_heads, tensor):
        raise ValueError(f"{tensor} and {kv_heads}: neither divides the other")
    return max(1, kv_heads // tensor)


def head_share(heads: int, tensor: int, rank: int) -> tuple[int, int]:
    """Returns into how many shares heads are cut in an engine, and which of them a rank has (vLLM's
    QKVParallelLinear)."""
    shares = heads // kv_heads_of_rank(heads, tensor)
    return shares, rank * shares // tensor


def padded_parameters(facts: ModelFacts) -> frozenset[str]:
    """Returns Megatron's names of the parameters that have rows beyond the vocabulary."""
    ends = (*dense.first(facts), *dense.last(facts))
    return frozenset(param.learner for param in ends if param.cut == "vocabulary")


def engine_tensors(facts: ModelFacts, parameters: Mapping[str, Any]) -> dict[tuple[int, str], Any]:
    """Returns vLLM's named parameters as pieces name them: every expert of a layer's block of them for itself."""
    stacked = tuple(f".{p.engine.removesuffix('.{}')}" for p in family_of(facts).layer(facts) if p.experts)
    by_key: dict[tuple[int, str], Any] = {}
    for name, value in parameters.items():
        if stacked and name.endswith(stacked):
            by_key |= {(0, f"{name}.{number}"): expert for number, expert in enumerate(value)}
        else:
            by_key[0, name] = value
    return by_key
