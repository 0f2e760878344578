"""HF safetensors → this rank's shards: only the rows that this rank needs are read, a bounded part at a time."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import RequestError
from ..files.hf_folder import other_names
from ..files.safetensors import DTYPES, OpenFiles, Stored, locate
from ..model.cut import Piece, hf_tensors, padded_parameters
from ..model.facts import ModelFacts
from ..model.families.dense import DERIVED, EMBEDDING, HEAD
from ..model.quantised import Fp8
from ..telemetry.clock import CLOCK
from .fp8 import pair_scales, read_values
from .fuse import experts_apart

PART_BYTES = 16 << 20  # what is read at once


def check_checkpoint(
    folder: Path, facts: ModelFacts, fp8: Fp8 | None = None, dtype: torch.dtype = torch.bfloat16
) -> dict[str, Stored]:
    """Compares names and shapes in the files with what config.json implies; returns where each tensor is.

    Experts that are fused (weights/fuse.py) are said to be where each one's rows lie. With `fp8`, tensors that are
    stored so are tensors of `dtype` (weights/fp8.py).
    """
    places, expected = locate(folder), hf_tensors(facts)
    if fp8 is not None:
        places = pair_scales(places, fp8, dtype, folder)
    places = experts_apart(places, facts)
    tolerated = {HEAD} if facts.tied else set()  # some tied checkpoints store the output layer again
    missing = sorted(expected.keys() - places.keys())
    extra = sorted(n for n in places.keys() - expected.keys() - tolerated if not n.endswith(DERIVED))
    if (missing or extra) and (refusal := other_names(folder, [*expected, *tolerated], places)):
        raise refusal
    if missing:
        raise RequestError(f"{folder}: the checkpoint lacks {missing[0]} ({len(missing)} tensors missing)")
    if extra:
        raise RequestError(f"{folder}: the checkpoint holds {extra[0]}, which config.json does not account for")
    for name, shape in expected.items():
        stored = places[name]
        if stored.shape != shape:
            raise RequestError(f"{stored.path}: {name} has shape {stored.shape}, config.json implies {shape}")
        if stored.code not in DTYPES:
            raise RequestError(f"{stored.path}: {name} is stored as {stored.code}: expected {', '.join(DTYPES)}")
    if facts.tied and HEAD in places:
        _check_tied(places[EMBEDDING], places[HEAD])
    return places


def _check_tied(embedding: Stored, head: Stored) -> None:
    """An output layer that is stored again must be the embedding: transformers would use it as it is if it were not."""
    same = (embedding.shape, embedding.code) == (head.shape, head.code)
    if same:
        with OpenFiles() as files:
            for row, rows in parts_of(embedding, 0, embedding.shape[0]):
                parts = [torch.empty((rows, embedding.shape[1]), dtype=embedding.dtype) for _ in range(2)]
                read_values(files, embedding, row, parts[0])
                read_values(files, head, row, parts[1])
                same = same and torch.equal(*(part.view(torch.uint8) for part in parts))
    if not same:
        raise RequestError(
            f"{head.path}: {HEAD} is not {EMBEDDING}, but config.json says tie_word_embeddings: one of them is wrong"
        )


@torch.no_grad()
def load_shards(
    folder: Path, facts: ModelFacts, pieces: Iterable[Piece], parameters: Mapping[tuple[int, str], Tensor]
) -> None:
    """Fills `parameters` from the checkpoint; rows that pad the vocabulary become 0.

    Raises RequestError for tensors that are missing, misshapen or not finite, and RuntimeError if a parameter of the
    model is not covered by the map.
    """
    places = check_checkpoint(folder, facts)
    filled = dict.fromkeys(parameters, 0)
    with OpenFiles() as files:
        for piece in pieces:
            CLOCK.beat()
            stored = places[piece.tensor]
            target = parameters[piece.key].narrow(piece.dim, piece.offset, piece.length)
            first = piece.start if piece.dim == 0 else 0
            for begin, rows in parts_of(stored, first, target.shape[0]):
                values = torch.empty((rows, *stored.shape[1:]), dtype=stored.dtype)
                files.read(stored, begin, values)
                if piece.dim == 1:
                    values = values[:, piece.start : piece.start + piece.length]
                if not all_finite(values):
                    raise RequestError(f"{stored.path}: {piece.tensor} holds a value that is not finite")
                target[begin - first : begin - first + rows].copy_(values)
            filled[piece.key] += piece.numel
    padded = padded_parameters(facts)
    for key, parameter in parameters.items():
        name, padding = key[1], parameter.numel() - filled[key]
        if padding and name in padded:
            parameter[filled[key] // parameter.shape[1] :].zero_()
        elif padding:
            raise RuntimeError(f"model/families leaves {padding} elements of {name} without a source")


def all_finite(values: Tensor) -> bool:
    """Whether no element is infinite or NaN; waits for the device."""
    return bool(finite(values))


def finite(values: Tensor) -> Tensor:
    """The same, [] bool on the tensor's device: the extremes show it (a NaN is both), at memory's speed."""
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def parts_of(stored: Stored, first: int, count: int) -> Iterator[tuple[int, int]]:
    """Yields (row, number of rows) of bounded parts of `count` rows from `first` on."""
    step = max(1, PART_BYTES // (math.prod(stored.shape[1:]) * stored.dtype.itemsize))
    for row in range(first, first + count, step):
        yield row, min(step, first + count - row)
