"""Where in a response's text each of its tokens begins, for whatever is said of the text and meant for tokens.

A tokenizer's text is not the texts of its tokens one after the other: several tokens may make one character (bytes of
an emoji), the first blank of a text may be left out, and special tokens are. What holds for every tokenizer is this:

    a token begins where the text of the tokens before it and the text of all tokens part

It would take as many characters as the square of the tokens. So the text is cut into blocks of a few tokens, each of
which is decoded behind the block before it; a cut is only made where the text is seen to go on as it does in the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from ..errors import RunFailed

# Sizes of a block that are tried in turn: of UTF-8's four bytes at most, one more token or two end a character that
# a cut went through. The last ones are for text in which a byte too many makes another text of all the bytes before it.
BLOCKS = (16, 17, 18, 19, 256)


def token_begins(tokens: Sequence[int], decode: Callable[[Sequence[int]], str]) -> np.ndarray:
    """Returns for each token the character of `decode(tokens)` at which its text begins, [n] int64, never falling.

    A token that begins within a character begins with it. One without a text of its own, such as that which ends a
    response, is with the character before it (at 0 without one): it was sampled because what stands there was
    complete, and a step that ends there ends with it.

    Raises RunFailed where a text is not made token by token from left to right.
    """
    text = decode(tokens)
    begins = np.zeros(len(tokens), np.int64)
    before, at, place = 0, 0, 0  # the first token of the block before, that of this one, and its place in the text
    while at < len(tokens):
        first, end = _block(tokens, decode, text, before, at, place)
        whole, prefix = decode(tokens[first:end]), decode(tokens[first:at])
        shift = place - len(prefix)
        for number in range(at, end):
            following = decode(tokens[first : number + 1])
            common = _common(prefix, whole)
            begins[number] = shift + (common if following != prefix else max(common - 1, -shift))
            prefix = following
        before, at, place = at, end, shift + len(whole)
    # A byte in the middle of a character leaves the text as it is, and is with that character, as its first byte is.
    # Of bytes that make no character, one may take back what the one before it seemed to be.
    return np.maximum.accumulate(begins)


def _block(
    tokens: Sequence[int], decode: Callable[[Sequence[int]], str], text: str, before: int, at: int, place: int
) -> tuple[int, int]:
    """Returns the token to decode from and the end of a block that begins at token `at` and character `place`."""
    for first, end in _tries(before, at, len(tokens)):
        whole, known = decode(tokens[first:end]), decode(tokens[first:at])
        added = whole[len(known) :]
        sound = whole.startswith(known) and text.startswith(added, place)
        if sound and (end < len(tokens) or place + len(added) == len(text)):
            return first, end
    raise RunFailed(
        f"steps of a response cannot be found among its tokens: the tokenizer's text of {len(tokens)} tokens is not "
        f"made of them one by one, from token {at} on; process.name: none does without"
    )


def _tries(before: int, at: int, tokens: int) -> Iterator[tuple[int, int]]:
    for size in BLOCKS:
        yield before, min(at + size, tokens)
    yield 0, min(at + BLOCKS[-1], tokens)
    yield 0, tokens


def _common(text: str, other: str) -> int:
    """How many first characters two texts share; the first is the other's beginning but for its last few ones."""
    length = len(text)
    while not other.startswith(text[:length]):
        length -= 1
    return length
