"""Where tokens begin in their text: for every tokenizer as the literal definition has it, and in little time."""

from __future__ import annotations

import itertools
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from a3po_megatron.data.characters import token_begins
from a3po_megatron.data.tokenizer import Tokenizer as Text
from a3po_megatron.errors import RunFailed

Decode = Callable[[Sequence[int]], str]
EMOJI = "😀"  # four bytes
SHORT = "a é€ 😀 \n\t漢字 mañana x²=4 👨‍👩‍👧 zw"


def decoding(made: Tokenizer) -> Decode:
    return lambda tokens: made.decode(list(tokens), skip_special_tokens=True)


def of_bytes() -> Tokenizer:
    """Every byte is a token, and a few pairs of bytes are, some of which cross the characters' borders; one special
    token, and one that is not."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {sign: number for number, sign in enumerate(signs)}
    (whole,) = (word for word, _ in pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("a😀b"[1:2]))
    pairs = [whole[:2], whole[3] + "b", "a" + whole[0]]
    for pair in pairs:
        vocab[pair] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [(pair[0], pair[1]) for pair in pairs]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(["<eos>"])
    made.add_tokens([AddedToken("<think>", special=False)])
    return made


def of_sentences() -> Tokenizer:
    """As Llama 2 has it: ▁ for blanks, the first of which is left out, and bytes for what is no word; a run of these
    that is no text is another text as a whole."""
    words = ["<unk>", "<s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁so", "▁x", "x", "é", "▁▁▁", "."]
    made = Tokenizer(models.BPE({word: number for number, word in enumerate(words)}, [], byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)
    made.add_special_tokens(["<s>"])
    return made


def of_pieces() -> Tokenizer:
    """As BERT has it: ## goes on with a word, and blanks before signs are taken back."""
    words = ["[UNK]", "[SEP]", "so", "##me", "##thing", ".", ",", "n", "'", "##t", "x"]
    made = Tokenizer(models.WordPiece({word: number for number, word in enumerate(words)}))
    made.decoder = decoders.WordPiece()
    made.add_special_tokens(["[SEP]"])
    return made


def of_words() -> Tokenizer:
    """Without a decoder: words are joined by blanks."""
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(["a", "bc", "<eos>"])}))
    made.add_special_tokens(["<eos>"])
    return made


MADE = {"bytes": of_bytes(), "sentences": of_sentences(), "pieces": of_pieces(), "words": of_words()}


def literal(tokens: Sequence[int], decode: Decode) -> list[int]:
    """The definition, from the beginning for every token."""
    texts = [decode(tokens[:number]) for number in range(len(tokens) + 1)]
    begins = []
    for number in range(len(tokens)):
        pairs = zip(texts[number], texts[-1], strict=False)
        common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        adds_nothing = texts[number + 1] == texts[number] and common == len(texts[number])
        begins.append(max(common - 1, 0) if adds_nothing else common)
    return np.maximum.accumulate(np.array(begins, np.int64)).tolist()


@pytest.mark.parametrize("kind", MADE)
def test_tokens_begin_where_the_literal_definition_has_them_for_any_tokenizer(kind: str) -> None:
    made = MADE[kind]
    decode = decoding(made)
    for seed in range(60):
        draw = random.Random(seed)
        size = made.get_vocab_size()
        pool = range(size) if seed % 3 else [draw.randrange(size) for _ in range(6)]
        tokens = [draw.choice(pool) for _ in range(draw.choice([0, 1, 2, 5, 17, 40, 90]))]
        found = token_begins(tokens, decode)
        assert found.dtype == np.int64
        assert found.tolist() == literal(tokens, decode), (seed, tokens)


JUNK = [
    EMOJI.encode() * run + b"\x80" + "é€".encode() * 9 + b"\xf0\x9f" + b"ab" + b"\xe2" * run + "ñ".encode()
    for run in (3, 4, 15, 40, 300)
]


@pytest.mark.parametrize("data", JUNK, ids=len)
def test_runs_of_bytes_that_are_no_text_and_longer_than_a_block_move_no_token(data: bytes) -> None:
    made = MADE["bytes"]
    tokens = [made.token_to_id(byte_sign(byte)) for byte in data]
    assert token_begins(tokens, decoding(made)).tolist() == literal(tokens, decoding(made))


@pytest.mark.parametrize("data", JUNK, ids=len)
def test_where_one_byte_too_many_makes_junk_of_a_whole_run_its_tokens_are_among_it_and_others_where_they_were(
    data: bytes,
) -> None:
    made = MADE["sentences"]
    word = made.token_to_id("▁x")
    tokens = [word] * 20 + [byte + 2 for byte in data] + [word] * 20
    text = decoding(made)(tokens)
    assert text == "x" + " x" * 19 + "\ufffd" * len(data) + " x" * 20
    found, wanted = token_begins(tokens, decoding(made)), [max(2 * n - 1, 0) for n in range(20)]
    wanted += [39 + n for n in range(len(data))] + [39 + len(data) + 2 * n for n in range(20)]
    assert found[:20].tolist() == wanted[:20] and found[-20:].tolist() == wanted[-20:]
    # Four of them may seem to be one character until the bytes behind them are seen.
    assert np.all(np.diff(found) >= 0) and np.abs(found - wanted).max() <= 1


