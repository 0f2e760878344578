"""A folder of what can be made again: every file named by the digest of what it was made from, and never changed.

A cache that cannot be written is no reason not to run: whoever asks is told, and makes its things anew.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import IO

from blake3 import blake3

from .replace import replacing


class Cache:
    """`folder`: empty for the user's own, $XDG_CACHE_HOME/a3po-megatron or ~/.cache/a3po-megatron."""

    def __init__(self, folder: str = "") -> None:
        home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
        self.folder = Path(folder) if folder else Path(home) / "a3po-megatron"
        self.refused: str | None = None  # why nothing can be kept here

    def find(self, name: str) -> Path | None:
        path = self.folder / name
        return path if path.is_file() else None

    def put(self, name: str, write: Callable[[IO[bytes]], object]) -> Path | None:
        """The new file, whole, or none where the disk does not take it. What `write` raises otherwise goes on."""
        path = self.folder / name
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Every writer has a partial file of its own: several runs may make the same thing at once.
            with replacing(path, by=secrets.token_hex(8)) as partial, open(partial, "xb", opener=_private) as file:
                write(file)
        except OSError as error:
            self.refused = (
                f"{self.folder}: nothing can be kept here ({error.strerror}): every start reads the data anew"
            )
            return None
        return path


def _private(path: str, flags: int) -> int:
    """Opens a new file for its owner alone: prompts may be nobody else's business."""
    return os.open(path, flags, 0o600)


def name_of(*parts: object) -> str:
    """A name from what something is made of."""
    return blake3("\x1f".join(map(str, parts)).encode()).hexdigest()[:32]
