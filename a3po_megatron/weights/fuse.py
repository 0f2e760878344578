"""All experts of a layer in one tensor, as transformers 5 packs them in memory and the engine likes them best.

    mlp.experts.gate_up_proj [E, 2I, H]    mlp.experts.down_proj [E, H, I]

In a checkpoint of that form an expert's tensors are rows that follow each other: where they lie is all there is to say.
On the way to the engine the experts' HF tensors are views into that memory from the beginning, so that nothing is
copied, every one of them is checked by itself, and the whole is handed on when its last part has passed.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.safetensors import Stored
from ..model.facts import ModelFacts
from .reshard import fresh

_PART = re.compile(r"(.*\.mlp\.experts\.)(\d+)\.(gate|up|down)_proj\.weight")


_WHOLE = re.compile(r"(.*\.mlp\.experts\.)(gate_up|down)_proj(\.weight)?")


def is_fused(names: Iterable[str]) -> bool:
    return any(_WHOLE.fullmatch(name) for name in names)


def experts_apart(found: Mapping[str, Stored], facts: ModelFacts) -> dict[str, Stored]:
    """The tensors of a folder, those of fused experts as one of each expert: the place of its rows.

    Raises RequestError for fused tensors of another shape. Some programs keep them transposed, [E, H, 2I] and
    [E, I, H]; no model has sizes at which both tensors look the same either way.
    """
    if facts.experts is None:
        return dict(found)
    count, ffn, hidden = facts.experts.count, facts.experts.ffn, facts.hidden
    shapes = {"gate_up": (count, 2 * ffn, hidden), "down": (count, hidden, ffn)}
    whole = {name: match for name in found if (match := _WHOLE.fullmatch(name))}
    parts: dict[str, Stored] = {}
    for name, match in whole.items():
        stored, (_, rows, columns) = found[name], shapes[match[2]]
        if stored.shape != shapes[match[2]]:
            turned = stored.shape == (count, columns, rows)
            raise RequestError(
                f"{stored.path}: {name} has shape {stored.shape}, the experts of config.json fused as transformers has "
                f"them {shapes[match[2]]}"
                + (": it is transposed; write it with its last two dimensions exchanged" if turned else "")
            )
        for expert in range(count):
            begin = stored.offset + expert * rows * columns * stored.dtype.itemsize
            halves = ("gate", "up") if match[2] == "gate_up" else ("down",)
            for half, projection in enumerate(halves):
                here = begin + half * ffn * columns * stored.dtype.itemsize
                shape = (rows // len(halves), columns)
                parts[f"{match[1]}{expert}.{projection}_proj.weight"] = Stored(stored.path, stored.code, shape, here)
    if twice := sorted(parts.keys() & found.keys()):
        raise RequestError(f"{found[twice[0]].path}: {twice[0]} is stored by itself, and fused with other experts")
    return {name: stored for name, stored in found.items() if name not in whole} | parts


class FusedExperts:
    def __init__(self, facts: ModelFacts) -> None:
        assert facts.experts is not None
        self._experts, self._hidden = facts.experts, facts.hidden
        self._whole: dict[str, Tensor] = {}
        self._missing: dict[str, int] = {}

    def allocate(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for an HF tensor: an expert's is a view into its layer's."""
        part = _PART.fullmatch(name)
        if part is None:
            return fresh(name, shape, dtype, device)
        fused, count, ffn = self._fused(name), self._experts.count, self._experts.ffn
        if fused not in self._whole:
            whole = (count, self._hidden, ffn) if part[3] == "down" else (count, 2 * ffn, self._hidden)
            self._whole[fused] = torch.empty(whole, dtype=dtype, device=device)
            self._missing[fused] = count * (1 if part[3] == "down" else 2)
        expert = self._whole[fused][int(part[2])]
        if part[3] == "down":
            return expert
        return expert[:ffn] if part[3] == "gate" else expert[ffn:]

    def fuse(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hands on a stream of HF tensors, experts as whole layers as soon as their last part has come."""
        for name, tensor in stream:
            if _PART.fullmatch(name) is None:
                yield name, tensor
                continue
            fused = self._fused(name)
            self._missing[fused] -= 1
            if self._missing[fused] == 0:
                del self._missing[fused]
                yield fused, self._whole.pop(fused)

    @staticmethod
    def _fused(name: str) -> str:
        part = _PART.fullmatch(name)
        assert part is not None
        return part[1] + ("down_proj" if part[3] == "down" else "gate_up_proj")
