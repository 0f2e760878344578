"""Which files a source of rows is: a file itself, a folder of shards, or what `datasets` saved (save_to_disk).

one file                                itself
folder with state.json                  the Arrow files that it names, in its order
folder with dataset_dict.json           its only split; several are refused, since one of them is no training data
any other folder                        all files of rows below it, by name; of one kind, and of one split
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..errors import RequestError

KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
PACKED = (".gz", ".zst")
BESIDE = ("dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json", "config.json")
SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)(?=$|[-_.\d])", re.IGNORECASE)


def paths_of(path: str | Sequence[str]) -> list[Path]:
    """The sources that `data.path` names."""
    return [Path(path)] if isinstance(path, str) else [Path(each) for each in path]


def files_of(source: Path) -> list[Path]:
    """The files whose rows a source has, in their order. Raises RequestError where a folder does not say which."""
    if not source.is_dir():
        return [source]
    if (source / "dataset_dict.json").is_file():
        splits = _described(source / "dataset_dict.json", "splits")
        if len(splits) != 1:
            raise RequestError(
                f"{source}: the folder holds {len(splits)} splits ({', '.join(splits)}): name one, such as "
                f"{source / (splits[0] if splits else 'train')}"
            )
        return files_of(source / splits[0])
    if (source / "state.json").is_file():
        if _described(source / "state.json", "_indices_data_files", needed=False):
            raise RequestError(
                f"{source}: its rows are chosen by a file of indices: flatten_indices() and save it again"
            )
        return [source / each["filename"] for each in _described(source / "state.json", "_data_files")]
    return _shards(source)


def _described(path: Path, field: str, needed: bool = True) -> list[Any]:
    """A list in what `datasets` says of a folder."""
    try:
        tree = json.loads(path.read_bytes())
        return list(tree[field] if needed else tree.get(field) or ())
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise RequestError(f"{path}: not what save_to_disk writes: {error!r}") from error


def _shards(folder: Path) -> list[Path]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and kind_of(path) and path.name not in BESIDE)
    paths = [path for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
    if not paths:
        raise RequestError(f"{folder}: the folder holds no file of rows ({', '.join(KINDS)}; also .gz and .zst)")
    kinds = sorted({kind_of(path) for path in paths})
    if len(kinds) > 1:
        raise RequestError(
            f"{folder}: the folder holds files of several kinds ({', '.join(kinds)}): name those to read"
        )
    splits = {match[1].lower(): path for path in paths if (match := SPLIT.match(path.name))}
    if len(splits) > 1:
        raise RequestError(
            f"{folder}: the folder holds several splits ({', '.join(sorted(splits))}): name the files to read, such as "
            f"{splits.get('train', paths[0])}"
        )
    return paths


def kind_of(path: Path) -> str:
    """The suffix that says what a file of rows is, without that of its compression; "" for another file."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in KINDS else ""


def stem_of(path: Path) -> str:
    """Returns the name of a file of rows without the suffixes that say what it is."""
    return path.with_suffix("").stem if path.suffix.lower() in PACKED else path.stem


def names_of(files: Sequence[Path]) -> list[str]:
    """What files are called in the ids of their rows: the name, with as many folders as tell them apart."""
    deepest = max((len(file.parts) for file in files), default=1)
    for parts in range(1, deepest + 1):
        names = ["/".join(file.parts[-parts:]) for file in files]
        if len(set(names)) == len(files):
            return names
    raise RequestError(f"{files[0]}: data.path names a file twice")
