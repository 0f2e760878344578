"""The tokenizer of an HF checkpoint: read, held against the model, and used to render problems as prompts.

problem → text (raw, a public form, or a chat template) → tokens
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import DataOptions
from ..errors import RequestError
from ..files.cache import name_of
from ..files.side_files import side_files
from .characters import token_begins
from .fields import Problem
from .templates import ChatTemplate, place_of_template, read_template

# The forms in which public RLVR work poses a problem. `chat` is the tokenizer's own chat template.
TEMPLATES = {
    "raw": "{problem}",
    "qwen": "{problem}\nPlease reason step by step, and put your final answer within \\boxed{{}}.",
    "dapo": (
        "Solve the following math problem step by step. The last line of your response should be of the form "
        "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\n{problem}\n\n"
        'Remember to put your answer on its own line after "Answer:".'
    ),
}


def has_chat_template(folder: Path) -> bool:
    """Returns whether the tokenizer in a folder has a chat template of its own."""
    return bool(_read(folder).chat_template)


class Tokenizer:
    """Text ↔ token ids, with the special tokens that end a response left out of the text.

    `stops` are the tokens that end a response: the model's (config.json, generation_config.json) and the tokenizer's.
    """

    def __init__(
        self,
        folder: Path,
        vocab: int,
        eos: tuple[int, ...],
        template: str,
        *,
        template_file: str = "",
        arguments: Mapping[str, Any] | None = None,
        system: str = "",
    ) -> None:
        self._folder = folder
        self._tokenizer = _read(folder)
        self._template = template
        ids = _guarded(
            f"{folder}: the tokenizer has no vocabulary",
            "it may be damaged, or made by newer versions",
            lambda: {int(token) for token in self._tokenizer.get_vocab().values()},
        )
        if max(ids, default=0) >= vocab:
            raise RequestError(
                f"{folder}: the tokenizer has a token with id {max(ids)}, the model's vocabulary has {vocab}: they do "
                "not belong together"
            )
        if not eos:
            raise RequestError(f"{folder}/config.json: eos_token_id is missing: no response could end")
        # Base models often end a text with one token and, under a chat template, a turn with another.
        own = self._tokenizer.eos_token_id
        self.stops = tuple(sorted({*eos} | ({own} if own is not None else set())))
        if bad := [token for token in eos if token not in ids]:
            raise RequestError(f"{folder}: eos_token_id {bad[0]} of config.json is no token of the tokenizer")
        self._chat = self._chat_template(template_file, arguments or {}, system) if template == "chat" else None
        tree = json.loads(self._tokenizer.backend_tokenizer.to_str())
        self._bytes_a_token = bytes_a_token(tree)
        self._known = _known_signs(tree)

    @classmethod
    def of(cls, options: DataOptions, folder: Path, vocab: int, eos: tuple[int, ...]) -> Tokenizer:
        """As a configuration has it."""
        arguments, file = options.template_arguments, options.template_file
        return cls(folder, vocab, eos, options.template, template_file=file, arguments=arguments, system=options.system)

    def _chat_template(self, file: str, arguments: Mapping[str, Any], system: str) -> ChatTemplate:
        place, inside = (Path(file), "") if file else place_of_template(self._folder)
        if not file and not self._tokenizer.chat_template:
            raise RequestError(
                f"data.template is chat, but the tokenizer in {self._folder} has no chat template: data.template_file "
                "names one, and the other forms of data.template need none"
            )
        text = read_template(place) if file else self._tokenizer.get_chat_template()
        return ChatTemplate(text, place, inside, self._tokenizer.special_tokens_map, arguments, system)

    def render(self, problem: Problem) -> str:
        """The prompt of one problem. Raises RequestError where its form takes no conversation or a template refuses."""
        if self._chat is not None:
            return self._chat.render(problem)
        if not isinstance(problem, str):
            roles = ", ".join(turn.role for turn in problem)
            raise RequestError(f"the prompt is a conversation ({roles}), which only data.template: chat renders")
        return TEMPLATES[self._template].format(problem=problem)

    def encode(self, problem: Problem) -> tuple[int, ...]:
        """The prompt tokens of one problem."""
        return self.tokens_of(self.render(problem))

    def tokens_of(self, text: str) -> tuple[int, ...]:
        """The tokens of a prompt's text."""
        ids = _guarded(
            f"{self._folder}: the tokenizer fails on {text!r:.120}",
            "it may be damaged, or made by newer versions",
            lambda: self._tokenizer.encode(text, add_special_tokens=False),
        )
        return tuple(int(token) for token in ids)

    def counts_of(self, texts: Sequence[str]) -> list[int]:
        """How many tokens each of many prompts has, in a third less time than one by one."""
        encoded = _guarded(
            f"{self._folder}: the tokenizer fails on one of {len(texts)} prompts, from {texts[0]!r:.120} on",
            "it may be damaged, or made by newer versions",
            lambda: self._tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False
            ),
        )
        return [len(ids) for ids in encoded["input_ids"]]

    def surely_within(self, text: str, limit: int) -> bool:
        """Whether a text has at least one token and at most `limit`, told by its bytes alone; False: count them."""
        factor = self._bytes_a_token if text.isascii() else self._bytes_a_token and 3 * self._bytes_a_token
        return factor is not None and factor * len(text.encode()) <= limit and not self._known.isdisjoint(text)

    def sure_bytes(self, limit: int) -> tuple[int, int]:
        """Up to so many bytes of a one-turn problem its prompt is surely within `limit`, as `surely_within` has it: of
        a problem in ASCII, and of any; -1: never."""
        if self._chat is not None or self._bytes_a_token is None:
            return -1, -1
        around = TEMPLATES[self._template].format(problem="")  # ASCII
        if not self.surely_within(around, limit):
            return -1, -1
        return limit // self._bytes_a_token - len(around), limit // (3 * self._bytes_a_token) - len(around)

    def digest(self) -> str:
        """Of all that decides how a problem becomes tokens."""
        return name_of(
            self._template, self._chat and self._chat.described(), self._tokenizer.backend_tokenizer.to_str()
        )

    def decode(self, tokens: Any) -> str:
        """The text of a response, for the grader: without special tokens."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

    def begins(self, tokens: Any) -> np.ndarray:
        """Where the tokens of a response begin in that text (characters.py)."""
        return token_begins([int(token) for token in tokens], self.decode)

    def pieces(self, tokens: Any) -> list[str]:
        """The text of each token by itself, special tokens by name, for a reader."""
        return [self._tokenizer.decode([int(token)]) for token in tokens]


def _read(folder: Path) -> Any:
    if not (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        raise RequestError(f"{folder}: there is no tokenizer (tokenizer.json) beside the model")
    side_files(folder)  # none of them is a git-lfs pointer
    import tokenizers
    import transformers

    return _guarded(
        f"{folder}: the tokenizer cannot be read by transformers {transformers.__version__} and tokenizers "
        f"{tokenizers.__version__}",
        "it may be damaged, or made by newer versions",
        lambda: transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False),
    )


def _guarded(what: str, advice: str, call: Callable[[], Any]) -> Any:
    """What a call into the libraries of tokenizers returns, or a RequestError with their words.

    They raise anything: tokenizers, in Rust, a bare Exception or a panic, templates whatever a template does.
    """
    try:
        return call()
    except (KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise RequestError(f"{what}: {words[:300]} ({advice})") from error


def bytes_a_token(tokenizer: dict[str, Any]) -> int | None:
    """1 where a text never has more tokens than bytes (of what NFC makes of it); None: it may.

    So it is where nothing adds to a text: BPE over bytes, or whole words. NFC leaves ASCII as it is, and makes at most
    three bytes of one elsewhere (Unicode, FAQ on normalization).
    """
    model, steps = tokenizer.get("model") or {}, _parts(tokenizer.get("pre_tokenizer"), "pretokenizers")
    if any(part["type"] != "NFC" for part in _parts(tokenizer.get("normalizer"), "normalizers")):
        return None
    for part in steps:
        removes = part["type"] == "Split" and part.get("behavior") == "Removed"
        adds = part["type"] == "ByteLevel" and part.get("add_prefix_space")
        if part["type"] not in ("Split", "ByteLevel", "Digits") or removes or adds:
            return None
    bytewise = any(part["type"] == "ByteLevel" for part in steps)
    plain = not model.get("continuing_subword_prefix") and not model.get("end_of_word_suffix")
    return 1 if model.get("type") == "WordLevel" or (model.get("type") == "BPE" and bytewise and plain) else None


def _known_signs(tokenizer: dict[str, Any]) -> frozenset[str]:
    """ASCII characters that are tokens themselves: a text that has one has a token at least."""
    vocab = (tokenizer.get("model") or {}).get("vocab") or {}
    return frozenset(chr(code) for code in range(33, 127) if chr(code) in vocab)


def _parts(step: dict[str, Any] | None, several: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return [part for each in step[several] for part in _parts(each, several)] if step["type"] == "Sequence" else [step]
