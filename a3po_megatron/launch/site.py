"""What a cluster says of itself and of a request: sbatch, sinfo, scontrol.

Sites differ: a wrapper greets before the number, columns stay empty, partitions and GPUs have many forms. What is not
understood is left to sbatch, whose own word (--test-only) counts before anything is made.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..config.slurm import SlurmOptions
from ..config.slurm_forms import gpu_counts
from ..errors import RequestError
from .shell import of_a_submission

ASK_SECONDS = 120
SHOWN = 600  # characters of what a program says
# Of nodes that are out for now: sbatch --test-only says of them what it says of nodes that there never were.
OUT = "down,drained,draining,fail,maint"
MAY_PASS = re.compile(r"not available|inactive or drain|nodes are busy|are DOWN", re.IGNORECASE)


def sbatch(*words: str) -> str:
    """Submits; returns the job's number. Raises RequestError with what Slurm says."""
    done = _run("sbatch", "--parsable", *words, seconds=None)
    if done.returncode:
        raise RequestError(f"sbatch: {_said(done.stderr or done.stdout)}")
    # 4242, 4242;cluster, or the words of a wrapper that does not know --parsable.
    numbers = re.findall(r"^(?:Submitted batch job )?(\d+)(?:;\S*| on cluster .*)?\s*$", done.stdout, re.MULTILINE)
    if not numbers:
        raise RequestError(
            f"sbatch gave no job number, so that nothing can follow it: {_said(done.stdout + done.stderr) or 'no word'}"
            "; squeue --me shows whether the job is queued all the same"
        )
    return numbers[-1]


def check_site(slurm: SlurmOptions, script: str, highest_index: int) -> list[str]:
    """Raises RequestError naming the option for what this cluster cannot give, and with sbatch's own words for a script
    that it would not take; returns what there is to say of one that may only have to wait."""
    if shutil.which("sbatch") is None:
        raise RequestError("sbatch is not here: submit from a login node of the cluster, or look with --dry-run")
    _check_partitions(slurm)
    _check_array(slurm, highest_index)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "job.sbatch"  # wrappers look into the file
        file.write_text(script, encoding="utf-8")
        return try_out(slurm.partition, str(file))


def try_out(partition: str, *words: str) -> list[str]:
    """What sbatch says of a job without submitting it. Raises RequestError where it would not take it."""
    done = _run("sbatch", "--test-only", *words)
    if done.returncode == 0:
        return []
    said = _said(done.stderr + done.stdout) or f"exit {done.returncode}"
    if MAY_PASS.search(said) and (out := _nodes_out(partition)):
        return [f"{out} nodes are down or drained now, so the job may have to wait (sbatch --test-only: {said})"]
    raise RequestError(f"sbatch would not take this job (sbatch --test-only): {said}")


def _check_partitions(slurm: SlurmOptions) -> None:
    rows = _partitions("sinfo", "-a", "-h", "-o", "%P|%D|%G")
    if not rows:
        raise RequestError("sinfo shows no partition of this cluster, so none can run this job; see `sinfo -a`")
    names = sorted({name.rstrip("*") for name, _, _ in rows})
    # A star marks the partition that a job gets which names none; where there is none, sbatch says what it wants.
    default = next((name.rstrip("*") for name, _, _ in rows if name.endswith("*")), None)
    asked = slurm.partition.split(",") if slurm.partition else [default] if default else []
    if unknown := [name for name in asked if name not in names]:
        raise RequestError(f"slurm.partition = {unknown[0]}: this cluster has {_list(names)}")
    wanted, nodes = gpu_counts(str(slurm.gpus_per_node)), slurm.nodes + slurm.spares
    fitting = {}
    for partition in asked:
        mine = [(count, gpus_of(gres)) for name, count, gres in rows if name.rstrip("*") == partition]
        fitting[partition] = sum(count for count, gpus in mine if _fit(wanted, gpus))
    if fitting and max(fitting.values()) < nodes:  # a job runs in one of its partitions
        kinds = sorted({kind for name, _, gres in rows if name.rstrip("*") in asked for kind in gpus_of(gres) if kind})
        there = f" (its GPUs: {_list(kinds)})" if kinds and slurm.gpus_per_node else ""
        have = ", ".join(f"{name} has {count} such nodes" for name, count in fitting.items())
        raise RequestError(
            f"slurm.nodes + slurm.spares = {nodes}, slurm.gpus_per_node = {slurm.gpus_per_node}: partition "
            f"{have}{there}"
        )


