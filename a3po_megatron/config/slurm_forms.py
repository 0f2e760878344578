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


def checked_memory(memory: object) -> object:
    text = str(memory)
    if not re.fullmatch(r"\d+([KMGT]B?)?", text, re.ASCII | re.IGNORECASE):
        raise ValueError("expected a number of MB, or one with K, M, G or T directly after it, as 200G")
    return text


def bytes_of_memory(text: str) -> int:
    """Of a memory that `checked_memory` took; 0 where it is all of a node's, or not said."""
    match = re.fullmatch(r"(\d*)([KMGT]?)B?", text, re.ASCII | re.IGNORECASE)
    assert match is not None, text
    return int(match[1] or 0) << {"K": 10, "": 20, "M": 20, "G": 30, "T": 40}[match[2].upper()]


GPUS = re.compile(r"(?:gpu:)?(?:(?P<type>[A-Za-z0-9_.-]*[A-Za-z][A-Za-z0-9_.-]*):)?(?P<count>\d+)", re.ASCII)


def gpu_counts(text: str) -> dict[str, int]:
    """8 → {"": 8}; h200:8 → {"h200": 8}; also a list of types, as sbatch takes it, and `gpu:` before each."""
    counts: dict[str, int] = {}
    for entry in text.split(","):
        match = GPUS.fullmatch(entry.strip())
        if match is None or (kind := match["type"] or "") in counts:
            raise ValueError("expected a number of GPUs, or one with their type, as h200:8")
        counts[kind] = int(match["count"])
    return counts


def checked_gpus(value: object) -> object:
    """A plain number as a number, one with types as sbatch writes it."""
    counts = gpu_counts(str(value))
    if set(counts) == {""}:
        return counts[""]
    if "" in counts or not all(counts.values()):
        raise ValueError("expected every type with a number of GPUs, as h200:8")
    return ",".join(f"{kind}:{count}" for kind, count in counts.items())


def checked_word(text: str) -> str:
    """What stands in a #SBATCH line by itself."""
    if not text or re.search(r"[\s\"'#\\%\x00-\x1f\x7f]", text):
        raise ValueError("expected a name without spaces and quotes")
    return text


def checked_words(text: str) -> str:
    """Names with commas between."""
    for name in text.split(","):
        checked_word(name)
    return text


# Names that bash does not let go, and those that something else of a run sets.
READ_ONLY = {"UID", "EUID", "PPID", "BASHOPTS", "SHELLOPTS", "BASH_VERSINFO", "BASHPID"}
RANKS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"}
OWN = {"VLLM_BATCH_INVARIANT": "rollout.batch_invariant sets it", "VLLM_ENABLE_V1_MULTIPROCESSING": "it is always 0"}


def checked_environment(variables: dict[str, str]) -> dict[str, str]:
    for name, value in variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
            raise ValueError(f"{name!r} is no name of a variable: expected letters, digits and _")
        if name in READ_ONLY:
            raise ValueError(f"{name} is the shell's own and cannot be set")
        if name in RANKS or name.partition("_")[:2] == ("A3PO", "_"):  # all of ranks/handoff.py
            raise ValueError(f"{name} is set for every rank by what starts it: remove it")
        if name.startswith("SLURM_"):
            raise ValueError(f"{name} is Slurm's to set: remove it")
        if name in OWN:
            raise ValueError(f"{name}: {OWN[name]}: remove it")
        checked_text(value)
    return variables


def checked_text(text: str) -> str:
    """sbatch refuses a script with DOS line ends, and a file cannot hold half of a character."""
    if "\r" in text or "\0" in text or re.search("[\ud800-\udfff]", text):
        raise ValueError("expected text without carriage returns, null characters and halves of characters")
    return text


def node_names(text: str) -> list[str]:
    """rl[0-2,7],gpu-[08-09]b → rl0, rl1, rl2, rl7, gpu-08b, gpu-09b: a list of nodes as squeue and sinfo write it.

    Raises ValueError for what is none.
    """
    names: list[str] = []
    for entry in re.findall(r"(?:[^,\[\]]|\[[^\[\]]*\])+", text):
        made = [""]
        for plain, ranges in re.findall(r"([^\[\]]+)|\[([^\[\]]*)\]", entry):
            parts = [plain] if plain else [number for part in ranges.split(",") for number in _numbers(part)]
            made = [start + part for start in made for part in parts]
        names += made
    if text.count("[") != text.count("]") or not names:
        raise ValueError(f"{text!r} is no list of nodes")
    return names


def _numbers(part: str) -> list[str]:
    """08-10 → 08, 09, 10"""
    first, dash, last = part.partition("-")
    if not (first.isdecimal() and (last.isdecimal() or not dash)):
        raise ValueError(f"{part!r} is no range of nodes")
    return [f"{number:0{len(first)}}" for number in range(int(first), int(last or first) + 1)]


def directive(text: str) -> str:
    """A value in a #SBATCH line, which sbatch takes apart as a shell would: blanks, quotes, # and backslashes."""
    if re.fullmatch(r"[\w./:=@%+,\[\]~^-]+", text, re.ASCII):
        return text
    escaped = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{escaped}"'


def filename(path: str) -> str:
    """A path where Slurm replaces %j and the like, for itself."""
    return path.replace("%", "%%")
