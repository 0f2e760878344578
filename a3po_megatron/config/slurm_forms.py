"""Slurm's own forms of values, as sbatch reads them: pure functions of text. A ValueError says what is expected."""

from __future__ import annotations

import math
import re

TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<first>\d+)(?::(?P<second>\d+))?(?::(?P<third>\d+))?", re.ASCII)
TIMES = (
    "expected minutes, minutes:seconds, hours:minutes:seconds, days-hours, days-hours:minutes, "
    "days-hours:minutes:seconds or UNLIMITED"
)


def limit_seconds(time: str) -> float:
    """The seconds of a time limit in any form that Slurm takes; infinite where it sets none (UNLIMITED, INFINITE, 0).

    Slurm counts in whole minutes, rounded up.
    """
    if time.upper() in ("UNLIMITED", "INFINITE"):
        return math.inf
    match = TIME.fullmatch(time)
    if match is None:
        raise ValueError(TIMES)
    days, first, second, third = (int(match[part] or 0) for part in ("days", "first", "second", "third"))
    if match["days"] is not None:
        seconds = ((days * 24 + first) * 60 + second) * 60 + third
    elif match["third"] is not None:
        seconds = (first * 60 + second) * 60 + third
    else:
        seconds = first * 60 + second
    return math.ceil(seconds / 60) * 60 or math.inf


def checked_time(time: str) -> str:
    limit_seconds(time)
    return time