def _fit(wanted: dict[str, int], there: dict[str, int]) -> bool:
    return all(sum(n for k, n in there.items() if kind in ("", k)) >= count for kind, count in wanted.items())


def gpus_of(gres: str) -> dict[str, int]:
    """gpu:h200:8(S:0-1),nvme:1 → {"h200": 8}; gpu:8 → {"": 8}; gpu:1g.10gb:7 → {"1g.10gb": 7}"""
    counts: dict[str, int] = {}
    for entry in re.sub(r"\([^)]*\)?", "", gres).split(","):
        name, *parts = entry.strip().removeprefix("gres/").split(":")
        if name != "gpu":
            continue
        count = int(parts.pop()) if parts and parts[-1].isascii() and parts[-1].isdecimal() else 1
        counts[":".join(parts)] = counts.get(":".join(parts), 0) + count
    return counts


def _partitions(*words: str) -> list[tuple[str, int, str]]:
    """The rows of sinfo that can be read: partition, nodes, generic resources."""
    rows = []
    for line in _ask(*words).splitlines():
        name, _, rest = line.strip().partition("|")
        count, _, gres = rest.partition("|")
        number = re.fullmatch(r"(\d{1,9}(?:\.\d+)?)(K?)", count.strip(), re.ASCII)  # 1K: 1024
        if name and number is not None:
            rows.append((name, int(float(number[1]) * (1024 if number[2] else 1)), gres))
    return rows


def _nodes_out(partition: str | None) -> int:
    """How many nodes are down or drained, in the partitions that are named, if any are."""
    names = partition.split(",") if partition else None
    try:
        rows = _partitions("sinfo", "-a", "-h", "-t", OUT, "-o", "%P|%D|%G")
    except RequestError:  # it cannot say: then sbatch's word stands
        return 0
    return sum(count for name, count, _ in rows if names is None or name.rstrip("*") in names)


def _check_array(slurm: SlurmOptions, highest_index: int) -> None:
    if highest_index == 0 or shutil.which("scontrol") is None:
        return
    done = _run("scontrol", "show", "config")
    limit = re.search(r"^MaxArraySize\s*=\s*(\d+)", done.stdout, re.MULTILINE)
    if done.returncode or limit is None or highest_index < int(limit[1]):
        return
    what = "slurm.attempts" if slurm.resume == "array" else "--sweep"
    raise RequestError(
        f"{what}: the last index of the array would be {highest_index}, and this cluster's MaxArraySize = {limit[1]} "
        f"allows {int(limit[1]) - 1}"
    )


def _ask(*words: str) -> str:
    done = _run(*words)
    if done.returncode:
        raise RequestError(f"{words[0]}: {_said(done.stderr or done.stdout) or f'exit {done.returncode}'}")
    return done.stdout


def _run(*words: str, seconds: float | None = ASK_SECONDS) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words,
            env=of_a_submission(os.environ),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=seconds,
        )
    except (OSError, ValueError) as error:
        raise RequestError(f"{words[0]} cannot be run: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise RequestError(f"{words[0]} gave no answer within {ASK_SECONDS} s") from error


def _said(text: str) -> str:
    """What a program said, in one line."""
    words = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return words if len(words) <= SHOWN else f"{words[:SHOWN]}…"


def _list(names: Sequence[str], most: int = 12) -> str:
    return ", ".join(names[:most]) + (f", … ({len(names)} in all)" if len(names) > most else "")
