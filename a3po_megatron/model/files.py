"""The files of an HF folder beside its weights: what makes a set of tensors a model that others can load."""

from __future__ import annotations

import fnmatch
import json
import shutil
from pathlib import Path

CONFIG = "config.json"
HF = "hf"  # the folder within a Megatron checkpoint that holds these files
_TOKENIZER = (
    *("tokenizer*.json", "tokenizer.model", "*.tiktoken", "spiece.model", "vocab.json", "vocab.txt", "merges.txt"),
    *("special_tokens_map.json", "added_tokens.json", "chat_template.*"),
)
_MODEL = (CONFIG, "generation_config.json")
_DTYPE_FIELDS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


def side_files(folder: Path) -> list[str]:
    """Configuration and tokenizer files in an HF folder."""
    return sorted(path.name for path in folder.iterdir() if _matches(path.name, (*_MODEL, *_TOKENIZER)))


def has_tokenizer(folder: Path) -> bool:
    """Whether an HF folder can turn text into tokens."""
    return any(_matches(path.name, _TOKENIZER) for path in folder.iterdir())


def copy_side_files(source: Path, target: Path, dtype: str | None = None) -> None:
    """Copies them byte for byte; with `dtype`, config.json says that the weights have it, in the field it has for that.

    transformers loads weights in the dtype that the configuration names: one that lies would round them silently.
    """
    target.mkdir(exist_ok=True)
    for name in side_files(source):
        shutil.copyfile(source / name, target / name)
    if dtype is not None:
        config = json.loads((source / CONFIG).read_text())
        fields = [name for name in _DTYPE_FIELDS if name in config] or [_DTYPE_FIELDS[0]]
        if any(config.get(name) != dtype for name in fields):
            config |= dict.fromkeys(fields, dtype)
            (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
