"""What an experiment says while it runs, line by line into a file: what it had found before it died is not lost.

numbers    name → value                       claims       text, value, bound, whether it holds
refusals   what was asked for → the words     left out     what → why
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class Refused(Exception):
    """The device, a library or the package declines what the experiment is about; the text says what and why."""


class Report:
    def __init__(self, path: Path | None = None) -> None:
        """`path`: where the lines go; None: they are only kept."""
        self._path = path
        self.lines: list[dict[str, Any]] = []

    def number(self, name: str, value: Any) -> None:
        self._say({"number": name, "value": _plain(value)})

    def claim(self, text: str, found: float, bound: float) -> None:
        """It holds if `found` is at most `bound`; NaN never is."""
        self._say({"claim": text, "found": _plain(found), "bound": bound, "holds": bool(found <= bound)})

    def claim_above(self, text: str, found: float, bound: float) -> None:
        """It holds if `found` is at least `bound`."""
        self._say({"claim": text, "found": _plain(found), "at_least": bound, "holds": bool(found >= bound)})

    def holds(self, text: str, found: bool) -> None:
        self._say({"claim": text, "found": bool(found), "bound": True, "holds": bool(found)})

    def refusal(self, asked: str, words: object) -> None:
        self._say({"refusal": asked, "words": _last_line(str(words))})

    def left_out(self, what: str, why: str) -> None:
        self._say({"left_out": what, "why": why})

    def headline(self, text: str) -> None:
        self._say({"headline": text})

    def take(self, line: dict[str, Any]) -> None:
        """A line of another report, of a process that belongs to the experiment."""
        self._say(line)

    def ended(self) -> None:
        self._say({"ended": True})

    def _say(self, line: dict[str, Any]) -> None:
        self.lines.append(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """What was said so far; a last line that was cut short is nobody's."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def summary(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The lines as one record."""
    return {
        "headline": next((line["headline"] for line in reversed(lines) if "headline" in line), ""),
        "numbers": {line["number"]: line["value"] for line in lines if "number" in line},
        "claims": [line for line in lines if "claim" in line],
        "refusals": {line["refusal"]: line["words"] for line in lines if "refusal" in line},
        "left_out": {line["left_out"]: line["why"] for line in lines if "left_out" in line},
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN and no infinity: they are told by name."""
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:500] if lines else ""
