"""What the reader of a conversion should know, in a line each."""

from __future__ import annotations

from pathlib import Path

from ..files.safetensors import Stored, locate
from ..files.side_files import CONFIG, has_tokenizer, side_files
from ..model.facts import ModelFacts
from ..weights.fp8 import Quantised, name_of
from ..weights.fuse import names_of_fused


def no_tokenizer(folder: Path) -> list[str]:
    if has_tokenizer(side_files(folder)):
        return []
    return [f"{folder} holds no tokenizer files: the converted folder has none either"]


def of_import(source: Path, facts: ModelFacts, named: str | None, stored: dict[str, Stored]) -> list[str]:
    """`named`: the dtype that config.json has for the weights; `stored`: where they were read."""
    remarks = no_tokenizer(source)
    if codes := [place for place in stored.values() if isinstance(place, Quantised)]:
        kind = name_of(codes[0].dtype)
        remarks.append(
            f"dequantised {len(codes)} of {len(stored)} tensors: they were in FP8, and are {kind} from here on"
        )
    if fused := names_of_fused(locate(source), facts):
        remarks.append(f"{source} has its experts fused ({fused[0]}): an export has them one by one, as the hub has")
    return remarks + _other_dtypes(source, named, stored)


def _other_dtypes(source: Path, named: str | None, stored: dict[str, Stored]) -> list[str]:
    kinds = {name: name_of(place.dtype) for name, place in stored.items()}
    others = {name: kind for name, kind in kinds.items() if kind != named}
    if named is None or not others:
        return []
    said = " and ".join(sorted(set(others.values())))
    if len(others) == len(stored):
        return [f"{source / CONFIG} says {named}, but the weights are {said}: both are kept as they are"]
    first = next(iter(others))
    return [
        f"{source / CONFIG} says {named}, and {len(others)} of {len(stored)} tensors are {said} ({first}, …): each is "
        "kept as it is"
    ]
