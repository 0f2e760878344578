"""Asks a server for JSON, again where it does not answer: what a judge and a remote sandbox have in common."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

BACKOFF_SECONDS = 0.5  # before the first retry; twice as much before each further one


class NoAnswer(Exception):
    """The message says why. `status`: of HTTP, where it answered with nothing else; 0: it did not."""

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status

    @property
    def is_final(self) -> bool:
        """Whether it is of no use to ask again: it refuses the question, and is not only busy."""
        return 0 < self.status < 500 and self.status != 429


def longest_seconds(timeout_seconds: float, retries: int) -> float:
    """Returns how long all questions may take."""
    return (retries + 1) * timeout_seconds + sum(BACKOFF_SECONDS * 2**n for n in range(retries))


def turns(retries: int) -> Iterator[int]:
    """Counts the questions, and waits before each further one."""
    for turn in range(retries + 1):
        if turn:
            time.sleep(BACKOFF_SECONDS * 2 ** (turn - 1))
        yield turn


def ask(request: urllib.request.Request, timeout_seconds: float) -> Any:
    """Returns what comes back. Raises NoAnswer where nothing does, and ValueError for what is no JSON."""
    try:
        with urllib.request.urlopen(request, timeout=timeout_seconds) as stream:
            text = stream.read()
    except urllib.error.HTTPError as error:
        raise NoAnswer(f"{error.code}: {error.reason}", error.code) from error
    except (OSError, http.client.HTTPException) as error:  # URLError and time-outs are such, too
        raise NoAnswer(str(getattr(error, "reason", error)) or type(error).__name__) from error
    return json.loads(text)
