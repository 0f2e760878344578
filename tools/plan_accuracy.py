"""How near the planner of memory comes to what others measured.

    python -m tools.plan_accuracy measurements.json                     a table by family, and the bars
    python -m tools.plan_accuracy measurements.json --rows --json out.json

A row has a model, a layout, how it was trained, and what was measured: `static_gib` between steps, `first_step_gib`,
`peak_gb` in its `unit`. Counted are rows marked `in_scope`. Static memory and peaks are compared with the planner's;
then each row of 10 GiB or more is planned on an invented GPU of 1.25 times its measured peak, where it should fit, and
on one of 0.8 times, where it should not. Rows that ran out of memory are planned on their own GPU.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

from a3po_megatron.preflight.overhead import ASLEEP, COMMUNICATOR, CONTEXT
from a3po_megatron.preflight.verdict import Verdict, verdict_of

from .accuracy.foreign import answer
from .accuracy.rows import Unplannable, job_of

GIB = 1 << 30
LARGE = 10.0  # GiB


def measured_gib(row: Mapping[str, Any]) -> float | None:
    peak = row.get("peak_gb")
    if peak is None:
        return None
    return float(peak) * (1e9 / GIB if str(row.get("unit", "")).startswith("GB") else 1.0)


def gpu_gib(row: Mapping[str, Any]) -> float | None:
    """What the row's GPU has."""
    said = str(row.get("gpu") or "").lower()
    for name, gib in (("h200", 139.8), ("h20", 95.0), ("96", 93.1), ("40gb", 39.4), ("80", 79.1)):
        if name in said:
            return gib
    return None


def compare(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One result a row that is in scope and has a peak."""
    results = []
    for row in rows:
        if not row.get("in_scope"):
            continue
        peak = measured_gib(row)
        result: dict[str, Any] = {"id": row["id"], "family": row["family"], "measured_peak": peak}
        try:
            job = job_of(row)
        except Unplannable as why:
            results.append(result | {"unplannable": str(why)})
            continue
        said = answer(job)
        result |= {"static": said.static, "first": said.first, "peak": said.peak, "assumed": list(job.assumed)}
        if row.get("static_gib") is not None:
            result["measured_static"] = row["static_gib"]
        if row.get("first_step_gib") is not None:
            result["measured_first"] = row["first_step_gib"]
        if peak is not None and peak >= LARGE:
            result["on 1.25"] = str(verdict_of(said.peak, 1.25 * peak))
            result["on 0.8"] = str(verdict_of(said.peak, 0.8 * peak))
        results.append(result)
    return results


def out_of_memory(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Of rows that did not fit and can be planned, what the planner says of their own GPU: these are runs of RL, on
    which the context, communicators and a sleeping engine lie, too, and whose losses take entropies."""
    results = []
    for row in rows:
        if row.get("fits") is not False or row["id"] not in OUT_OF_MEMORY:
            continue
        stated = {name: value for name, value in OUT_OF_MEMORY[row["id"]].items() if row.get(name) is None}
        job = replace(job_of({**row, **stated, "metric_kind": "reserved"}), logit_bytes=ENTROPY_LOGIT)
        groups = sum(size > 1 for size in (job.tensor, job.pipeline, job.context, job.expert, job.data)) + 1
        beside = (CONTEXT + groups * COMMUNICATOR + ASLEEP) / GIB
        capacity, needed = gpu_gib(row), answer(job).peak + beside
        assert capacity is not None
        verdict = str(verdict_of(needed, capacity))
        results.append({"id": row["id"], "stated": stated, "needed": needed, "gpu": capacity, "verdict": verdict})
    return results


# verl's and slime's vocab-parallel log-probs and entropy keep, in float32, what both come from, and the softmax.
ENTROPY_LOGIT = 2 + 3 * 4
# Rows that ran out of memory leave much open. What is taken for it, from the sources that they name:
OUT_OF_MEMORY: dict[str, dict[str, Any]] = {
    # verl's script: no recomputation until it is advised, each rank trains on one sample at a time
    "neg_verl3360": {"cp": 1, "mbs": 1, "dp": 1, "recompute": "none", "dist_opt": True},
    # slime packs up to seq tokens
    "neg_slime1136": {"mbs": 1, "dp": 2, "dist_opt": True},
    # a 14B's statics alone are 56 GB; a packed sample of 32,768 tokens, with Megatron's own loss
    "neg_skypilot10269": {"cp": 1, "ep": 1, "etp": 1, "seq": 32768, "mbs": 1, "recompute": "full", "dist_opt": True},
    "neg_iseekyan2": {"cp": 1, "ep": 1, "etp": 1, "dp": 4, "mbs": 1, "recompute": "none", "dist_opt": True},
}


def bars(results: Sequence[Mapping[str, Any]], negatives: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    planned = [each for each in results if "peak" in each]
    statics = [each for each in planned if "measured_static" in each]
    large = [each for each in planned if each["measured_peak"] is not None and each["measured_peak"] >= LARGE]
    small = [each for each in planned if each["measured_peak"] is not None and each["measured_peak"] < LARGE]
    return {
        "rows": len(results),
        "planned": len(planned),
        "static": _errors([(each["static"], each["measured_static"]) for each in statics]),
        "peak_large": _errors([(each["peak"], each["measured_peak"]) for each in large]),
        "peak_small": _errors([(each["peak"], each["measured_peak"]) for each in small]),
        "first": _errors([(each["first"], each["measured_first"]) for each in planned if "measured_first" in each]),
        "on_1.25_fits": _share(each["on 1.25"] != Verdict.NO for each in large),
        "on_0.8_refused": _share(each["on 0.8"] == Verdict.NO for each in large),
        "out_of_memory_not_called_fits": [sum(each["verdict"] != Verdict.FITS for each in negatives), len(negatives)],
    }


def _errors(pairs: Sequence[tuple[float, float]]) -> dict[str, float] | None:
    if not pairs:
        return None
    relative = sorted(abs(said / measured - 1) for said, measured in pairs)
    absolute = sorted(abs(said - measured) for said, measured in pairs)
    return {
        "rows": len(pairs),
        "median": median(relative),
        "p90": _p90(relative),
        "median_gib": median(absolute),
        "p90_gib": _p90(absolute),
    }


def _p90(values: Sequence[float]) -> float:
    return quantiles(values, n=10, method="inclusive")[-1] if len(values) > 1 else values[0]


def _share(flags: Any) -> list[int]:
    every = list(flags)
    return [sum(every), len(every)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", action="store_true", help="every row, too")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = json.loads(options.file.read_text())
    results, negatives = compare(rows), out_of_memory(rows)
    families: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in results:
        families[each["family"]].append(each)
    summary = {
        "all": bars(results, negatives),
        "families": {name: bars(each, []) for name, each in families.items()},
        "out_of_memory": negatives,
    }
    if options.rows:
        for each in sorted(results, key=lambda each: -(each["measured_peak"] or 0)):
            print(_line(each))
    print(json.dumps(summary, indent=1))
    if options.json:
        options.json.write_text(json.dumps(summary | {"rows": results}, indent=1) + "\n")


def _line(each: Mapping[str, Any]) -> str:
    if "unplannable" in each:
        return f"{each['id']}: {each['unplannable']}"
    words = [f"{each['id'][-75:]:<76}"]
    for name in ("static", "first", "peak"):
        if f"measured_{name}" in each:
            measured = each[f"measured_{name}"]
            words.append(f"{name} {each[name]:7.2f} of {measured:7.2f} ({each[name] / measured - 1:+.0%})")
    return "  ".join(words)


if __name__ == "__main__":
    main()
