"""The files of an HF folder beside its weights: what makes a set of tensors a model that others can load."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import RequestError

CONFIG = "config.json"
HF = "hf"  # the folder within a Megatron checkpoint that holds these files
_MODEL = (CONFIG, "generation_config.json")
_VOCABULARY = (
    *("tokenizer.json", "tokenizer.model", "*.tiktoken", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("vocab.json", "vocab.txt"),
)
_TOKENIZER = (
    *_VOCABULARY,
    *("tokenizer_*.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
)
_DTYPE_FIELDS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


def side_files(folder: Path) -> list[str]:
    """Names of the configuration and tokenizer files in an HF folder. Raises RequestError for one that is no file."""
    names = sorted(path.name for path in folder.iterdir() if _matches(path.name, (*_MODEL, *_TOKENIZER)))
    for name in names:
        if not (folder / name).is_file():
            raise RequestError(f"{folder / name}: it is no file (a link to nothing, or a folder): restore or remove it")
    return names


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names can turn text into tokens: a vocabulary is among them."""
    return any(_matches(name, _VOCABULARY) for name in names)


def dtype_of(folder: Path) -> str | None:
    """The dtype that config.json names, None where it names none."""
    config = json.loads((folder / CONFIG).read_text())
    found = next((config[name] for name in _DTYPE_FIELDS if config.get(name) is not None), None)
    return None if found is None else str(found).removeprefix("torch.")


def copy_side_files(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copies them byte for byte; with `dtype`, config.json says that the weights have it, in the field it has for that.

    transformers loads weights in the dtype that the configuration names: one that lies would round them silently.
    """
    target.mkdir(exist_ok=True)
    for name in side_files(source):
        shutil.copyfile(source / name, target / name)
    if dtype is not None and dtype_of(source) != dtype:
        config = json.loads((source / CONFIG).read_text())
        config |= dict.fromkeys([name for name in _DTYPE_FIELDS if name in config] or [_DTYPE_FIELDS[0]], dtype)
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
