"""What a save costs a run, and what goes on beside it, with real Megatron shards on this machine.

    python tools/bench_checkpoint.py                            TP 2, a model of 60 M parameters with Adam's state
    python tools/bench_checkpoint.py --set parallel.data=2 --saves 5 --json out.json

Prints, per rank, medians over the saves after the first:

    gather    Megatron lays out what this rank stores (the distributed optimizer's part is put together and copied)
    copy      the rest of it is copied aside; then the run goes on
    write     hashed, written and on the disk, in the background
    stall     gather + copy: what the run waits for
    clone     the plain copy of as many bytes, for comparison: a stall is bounded by bytes
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

from a3po_megatron.launch import environment

environment.prepare()

from a3po_megatron import compat  # noqa: E402

compat.prepare()

from bench_ranks import named_layout, run_bench  # noqa: E402

STAGES = ("gather", "copy", "write", "stall", "clone")


def measure(folder: Path, saves: int) -> None:
    """One rank: saves again and again, and leaves its numbers in the folder."""
    import torch
    import torch.distributed as dist

    from a3po_megatron.config import load_resolved
    from a3po_megatron.learner.learner import Learner
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.ranks.groups import connect
    from a3po_megatron.run.store import Saving

    config = load_resolved(folder / "config.yaml")
    cluster = connect(config.parallel, config.cluster, config.rollout.tensor, 0)
    learner = Learner(cluster, read_facts(config.model.path), config)
    rows: list[dict[str, float]] = []
    for number in range(saves + 1):
        target = folder / f"save-{number}"
        target.mkdir(exist_ok=True)
        dist.barrier()
        begin = time.perf_counter()
        state = learner.sharded_state()
        gathered = time.perf_counter()
        saving = Saving(state, target)
        copied = time.perf_counter()
        share = saving.write()
        written = time.perf_counter()
        size = sum(file.bytes for file in share.files)
        shares: list[Any] = [None] * cluster.world
        dist.all_gather_object(shares, share)
        if cluster.rank == 0:
            saving.complete(shares)
        plain = torch.ones(size // 4)
        start = time.perf_counter()
        plain.clone()
        row = {
            "gather": gathered - begin,
            "copy": copied - gathered,
            "write": written - copied,
        }
        stall = row["gather"] + row["copy"]
        rows.append(row | {"stall": stall, "clone": time.perf_counter() - start})
    seconds = {name: median(row[name] for row in rows[1:]) for name in STAGES}
    found = {"rank": cluster.rank, "bytes": size, "first_stall": rows[0]["stall"], "seconds": seconds}
    (folder / f"rank-{cluster.rank}.json").write_text(json.dumps(found))


def show(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'rank':>4}{'GB':>8}" + "".join(f"{name:>9}" for name in STAGES) + f"{'stall/write':>13}{'stall/clone':>13}"
    )
    for row in rows:
        seconds = row["seconds"]
        ratios = [seconds["stall"] / seconds[other] for other in ("write", "clone")]
        print(
            f"{row['rank']:4}{row['bytes'] / 1e9:8.3f}"
            + "".join(f"{seconds[name]:9.3f}" for name in STAGES)
            + "".join(f"{ratio:13.2f}" for ratio in ratios)
        )
    print(f"\nthe first save of the process stalls for {max(row['first_stall'] for row in rows):.3f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an HF folder; default: a random Qwen3 of 60 M parameters")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        environment.report_failures(options.rank_in, lambda folder: measure(folder, options.saves))
    words = ("--saves", str(options.saves))
    config, rows = run_bench("checkpoint", __file__, options, "", *words)
    layout = named_layout(config)
    print(f"learner {layout}, median of {options.saves} saves; seconds\n")
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"learner": layout, "ranks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
