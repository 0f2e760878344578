"""The options of sbatch that slurm.extra may hold: those that an option of ours sets already are refused by its name.

Long names may be cut short as long as one option alone begins so, values follow after `=` or a blank, and short ones
may be joined (-HN2), as getopt has it. A name that is not below is a newer Slurm's or a plugin's (--container-image),
and left to sbatch.
"""

from __future__ import annotations

from typing import NamedTuple


class Known(NamedTuple):
    short: str  # its letter, if it has one
    value: str  # "=": must have one; "?": may have one, after `=` only; "": has none
    owner: str = ""  # what sets it in a run; "": nothing, slurm.extra may


_RUN = "the run folder's logs/slurm-*.out"
_RESUME = "slurm.resume"
_GPUS = "slurm.gpus_per_node"
_MEMORY = "slurm.memory"
_TASKS = "slurm.tasks_per_node"
_SUBMIT = "a3po submit itself"
KNOWN = {
    "account": Known("A", "=", "slurm.account"),
    "acctg-freq": Known("", "="),
    "array": Known("a", "=", "slurm.resume: array (or --sweep)"),
    "batch": Known("", "="),
    "bb": Known("", "="),
    "bbf": Known("", "="),
    "begin": Known("b", "="),
    "chdir": Known("D", "="),
    "cluster-constraint": Known("", "="),
    "clusters": Known("M", "="),
    "comment": Known("", "="),
    "constraint": Known("C", "="),
    "container": Known("", "="),
    "container-id": Known("", "="),
    "contiguous": Known("", ""),
    "core-spec": Known("S", "="),
    "cores-per-socket": Known("", "="),
    "cpu-freq": Known("", "="),
    "cpus-per-gpu": Known("", "=", "slurm.cpus_per_task"),
    "cpus-per-task": Known("c", "=", "slurm.cpus_per_task"),
    "deadline": Known("", "="),
    "delay-boot": Known("", "="),
    "dependency": Known("d", "="),
    "distribution": Known("m", "=", "the layout of the ranks over the nodes"),
    "error": Known("e", "=", _RUN),
    "exclude": Known("x", "="),
    "exclusive": Known("", "?"),
    "export": Known("", "="),
    "export-file": Known("", "="),
    "extra": Known("", "="),
    "extra-node-info": Known("B", "="),
    "get-user-env": Known("", "?"),
    "gid": Known("", "="),
    "gpu-bind": Known("", "="),
    "gpu-freq": Known("", "="),
    "gpus": Known("G", "=", _GPUS),
    "gpus-per-node": Known("", "=", _GPUS),
    "gpus-per-socket": Known("", "=", _GPUS),
    "gpus-per-task": Known("", "=", _GPUS),
    "gres": Known("", "="),
    "gres-flags": Known("", "="),
    "help": Known("h", "", _SUBMIT),
    "hint": Known("", "="),
    "hold": Known("H", ""),
    "ignore-pbs": Known("", ""),
    "input": Known("i", "="),
    "job-name": Known("J", "=", "name"),
    "kill-on-invalid-dep": Known("", "="),
    "licenses": Known("L", "="),
    "mail-type": Known("", "="),
    "mail-user": Known("", "="),
    "mcs-label": Known("", "="),
    "mem": Known("", "=", _MEMORY),
    "mem-bind": Known("", "="),
    "mem-per-cpu": Known("", "=", _MEMORY),
    "mem-per-gpu": Known("", "=", _MEMORY),
    "mincpus": Known("", "="),
    "network": Known("", "="),
    "nice": Known("", "?"),
    "no-kill": Known("k", "?"),
    "no-requeue": Known("", "", _RESUME),
    "nodefile": Known("F", "="),
    "nodelist": Known("w", "="),
    "nodes": Known("N", "=", "slurm.nodes"),
    "ntasks": Known("n", "=", _TASKS),
    "ntasks-per-core": Known("", "=", _TASKS),
    "ntasks-per-gpu": Known("", "=", _TASKS),
    "ntasks-per-node": Known("", "=", _TASKS),
    "ntasks-per-socket": Known("", "=", _TASKS),
    "oom-kill-step": Known("", "?"),
    "open-mode": Known("", "=", _RUN),
    "output": Known("o", "=", _RUN),
    "overcommit": Known("O", ""),
    "oversubscribe": Known("s", ""),
    "parsable": Known("", "", _SUBMIT),
    "partition": Known("p", "=", "slurm.partition"),
    "power": Known("", "="),
    "prefer": Known("", "="),
    "priority": Known("", "="),
    "profile": Known("", "="),
    "propagate": Known("", "?"),
    "qos": Known("q", "=", "slurm.qos"),
    "quiet": Known("Q", "", _SUBMIT),
    "reboot": Known("", ""),
    "requeue": Known("", "", _RESUME),
    "reservation": Known("", "="),
    "segment": Known("", "="),
    "signal": Known("", "=", "slurm.lead_seconds"),
    "sockets-per-node": Known("", "="),
    "spread-job": Known("", ""),
    "switches": Known("", "="),
    "test-only": Known("", "", _SUBMIT),
    "thread-spec": Known("", "="),
    "threads-per-core": Known("", "="),
    "time": Known("t", "=", "slurm.time"),
    "time-min": Known("", "="),
    "tmp": Known("", "="),
    "tres-bind": Known("", "="),
    "tres-per-job": Known("", "=", _GPUS),
    "tres-per-task": Known("", "=", _GPUS),
    "uid": Known("", "="),
    "usage": Known("", "", _SUBMIT),
    "use-min-nodes": Known("", ""),
    "verbose": Known("v", "", _SUBMIT),
    "version": Known("V", "", _SUBMIT),
    "wait": Known("W", "", _SUBMIT),
    "wait-all-nodes": Known("", "="),
    "wckey": Known("", "="),
    "wrap": Known("", "=", _SUBMIT),
}
LETTERS = {known.short: name for name, known in KNOWN.items() if known.short}
Option = tuple[str, str | None]  # long name as sbatch has it, value


