"""The tokenizer of an HF checkpoint: read, held against the model, and used to render problems as prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..checkpoint.side_files import side_files
from ..errors import RequestError

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


class Tokens:
    """Text ↔ token ids, with the special tokens that end a response left out of the text.

    `stops` are the tokens that end a response: the model's (config.json, generation_config.json) and the tokenizer's.
    """

    def __init__(self, folder: Path, vocab: int, eos: tuple[int, ...], template: str) -> None:
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
        if template == "chat" and not self._tokenizer.chat_template:
            raise RequestError(f"data.template is chat, but the tokenizer in {folder} has no chat template")

    def encode(self, problem: str) -> tuple[int, ...]:
        """The prompt tokens of one problem."""
        if self._template == "chat":
            turns = [{"role": "user", "content": problem}]
            ids = _guarded(
                f"{self._folder}: the chat template refuses one turn of a user, {problem!r:.120}",
                "the other forms of data.template need none",
                lambda: self._tokenizer.apply_chat_template(
                    turns, add_generation_prompt=True, tokenize=True, return_dict=False
                ),
            )
        else:
            text = TEMPLATES[self._template].format(problem=problem)
            ids = _guarded(
                f"{self._folder}: the tokenizer fails on {problem!r:.120}",
                "it may be damaged, or made by newer versions",
                lambda: self._tokenizer.encode(text, add_special_tokens=False),
            )
        return tuple(int(token) for token in ids)

    def decode(self, tokens: Any) -> str:
        """The text of a response, for the grader: without special tokens."""
        return self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=True)

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