def byte_sign(byte: int) -> str:
    """The sign that stands for a byte, as GPT-2 has it, from its own file's rule."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return chr(byte) if byte in plain else chr(256 + [b for b in range(256) if b not in plain].index(byte))


def test_of_a_character_that_is_cut_over_tokens_each_begins_with_it() -> None:
    """An oracle of its own: the bytes of the text, and which character each is of."""
    made = MADE["bytes"]
    for text in (SHORT, SHORT * 5, EMOJI * 40, "a" + EMOJI * 3 + "b", "\n" + EMOJI):
        tokens = made.encode(text).ids
        place_of_byte = [number for number, sign in enumerate(text) for _ in sign.encode()]
        lengths = [len(made.id_to_token(token)) for token in tokens]
        wanted = [place_of_byte[sum(lengths[:number])] for number in range(len(tokens))]
        assert sum(lengths) == len(place_of_byte)
        assert token_begins(tokens, decoding(made)).tolist() == wanted
    emoji = [made.token_to_id(byte_sign(byte)) for byte in b"x" + EMOJI.encode() + b"y"]
    assert token_begins(emoji, decoding(made)).tolist() == [0, 1, 1, 1, 1, 2]


def test_a_token_without_text_is_with_the_character_before_it() -> None:
    made = MADE["bytes"]
    eos, think = made.token_to_id("<eos>"), made.token_to_id("<think>")
    a, b = made.token_to_id("a"), made.token_to_id("b")
    for tokens, wanted in (
        ([a, b, eos], [0, 1, 1]),
        ([a, eos, eos, b], [0, 0, 0, 1]),
        ([eos, a], [0, 0]),
        ([eos], [0]),
        ([], []),
        ([think, a, eos], [0, 7, 7]),  # an added token that is not special has a text
    ):
        assert token_begins(tokens, decoding(made)).tolist() == wanted
    cut = [made.token_to_id(byte_sign(byte)) for byte in b"a" + EMOJI.encode()[:3]]  # the limit came in its middle
    assert token_begins([*cut, eos], decoding(made)).tolist() == [0, 1, 1, 1, 1]


def test_the_blank_that_a_tokenizer_leaves_out_moves_no_token() -> None:
    made = MADE["sentences"]
    tokens = [made.token_to_id(word) for word in ("▁so", "▁x", "x", ".", "▁so")]
    assert decoding(made)(tokens) == "so xx. so"
    assert token_begins(tokens, decoding(made)).tolist() == [0, 2, 4, 5, 6]


def test_sixteen_thousand_tokens_take_no_more_than_a_second_and_few_decoded_tokens() -> None:
    made, decoded = MADE["bytes"], 0
    decode = decoding(made)

    def counting(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return decode(tokens)

    for text in ((SHORT + EMOJI) * 400, "plain words, " * 1300):
        tokens = made.encode(text).ids[:16_000]
        assert len(tokens) == 16_000
        decoded, began = 0, time.process_time()
        token_begins(tokens, counting)
        assert decoded < 80 * len(tokens)  # from the beginning for each: 8,000 times
        assert time.process_time() - began < 2.0  # 0.2 s were measured


def test_a_text_that_is_not_made_token_by_token_is_refused() -> None:
    tokens = [1] * 600
    tokens[70] = 2

    def fickle(part: Sequence[int]) -> str:
        """Each token is a sign, another one where 2 is among them or they are many; but not where they are all."""
        return ("a" if len(part) == 600 or (2 not in part and len(part) <= 32) else "z") * len(part)

    with pytest.raises(RunFailed, match="not made of them one by one, from token 64 on"):
        token_begins(tokens, fickle)


@pytest.mark.skipif("A3PO_TEST_DATA" not in os.environ, reason="A3PO_TEST_DATA does not name a folder with a tokenizer")
def test_a_published_byte_pair_tokenizer_begins_its_tokens_where_the_definition_has_them(tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(os.environ["A3PO_TEST_DATA"]) / "model_configs" / f"tiny_bpe_{name}", tmp_path / name)
    text: Any = Text(tmp_path, 1 << 20, (2004,), "raw")
    for seed in range(20):
        draw = random.Random(seed)
        drawn = [draw.randrange(2020) for _ in range(120)]
        tokens = [*text.tokens_of(SHORT + " so 3 + 4 = 7. " * (seed % 4)), *drawn[: seed * 6], 2004]
        assert text.begins(np.array(tokens)).tolist() == literal(tokens, text.decode), seed
