"""First contact with a GPU: experiments, smallest first, each in its own process with a time limit.

    python tools/gpu_bringup.py                      all that can run here; docs/evidence/gpu.json
    python tools/gpu_bringup.py --only 1 5a          experiment 1 and part a of 5; the others' records stay
    python tools/gpu_bringup.py --list               what there is, and what would be left out here
    python tools/gpu_bringup.py --budget 1500        the shortest unproven ones, in so many seconds altogether
    python tools/gpu_bringup.py --only 5j --model DIR    with weights of one's own, where the experiment takes some
    python tools/gpu_bringup.py --limit 60 --out FILE --logs DIR

    0  what arena and head are built on                 8  checkpoint while rollouts run, kill, resume
    1  Transformer Engine: bf16 against a float64 oracle, FP8 against bf16, its caches, what it refuses
    2  the loss's kernels: exact, and how fast          5  vLLM in process: sleep, reload, seeds, mismatch
    3  the learner's way out of device memory           6  the demo's loop
    4  vLLM's sleep allocator alone                     7  in process against standalone
    9  engines on 2 GPUs     10  layouts of the learner against one GPU     11  two nodes, in a Slurm allocation

An experiment is `shown` where it ran to its end and every claim it made holds, else `failed`, `refused` (by device,
library or package) or `left out` (something is not installed, or there is no GPU). It needs torch and Triton for 2 and
3a; the rest where its libraries are. Without a CUDA device everything is left out, which is no failure, and the
evidence of other machines stays as it is. With --budget those that the file has `shown` on this device with these
versions are not repeated, and the file is written after each one: the same command goes on from there.

Exit code: 0; 1 if an experiment failed; 2 if the request was wrong.

The file: `versions`, `device`, `date`, `code` of the run, and per experiment status, seconds, numbers, claims with the
bound each was held against, refusals word for word, and the last lines of what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from tools.bringup import machine
from tools.bringup.budget import run_within, unproven
from tools.bringup.experiments import chosen
from tools.bringup.runner import MODEL, ROOT, run_all

EVIDENCE = ROOT / "docs" / "evidence" / "gpu.json"
SCHEMA = 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="N", help="1, 5a, …")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--limit", type=float, metavar="SECONDS", help="for each experiment, in place of its own")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="for all together: the shortest unproven first")
    parser.add_argument("--model", type=Path, metavar="DIR", help="an HF folder, for experiments that take one (5j)")
    parser.add_argument("--out", type=Path, help="default: docs/evidence/gpu.json, if there is a GPU")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="keep every experiment's whole output there")
    options = parser.parse_args()
    try:
        experiments = chosen(options.only)
    except ValueError as error:
        parser.error(str(error))
    for name in ("limit", "budget"):
        given = getattr(options, name)
        if given is not None and not given > 0:
            parser.error(f"--{name} must be above 0")
    if options.model is not None:
        if not (options.model / "config.json").exists():
            parser.error(f"--model {options.model}: no config.json there, so it is no HF folder")
        os.environ[MODEL] = str(options.model.resolve())
    here = machine.look()
    lacks = here.pop("lacks")
    print(f"{here['device'] or lacks['cuda']}; " + ", ".join(f"{k} {v}" for k, v in here["versions"].items() if v))
    if options.list:
        for experiment in experiments:
            why = next((lacks[need] for need in experiment.needs if need in lacks), "")
            print(f"{experiment.id:4}{experiment.seconds:5.0f} s  {experiment.title}" + (f": {why}" if why else ""))
        return 0
    out = options.out or (EVIDENCE if here["device"] else None)
    before = _earlier(out) if out and (options.only or options.budget) else {}
    if before and any(before.get(key) != here[key] for key in ("device", "versions")):
        parser.error(f"{out} is of another device or other versions: run all, or give --out")
    if options.logs:
        options.logs.mkdir(parents=True, exist_ok=True)
    done: dict[str, Any] = dict(before.get("experiments", {}))

    def keep(name: str, record: dict[str, Any]) -> None:
        done[name] = record
        if out:
            _write(out, {"schema": SCHEMA, **here, "experiments": _in_order(done)})

    if options.budget is not None:
        waiting = unproven(experiments, done)
        print(f"{len(experiments) - len(waiting)} shown already, {len(waiting)} to do within {options.budget:g} s")
        records = run_within(options.budget, waiting, lacks, keep, _tell, options.limit, options.logs)
    else:
        records = run_all(experiments, lacks, options.limit, options.logs, _tell)
        for name, record in records.items():
            keep(name, record)
    print("\n" + (table(records) if records else "nothing was done"))
    print(f"\nwritten to {out}" if out else "\nnot written: there is no CUDA device (--out FILE writes it)")
    return int(any(record["status"] == "failed" for record in records.values()))


def _tell(line: str) -> None:
    print(line, flush=True)


def _in_order(records: Mapping[str, Any]) -> dict[str, Any]:
    return {e.id: records[e.id] for e in chosen([]) if e.id in records}


def _write(path: Path, evidence: Mapping[str, Any]) -> None:
    """All of it or nothing: a call that is ended in the middle must not take what was shown along."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(evidence, indent=2, ensure_ascii=False) + "\n")
    partial.replace(path)


def _earlier(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def table(records: Mapping[str, Mapping[str, Any]]) -> str:
    """experiment | status | seconds | headline number"""
    rows = [("experiment", "status", "seconds", "headline number")]
    for name, record in records.items():
        seconds = f"{record['seconds']:.1f}" if record["status"] != "left out" else "–"
        rows.append((f"{name} {record['title']}", record["status"], seconds, record["headline"]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"{a:{widths[0]}} | {b:{widths[1]}} | {c:>{widths[2]}} | {d}".rstrip() for a, b, c, d in rows]
    counts = {
        status: sum(r["status"] == status for r in records.values())
        for status in dict.fromkeys(record["status"] for record in records.values())
    }
    ruler = "-" * max(len(line) for line in lines[:1])
    return "\n".join([lines[0], ruler, *lines[1:], ", ".join(f"{n} {status}" for status, n in counts.items())])


if __name__ == "__main__":
    raise SystemExit(main())
