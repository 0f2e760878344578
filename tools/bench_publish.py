"""What a publish costs, stage by stage, with real Megatron shards and real vLLM engines on this machine.

    python tools/bench_publish.py                           TP 2 learner, two engines, a model of 60 M parameters
    python tools/bench_publish.py --set parallel.pipeline=2 --set rollout.tensor=2
    python tools/bench_publish.py --model DIR --publishes 5 --json out.json

Prints, per rank: bytes that the engine took and bytes that came from other ranks; seconds of each stage, the median
over the publishes after the first; and what the receipt costs per GB. Stages:

    gather     shards packed, tensors laid out       load      vLLM takes the tensors up
    send       collectives                           resume    what was computed with the old weights is dropped
    receipt    checks and checksums, both sides      canary    every engine continues prompts, the learner scores them
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

STAGES = ("gather", "send", "receipt", "load", "resume")


def measure(folder: Path, publishes: int) -> None:
    """One rank: publishes again and again, and leaves its numbers in the folder."""
    from a3po_megatron.config import load_resolved
    from a3po_megatron.learner.learner import Learner
    from a3po_megatron.model.build import DTYPES
    from a3po_megatron.model.layout import layout_of
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.ranks.groups import connect
    from a3po_megatron.rollout.engine import local_experts
    from a3po_megatron.rollout.vllm_engine import VllmEngine
    from a3po_megatron.weights.publish import Publisher

    config = load_resolved(folder / "config.yaml")
    cluster = connect(config.parallel, config.cluster, config.rollout.tensor, 0)
    path = Path(config.model.path)
    facts = read_facts(path)
    engine = VllmEngine(path, facts, facts.eos, config.rollout, DTYPES[config.model.dtype], cluster.backend)
    learner = Learner(cluster, facts, config)
    count, rollout = facts.experts.count if facts.experts else 0, config.rollout
    canary = [tuple(range(2 + n, 12 + n)) for n in range(config.publish.canary_prompts)]
    publisher = Publisher(
        cluster,
        facts,
        layout_of(config.parallel, cluster.backend.spec),
        config.publish,
        canary,
        lambda rank: local_experts(rank, rollout.tensor, rollout.expert, count),
    )
    rows: list[dict[str, float]] = []
    for _ in range(publishes + 1):
        start = time.perf_counter()
        receipt = publisher.publish(learner.parameters(), learner.logprobs, engine)
        row = {stage: getattr(receipt.timings, stage) for stage in STAGES}
        rows.append(row | {"canary": time.perf_counter() - start - receipt.seconds, "publish": receipt.seconds})
    seconds = {name: median(row[name] for row in rows[1:]) for name in rows[0]}
    found = {
        "rank": cluster.rank,
        "bytes": receipt.bytes,
        "received_bytes": receipt.received_bytes,
        "buckets": len(publisher.plan.buckets),
        "seconds": seconds,
        "receipt_ms_per_gb": seconds["receipt"] * 1e3 / (receipt.bytes / 1e9),
        "largest_canary_difference": receipt.canary,
    }
    (folder / f"rank-{cluster.rank}.json").write_text(json.dumps(found))


def show(rows: list[dict[str, Any]]) -> None:
    names = (*STAGES, "canary", "publish")
    print(
        f"{'rank':>4}{'GB taken':>10}{'GB received':>13}" + "".join(f"{name:>9}" for name in names) + "  receipt ms/GB"
    )
    for row in rows:
        seconds = "".join(f"{row['seconds'][name]:9.3f}" for name in names)
        sizes = f"{row['bytes'] / 1e9:10.3f}{row['received_bytes'] / 1e9:13.3f}"
        print(f"{row['rank']:4}{sizes}{seconds}{row['receipt_ms_per_gb']:15.0f}")
    slowest = max(row["seconds"]["publish"] for row in rows)
    parts = {name: max(row["seconds"][name] for row in rows) / slowest for name in STAGES}
    print("\nof the slowest rank's publish: " + ", ".join(f"{name} {part:.0%}" for name, part in parts.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="an HF folder; default: a random Qwen3 of 60 M parameters")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--publishes", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank-in", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_in:
        environment.report_failures(options.rank_in, lambda folder: measure(folder, options.publishes))
    lengths = "{max_prompt_tokens: 64, max_tokens: 64, max_sequences: 8}"
    words = ("--publishes", str(options.publishes))
    config, rows = run_bench("publish", __file__, options, f"rollout: {lengths}\n", *words)
    layout = named_layout(config)
    engines = {"tensor": config.rollout.tensor, "expert": config.rollout.expert}
    print(
        f"learner {layout}, engines {engines}, {rows[0]['buckets']} buckets, median of {options.publishes} publishes\n"
    )
    show(rows)
    if options.json:
        options.json.write_text(json.dumps({"learner": layout, "engines": engines, "ranks": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
