"""The files of an HF folder beside its weights: what makes a set of tensors a model that others can load."""

from __future__ import annotations

import fnmatch
import json
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path

from ..errors import RequestError
from .hf_folder import check_pointer

CONFIG = "config.json"
HF = "hf"  # the folder within a Megatron checkpoint that holds these files
_MODEL = (CONFIG, "generation_config.json")
_VOCABULARY = (
    *("tokenizer.json", "tokenizer.*.json", "tokenizer.model*", "*.tiktoken", "tiktoken.model", "tekken.json"),
    *("spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"),
)
# What transformers 5.19 writes and reads beside a vocabulary (tokenization_utils_base.py, processing_utils.py).
_TOKENIZER = (
    *_VOCABULARY,
    *("tokenizer_*.json", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template.*"),
    *("processor_config.json", "*preprocessor_config.json"),
)
_BELOW = "additional_chat_templates/*.jinja"
_DTYPE_FIELDS = ("dtype", "torch_dtype")  # transformers 5, transformers 4


def side_files(folder: Path) -> list[str]:
    """The configuration and tokenizer files of an HF folder, as paths within it. Raises RequestError for one that is no
    file, and for a git-lfs pointer."""
    names = sorted(path.name for path in folder.iterdir() if _matches(path.name, (*_MODEL, *_TOKENIZER)))
    names += sorted(str(path.relative_to(folder)) for path in folder.glob(_BELOW))
    for name in names:
        if not (folder / name).is_file():
            raise RequestError(f"{folder / name}: it is no file (a link to nothing, or a folder): restore or remove it")
        check_pointer(folder / name)
    return names


def has_tokenizer(names: Iterable[str]) -> bool:
    """Whether files of these names can turn text into tokens: a vocabulary is among them."""
    return any(_matches(name, _VOCABULARY) for name in names)


def dtype_of(folder: Path) -> str | None:
    """The dtype that config.json names, None where it names none."""
    config = json.loads((folder / CONFIG).read_text())
    dtype = next((config[name] for name in _DTYPE_FIELDS if config.get(name) is not None), None)
    return None if dtype is None else str(dtype).removeprefix("torch.")


def copy_side_files(source: Path, target: Path, dtype: str | None = None, without: Collection[str] = ()) -> None:
    """Copies them byte for byte; with `dtype`, config.json says that the weights have it, in the field it has for that,
    and it loses the fields `without`.

    transformers loads weights in the dtype that the configuration names: one that lies would round them silently.
    """
    for name in side_files(source):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    if dtype is not None and (without or dtype_of(source) != dtype):
        config = json.loads((source / CONFIG).read_text())
        config = {name: value for name, value in config.items() if name not in without}
        config |= dict.fromkeys([name for name in _DTYPE_FIELDS if name in config] or [_DTYPE_FIELDS[0]], dtype)
        (target / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatch(name, pattern) for pattern in patterns)
