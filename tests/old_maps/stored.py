"""HF tensors ↔ the tensors of a Megatron checkpoint (`torch_dist`), whole and without ranks. Pure.

Megatron-Core writes a model under names that no layout changes: a parameter of layer l is row l of a tensor that stacks
all layers, an expert's is [l, e] of one that stacks layers and experts, and tensor-parallel shards are slices of the
whole. That whole is what a model without any parallelism holds, so the map follows from `layout.pieces`:

    checkpoint[key][lead][row : row + rows]  ==  hf_tensor[start : start + rows]

The names are those that Megatron's own specs agree on (`sharded_state_dict_keys_map`): norms as Transformer Engine
fuses them. Rows that pad the vocabulary are no part of it; Megatron allows for their absence when it loads.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from a3po_megatron.model.facts import ModelFacts

from .layout import Layout, Place, pieces

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.*)")
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


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


def stored_parameters(facts: ModelFacts) -> list[Parameter]:
    """Every parameter of the model, in the order of the layers."""
    found: dict[str, list[Span]] = {}
    columns: dict[str, tuple[int, ...]] = {}
    for piece in pieces(facts, Layout(scheme="te"), Place()):
        # Without parallelism every piece is whole along all but its first dimension.
        row, start, rows = (piece.offset, piece.start, piece.length) if piece.dim == 0 else (0, 0, piece.shape[0])
        found.setdefault(piece.parameter, []).append(Span(piece.tensor, start, row, rows))
        columns[piece.parameter] = piece.shape[1:]
    return [
        Parameter(*_address(name), (sum(span.rows for span in spans), *columns[name]), tuple(spans))
        for name, spans in found.items()
    ]


def stored_shapes(facts: ModelFacts, parameters: Iterable[Parameter]) -> dict[str, tuple[int, ...]]:
    """Key → shape of the checkpoint's tensor, stacked dimensions included."""
    counts = (facts.layers, facts.experts.count if facts.experts else 0)
    return {p.key: (*counts[: len(p.lead)], *p.shape) for p in parameters}


def stored_objects(facts: ModelFacts, parameters: Iterable[Parameter]) -> list[str]:
    """The keys of the objects, all of them empty, without which Megatron's loader refuses a checkpoint.

    Every linear layer of Megatron has an `_extra_state`, whether or not there is any FP8 state to keep in it.
    """
    counts = (facts.layers, facts.experts.count if facts.experts else 0)
    found = []
    for parameter in parameters:
        layer, _, kind = parameter.key.rpartition(".")
        if kind == "weight" and layer.rpartition(".")[2].startswith("linear_"):
            index, size = (".".join(map(str, numbers)) for numbers in (parameter.lead, counts[: len(parameter.lead)]))
            found.append(f"{layer}._extra_state/shard_{index}_{size}")
    return found


def _address(name: str) -> tuple[str, tuple[int, ...]]:
    """Key and leading indices of a parameter of the undivided model."""
    layer = _LAYER.fullmatch(name)
    if layer is None:
        return name, ()
    number, rest = int(layer[1]), layer[2]
    expert = _EXPERT.fullmatch(rest)
    if expert is None:
        return f"decoder.layers.{rest}", (number,)
    return f"decoder.layers.mlp.experts.experts.{expert[1]}.weight", (number, int(expert[2]))
