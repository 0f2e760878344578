"""Draws by name: what a draw is for decides it, never the order in which draws happen."""

from __future__ import annotations

import hashlib

import numpy as np


def named_seed(*name: object) -> int:
    """A seed in [0, 2^63) from the parts of a name. Neighbouring names have unrelated seeds."""
    text = "\x1f".join(str(part) for part in name)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def rollout_seed(run_seed: int, step: int, prompt: str, sample: int) -> int:
    """The seed of one rollout: no rank count, order or restart changes it."""
    return named_seed("rollout", run_seed, step, prompt, sample)


def named_order(count: int, *name: object) -> list[int]:
    """A permutation of range(count): by the seed that each number has under `name`."""
    start = hashlib.blake2b("\x1f".join(("order", *map(str, name), "")).encode(), digest_size=8)
    digests = bytearray()
    for row in range(count):
        draw = start.copy()
        draw.update(b"%d" % row)
        digests += draw.digest()
    return np.argsort(np.frombuffer(bytes(digests), ">u8") >> np.uint64(1), kind="stable").tolist()
