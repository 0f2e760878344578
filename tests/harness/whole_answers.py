"""A tiny model whose words are whole answers: what it says at random is right now and then, of maths and of code."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Tokenizer

from tests.harness.tiny_models import make_checkpoint

RIGHT = "\n```python\ndef double(x):\n    return 2 * x\n```\n"
WRONG = "\n```python\ndef double(x):\n    return 3 * x\n```\n"
ANSWERS = (RIGHT, WRONG, "\\boxed{4}", "\\boxed{5}")
WORDS = ("<pad>", "<eos>", "<unk>", *ANSWERS, " ")


def make_model(folder: Path, kind: str = "qwen3") -> Path:
    """A random model of one of tiny_models.KINDS, without a chat template."""
    if kind == "qwen2":
        return _of_qwen2(folder)
    make_checkpoint(folder, kind, vocab_size=len(WORDS), max_position_embeddings=1024)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def _of_qwen2(folder: Path) -> Path:
    """transformers makes the tokenizer of this family anew, of bytes and merges: answers are tokens beside them."""
    end, letters = "<|endoftext|>", [*"0123456789", "Ġ"]
    tokenizer = Qwen2Tokenizer({word: number for number, word in enumerate([end, *letters])}, [])
    tokenizer.add_tokens([AddedToken(answer, normalized=False) for answer in ANSWERS])
    make_checkpoint(folder, "qwen2", vocab_size=len(tokenizer), max_position_embeddings=1024, eos_token_id=0)
    tokenizer.save_pretrained(folder)
    return folder
