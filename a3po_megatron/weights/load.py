"""HF safetensors → this rank's shards: only the slices that this rank needs are read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..errors import RequestError
from ..model.family import Family
from ..model.layout import HEAD, Piece, hf_tensors

FLOATS = ("F64", "F32", "F16", "BF16")
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def locate(folder: Path) -> dict[str, Path]:
    """HF tensor name → file. Raises RequestError for a missing file or an unreadable index."""
    index = folder / INDEX
    if index.exists():
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{index}: not a readable safetensors index: {error!r}") from error
    elif (single := folder / SINGLE).exists():
        with _open(single) as file:
            return dict.fromkeys(file.keys(), single)
    else:
        raise RequestError(f"{folder}: there is neither {SINGLE} nor {INDEX}: model.path must hold safetensors weights")
    for name, path in files.items():
        if not path.exists():
            raise RequestError(f"{index}: {name} is said to be in {path.name}, which is missing")
    return files


def check_checkpoint(folder: Path, family: Family) -> dict[str, Path]:
    """Compares names and shapes in the files with what config.json implies; returns where each tensor is."""
    files, expected = locate(folder), hf_tensors(family)
    tolerated = {HEAD} if family.tied else set()  # some tied checkpoints store the output layer again
    if missing := sorted(expected.keys() - files.keys()):
        raise RequestError(f"{folder}: the checkpoint lacks {missing[0]} ({len(missing)} tensors missing)")
    if extra := sorted(name for name in files.keys() - expected.keys() - tolerated if "rotary_emb" not in name):
        raise RequestError(f"{folder}: the checkpoint holds {extra[0]}, which config.json does not account for")
    for path in sorted(set(files.values())):
        with _open(path) as file:
            held = set(file.keys())
            for name in [name for name, where in files.items() if where == path]:
                if name not in held:
                    raise RequestError(f"{path}: {name} is said to be in this file ({INDEX}), which does not hold it")
                if name not in expected:
                    continue
                stored = file.get_slice(name)
                if tuple(stored.get_shape()) != expected[name]:
                    raise RequestError(
                        f"{path}: {name} has shape {tuple(stored.get_shape())}, config.json implies {expected[name]}"
                    )
                if stored.get_dtype() not in FLOATS:
                    raise RequestError(
                        f"{path}: {name} is stored as {stored.get_dtype()}: expected {', '.join(FLOATS)}"
                    )
    return files


@torch.no_grad()
def load_shards(
    folder: Path, family: Family, pieces: Iterable[Piece], parameters: Mapping[tuple[int, str], torch.Tensor]
) -> None:
    """Fills `parameters` from the checkpoint; rows that pad the vocabulary become 0.

    Raises RequestError for tensors that are missing, misshapen or not finite, and RuntimeError if a parameter of the
    model is not covered by the map.
    """
    files = check_checkpoint(folder, family)
    filled = dict.fromkeys(parameters, 0)
    by_file: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_file.setdefault(files[piece.tensor], []).append(piece)
    for path, wanted in by_file.items():
        with _open(path) as file:
            for piece in wanted:
                window = slice(piece.start, piece.start + piece.length)
                source = file.get_slice(piece.tensor)
                values = source[window] if piece.dim == 0 else source[:, window]
                if not torch.isfinite(values).all():
                    raise RequestError(f"{path}: {piece.tensor} holds a value that is not finite")
                target = parameters[piece.key]
                target.narrow(piece.dim, piece.offset, piece.length).copy_(values)
                filled[piece.key] += piece.numel
    for key, parameter in parameters.items():
        name, padding = key[1], parameter.numel() - filled[key]
        if padding and name.endswith(("word_embeddings.weight", "output_layer.weight")):
            parameter[filled[key] // parameter.shape[1] :].zero_()
        elif padding:
            raise RuntimeError(f"model/layout.py leaves {padding} elements of {name} without a source")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise RequestError(f"{path}: not a readable safetensors file: {error}") from error