def checked_extra(lines: tuple[str, ...]) -> tuple[str, ...]:
    for line in lines:
        options_of(line)
    return lines


def options_of(line: str) -> list[Option]:
    """The options in one entry of slurm.extra. Raises ValueError for what is none, and for one that a run sets."""
    if line.lstrip().startswith("#"):
        raise ValueError(f"write {line.lstrip('# ').removeprefix('SBATCH').strip()!r}: `#SBATCH` is put before it")
    options: list[Option] = []
    words = split(line)
    while words:
        word = words.pop(0)
        if word.startswith("--"):
            spelling, equals, text = word[2:].partition("=")
            pairs = [(_full(spelling), text if equals else None)]
        elif word.startswith("-") and len(word) > 1:
            pairs = _letters(word[1:])
        else:
            raise ValueError(f"{word!r} in {line!r} is no option: expected --name=value, or -n value")
        name, value = pairs[-1]
        # The next word is the value of one that must have it, or may be, of one that is not known.
        wants = name not in KNOWN or KNOWN[name].value == "="
        if value is None and wants and words and (name in KNOWN or not words[0].startswith("-")):
            pairs[-1] = (name, words.pop(0))
        options += pairs
    for name, value in options:
        _refuse_own(name, value)
    if not options:
        raise ValueError(f"{line!r} holds no option")
    return options


def split(line: str) -> list[str]:
    """The words of a #SBATCH line, taken apart as sbatch does: quotes, backslashes, a comment from # on."""
    if "\n" in line or "\r" in line or "\0" in line:
        raise ValueError(f"{line!r}: expected one line an entry")
    words: list[str] = []
    word, quote, escaped = None, "", False
    for sign in line:
        if escaped:
            word, escaped = (word or "") + sign, False
        elif sign == "\\":
            word, escaped = word or "", True
        elif quote:
            word, quote = (word, "") if sign == quote else ((word or "") + sign, quote)
        elif sign in "\"'":
            word, quote = word or "", sign
        elif sign == "#":
            if word is not None:
                raise ValueError(f"{line!r}: what follows # is a comment to sbatch: put the value in quotes")
            break
        elif sign.isspace():
            words += [word] if word is not None else []
            word = None
        else:
            word = (word or "") + sign
    if quote or escaped:
        raise ValueError(f"{line!r}: a quote that does not end")
    return [*words, *([word] if word is not None else [])]


def _full(given: str) -> str:
    """The whole name of a long option that may be cut short."""
    if given in KNOWN:
        return given
    meant = [name for name in KNOWN if name.startswith(given)]
    if len(meant) > 1:
        raise ValueError(f"--{given} may be {' or '.join(f'--{name}' for name in meant)}: write it out")
    return meant[0] if meant else given


def _letters(text: str) -> list[Option]:
    """HN2 → hold, nodes 2"""
    options: list[Option] = []
    while text:
        letter, text = text[0], text[1:]
        if letter not in LETTERS:
            raise ValueError(f"-{letter} is no option of sbatch")
        name = LETTERS[letter]
        if KNOWN[name].value == "=" or (KNOWN[name].value == "?" and text):
            options.append((name, text or None))
            break
        options.append((name, None))
    return options


def _refuse_own(name: str, value: str | None) -> None:
    known = KNOWN.get(name)
    if known is None:
        return
    owner = known.owner
    if name == "gres" and any(
        part.strip().removeprefix("gres:").partition(":")[0] == "gpu" for part in (value or "").split(",")
    ):
        owner = _GPUS
    if owner:
        raise ValueError(f"--{name} is set by {owner}: remove it")
    if known.value == "=" and not value:
        raise ValueError(f"--{name} needs a value: --{name}=…")
