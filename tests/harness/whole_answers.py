"""A tiny model whose words are whole answers: what it says at random is right now and then, of maths and of code."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.harness.tiny_models import make_checkpoint

RIGHT = "\n```python\ndef double(x):\n    return 2 * x\n```\n"
WRONG = "\n```python\ndef double(x):\n    return 3 * x\n```\n"
WORDS = ("<pad>", "<eos>", "<unk>", RIGHT, WRONG, "\\boxed{4}", "\\boxed{5}", " ")


def make_model(folder: Path, kind: str = "qwen3") -> Path:
    """A random model of one of tiny_models.KINDS, without a chat template."""
    make_checkpoint(folder, kind, vocab_size=len(WORDS), max_position_embeddings=1024)
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(WORDS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder
