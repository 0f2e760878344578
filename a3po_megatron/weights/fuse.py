"""All experts of a layer in one tensor, as transformers 5 packs them in memory and the engine likes them best.

    [experts, rows of all parts, columns]        its name: `fused` in the families' tables

In a checkpoint of that form an expert's tensors are rows that follow each other: where they lie is all there is to say.
On the way to the engine the experts' HF tensors are views into that memory from the beginning, so that nothing is
copied, every one of them is checked by itself, and the whole is handed on when its last part has passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.safetensors import Stored
from ..model.cut import family_of
from ..model.facts import ModelFacts
from ..model.families.dense import HF_LAYER
from .transfer import fresh


@dataclass(frozen=True)
class Whole:
    """A tensor of all experts, and where in it each of their own lies."""

    name: str
    shape: tuple[int, int, int]  # experts, rows of all parts, columns
    parts: tuple[tuple[str, int, int, int], ...]  # HF name, expert, first row, number of rows


def fused_tensors(facts: ModelFacts) -> list[Whole]:
    """Returns the tensors that transformers makes of a model's experts, layer by layer."""
    wholes, params = [], family_of(facts).layer(facts)
    for layer in range(facts.layers):
        prefix = HF_LAYER.format(layer)
        for param in params:
            if param.fused is None or param.experts is None or param.width is None:
                continue
            parts, rows = [], sum(part.rows for part in param.parts)
            for expert in range(param.experts):
                row = 0
                for part in param.parts:
                    parts.append((prefix + part.name.format(expert), expert, row, part.rows))
                    row += part.rows
            wholes.append(Whole(prefix + param.fused, (param.experts, rows, param.width), tuple(parts)))
    return wholes


def names_of_fused(names: Iterable[str], facts: ModelFacts) -> list[str]:
    """Returns what a folder holds of such tensors, by the last part of their names."""
    there = set(names)
    fused_names = [whole.name for whole in fused_tensors(facts) if there & {whole.name, f"{whole.name}.weight"}]
    return [name.rpartition(".")[2] for name in fused_names]


def experts_apart(found: Mapping[str, Stored], facts: ModelFacts) -> dict[str, Stored]:
    """The tensors of a folder, those of fused experts as one of each expert: the place of its rows.

    Raises RequestError for fused tensors of another shape. Some programs keep them transposed, [E, H, 2I] and
    [E, I, H]; no model has sizes at which both tensors look the same either way.
    """
    apart: dict[str, Stored] = {}
    fused: set[str] = set()
    for whole in fused_tensors(facts):
        for name in {whole.name, f"{whole.name}.weight"} & found.keys():
            fused.add(name)
            apart |= _apart(name, found[name], whole)
    if twice := sorted(apart.keys() & found.keys()):
        raise RequestError(f"{found[twice[0]].path}: {twice[0]} is stored by itself, and fused with other experts")
    return {name: stored for name, stored in found.items() if name not in fused} | apart


def _apart(name: str, stored: Stored, whole: Whole) -> dict[str, Stored]:
    count, rows, columns = whole.shape
    if stored.shape != whole.shape:
        turned = stored.shape == (count, columns, rows)
        raise RequestError(
            f"{stored.path}: {name} has shape {stored.shape}, the experts of config.json fused as transformers has "
            f"them {whole.shape}"
            + (": it is transposed; write it with its last two dimensions exchanged" if turned else "")
        )
    width = columns * stored.dtype.itemsize
    return {
        part: Stored(stored.path, stored.code, (size, columns), stored.offset + (expert * rows + row) * width)
        for part, expert, row, size in whole.parts
    }


class FusedExperts:
    def __init__(self, facts: ModelFacts) -> None:
        self._whole_of = {
            part: (whole, expert, row, rows)
            for whole in fused_tensors(facts)
            for part, expert, row, rows in whole.parts
        }
        self._memory: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for an HF tensor: an expert's is a view into its layer's."""
        if name not in self._whole_of:
            return fresh(name, shape, dtype, device)
        whole, expert, row, rows = self._whole_of[name]
        if whole.name not in self._memory:
            self._memory[whole.name] = torch.empty(whole.shape, dtype=dtype, device=device)
            self._missing[whole.name] = len(whole.parts)
        return self._memory[whole.name][expert, row : row + rows]

    def fuse(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands on a stream of HF tensors, experts as whole layers as soon as their last part has come."""
        for name, tensor in stream:
            if name not in self._whole_of:
                yield name, tensor
                continue
            fused = self._whole_of[name][0].name
            self._missing[fused] -= 1
            if self._missing[fused] == 0:
                del self._missing[fused]
                yield fused, self._memory.pop(fused)
