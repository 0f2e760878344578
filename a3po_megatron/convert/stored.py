"""HF tensors ↔ the tensors of a Megatron checkpoint (`torch_dist`), whole and without ranks. Pure.

Megatron-Core writes a model under names that no layout changes: a parameter of layer l is row l of a tensor that stacks
all layers, an expert's is [l, e] of one that stacks layers and experts, and tensor-parallel shards are slices of the
whole. That whole is what model/cut.py says of `Stored`:

    checkpoint[key][lead][row : row + rows]  ==  hf_tensor[start : start + rows]

Rows that pad the vocabulary are no part of it; Megatron allows for their absence when it loads.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from ..model.cut import Stored, cut
from ..model.facts import ModelFacts


@dataclass(frozen=True)
class Span:
    """Rows of one HF tensor in the checkpoint."""

    tensor: str  # HF name
    start: int  # row in the HF tensor
    row: int  # row in the parameter
    rows: int


@dataclass(frozen=True)
class Parameter:
    """One parameter of the undivided model."""

    key: str  # of the checkpoint's tensor
    lead: tuple[int, ...]  # its indices in the stacked dimensions
    shape: tuple[int, ...]  # without them
    spans: tuple[Span, ...]  # in the order of its rows; together all of them
    linear: bool  # a linear layer's weight
    dtype: str | None  # what it is kept in, whatever the model's dtype; None: as the model


def stored_parameters(facts: ModelFacts) -> list[Parameter]:
    """Returns every parameter of the model, in the order of the layers."""
    parameters = []
    by_parameter = itertools.groupby(cut(facts, Stored()), key=lambda p: (p.parameter, p.hf.layer, p.hf.expert))
    for (key, layer, expert), group in by_parameter:
        pieces, spans = list(group), []
        for piece in pieces:
            # Without parallelism every piece is whole along all but its first dimension.
            row, start, rows = (piece.offset, piece.start, piece.length) if piece.dim == 0 else (0, 0, piece.shape[0])
            spans.append(Span(piece.tensor, start, row, rows))
        lead = tuple(number for number in (layer, expert) if number is not None)
        shape = (sum(span.rows for span in spans), *pieces[0].shape[1:])
        parameters.append(Parameter(key, lead, shape, tuple(spans), pieces[0].hf.linear, pieces[0].hf.dtype))
    return parameters


def stored_shapes(facts: ModelFacts, parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Key → shape of the checkpoint's tensor, stacked dimensions included."""
    counts = (facts.layers, facts.experts.count if facts.experts else 0)
    return {p.key: (*counts[: len(p.lead)], *p.shape) for p in parameters}


def stored_objects(facts: ModelFacts, parameters: Iterable[Parameter]) -> list[str]:
    """The keys of the objects, all of them empty, without which Megatron's loader refuses a checkpoint.

    Every linear layer of Megatron has an `_extra_state`, whether or not there is any FP8 state to keep in it.
    """
    counts = (facts.layers, facts.experts.count if facts.experts else 0)
    keys = []
    for parameter in (parameter for parameter in parameters if parameter.linear):
        layer = parameter.key.removesuffix(".weight")
        index, size = (".".join(map(str, numbers)) for numbers in (parameter.lead, counts[: len(parameter.lead)]))
        keys.append(f"{layer}._extra_state/shard_{index}_{size}")
    return keys
