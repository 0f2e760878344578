"""Does a checkpoint survive a layout? Proved by doing it, in one process, a parameter at a time.

For every parameter of the undivided model (q, k and v share one; gate and up do): its HF tensors are read, every rank's
shard is filled from them as loading does, and the tensors are put together again from what the owners hold, as export
does. Every copy must equal the file's bytes. Before that, without any bytes: each rank's parameters are covered without
gap or overlap (vocabulary padding aside), and every element is owned by exactly one rank of a replica.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError, RunFailed
from ..files.safetensors import Stored, read_rows
from ..model.cut import Piece, hf_tensors, pieces
from ..model.facts import ModelFacts
from ..model.layout import Layout, Place, padded_vocab
from ..model.read import read_facts
from ..weights.load import all_finite, check_checkpoint
from .jobs import Count
from .stored import stored_parameters


@dataclass
class RankShare:
    """What one rank of a replica holds."""

    place: Place
    layers: list[int] = field(default_factory=list)
    held: int = 0  # bytes of its parameters that come from the checkpoint
    owned: int = 0  # of them, those that it answers for
    padding: int = 0  # bytes of vocabulary padding


@dataclass(frozen=True)
class Verified:
    layout: Layout
    tensors: int
    bytes: int
    ranks: list[RankShare]
    shown: list[tuple[int, Piece]]  # rank and piece of the tensor that was asked for


def verify_layout(folder: Path, layout: Layout, progress: Callable[[int], Count], show: str | None = None) -> Verified:
    """Raises RequestError for a checkpoint or layout that cannot be, RunFailed if a byte would not come back."""
    facts = read_facts(folder)
    places = check_checkpoint(folder, facts)
    shapes = hf_tensors(facts)
    if show is not None and show not in shapes:
        raise RequestError(f"--show {show}: the checkpoint has no such tensor")
    by_tensor: dict[str, list[tuple[int, Piece]]] = {name: [] for name in shapes}
    shares = []
    for rank, place in enumerate(layout.places()):
        mine = pieces(facts, layout, place)
        shares.append(_share(facts, layout, place, mine, places))
        _check_parameters(rank, mine)
        for piece in mine:
            by_tensor[piece.tensor].append((rank, piece))
    total = sum(places[name].bytes for name in shapes)
    count = progress(total)
    for name, pieces_of_tensor in by_tensor.items():
        _check_owners(name, shapes[name], pieces_of_tensor)
    for parameter in stored_parameters(facts):
        names = list(dict.fromkeys(span.tensor for span in parameter.spans))
        _check_bytes({name: places[name] for name in names}, {name: by_tensor[name] for name in names})
        count(sum(places[name].bytes for name in names))
    return Verified(layout, len(shapes), total, shares, by_tensor.get(show or "", []))


def _share(
    facts: ModelFacts, layout: Layout, place: Place, mine: tuple[Piece, ...], places: dict[str, Stored]
) -> RankShare:
    share = RankShare(place)
    share.layers = sorted({piece.hf.layer for piece in mine if piece.hf.layer is not None})
    for piece in mine:
        size = piece.numel * places[piece.tensor].dtype.itemsize
        share.held += size
        share.owned += size if piece.owner else 0
        if piece.hf.cut == "vocabulary":
            rows = padded_vocab(facts.vocab, layout.tensor) // layout.tensor - piece.length
            share.padding += rows * size // piece.length
    return share


def _check_parameters(rank: int, mine: tuple[Piece, ...]) -> None:
    """A parameter's pieces follow each other without gap or overlap."""
    ends: dict[tuple[int, str], int] = {}
    for piece in sorted(mine, key=lambda piece: piece.offset):
        if piece.offset != ends.get(piece.key, 0):
            raise RunFailed(
                f"rank {rank}: {piece.parameter} is covered up to {ends.get(piece.key, 0)}, then from {piece.offset}: "
                "the table in model/families is wrong"
            )
        ends[piece.key] = piece.offset + piece.length


def _check_owners(name: str, shape: tuple[int, ...], found: list[tuple[int, Piece]]) -> None:
    """Every element has one owner."""
    end = 0
    owned = sorted((piece.start, piece.length, piece.dim) for _, piece in found if piece.owner)
    for start, length, dim in owned:
        if start != end:
            raise RunFailed(f"{name}: owned up to {end}, then from {start}, of {shape}: model/families is wrong")
        end = start + length
        last = shape[dim]
    if not owned or end != last:
        raise RunFailed(f"{name}: owned up to {end} of {shape}: model/families is wrong")


def _check_bytes(places: dict[str, Stored], found: dict[str, list[tuple[int, Piece]]]) -> None:
    """Fills every rank's shard of one parameter and joins the owners' parts; raises RunFailed where a bit differs."""
    whole = {name: _read(name, stored) for name, stored in places.items()}
    joined = {name: torch.full_like(values, float("nan")) for name, values in whole.items()}
    by_shard: dict[tuple[int, tuple[int, str]], list[Piece]] = {}
    for rank, piece in (item for items in found.values() for item in items):
        by_shard.setdefault((rank, piece.key), []).append(piece)
    for (rank, (_, parameter)), mine in by_shard.items():
        first = whole[mine[0].tensor]
        shape = list(first.shape)
        shape[mine[0].dim] = max(piece.offset + piece.length for piece in mine)
        shard = torch.full(shape, float("nan"), dtype=first.dtype)
        for piece in mine:
            _in_shard(shard, piece).copy_(_in_tensor(whole[piece.tensor], piece))
        for piece in mine:
            if not torch.equal(_bits(_in_shard(shard, piece)), _bits(_in_tensor(whole[piece.tensor], piece))):
                raise RunFailed(f"{piece.tensor}: rank {rank} ({parameter}) does not give back what it was given")
            if piece.owner:
                _in_tensor(joined[piece.tensor], piece).copy_(_in_shard(shard, piece))
    for name, values in whole.items():
        if not torch.equal(_bits(joined[name]), _bits(values)):
            raise RunFailed(f"{name}: what the owners hold together is not the tensor: model/families is wrong")


def _read(name: str, stored: Stored) -> Tensor:
    values = torch.empty(stored.shape, dtype=stored.dtype)
    with stored.path.open("rb") as file:
        read_rows(file, stored, 0, values)
    if not all_finite(values):
        raise RequestError(f"{stored.path}: {name} holds a value that is not finite")
    return values


def _in_shard(shard: Tensor, piece: Piece) -> Tensor:
    return shard.narrow(piece.dim, piece.offset, piece.length)


def _in_tensor(values: Tensor, piece: Piece) -> Tensor:
    return values.narrow(piece.dim, piece.start, piece.length)


def _bits(values: Tensor) -> Tensor:
    """Equal as bits: −0 and 0 differ."""
    return values.contiguous().view(torch.uint8)
