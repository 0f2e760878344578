"""What a publish of a large model costs in planning: who gives whom which experts, bucket by bucket.

    python tools/bench_route.py MODEL_FOLDER [--tensor 1] [--pipeline 2] [--expert 64] [--json FILE]

Against asking all pairs of an expert group for each bucket. MODEL_FOLDER needs its config.json alone; nothing is sent.
Engines are as large as the expert group and hold whole experts (`rollout.expert`), or each rank takes all of them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from a3po_megatron.model.cut import Piece, pieces, tensors
from a3po_megatron.model.layout import Layout
from a3po_megatron.model.read import read_facts
from a3po_megatron.rollout.engine import local_experts
from a3po_megatron.weights.route import Bucket, Plan, expert_exchange, expert_pieces, plan


def all_pairs(whole: Plan, bucket: Bucket, stage: int, within: int) -> Any:
    """The same by its definition: (sent, got, alike), or None."""
    members = whole.expert_group(within)
    receivers = [whole.rank(stage, member) for member in members]
    parts = [[expert_pieces(whole, bucket, member, to) for to in receivers] for member in members]
    pairs = [(a, b) for a in range(len(members)) for b in range(len(members)) if a != b]
    if not any(parts[a][b] for a, b in pairs):
        return None
    first: list[list[Piece]] = [by_receiver[0] for by_receiver in parts]
    alike = all(given == mine for by_receiver, mine in zip(parts, first, strict=True) for given in by_receiver)
    if alike and len({sum(piece.numel for piece in given) for given in first}) == 1:
        return [], [], first
    me = members.index(within)
    sent = [[] if to == me else parts[me][to] for to in range(len(members))]
    return sent, [[] if other == me else parts[other][me] for other in range(len(members))], None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tensor", type=int, default=1)
    parser.add_argument("--pipeline", type=int, default=2)
    parser.add_argument("--expert", type=int, default=64)
    parser.add_argument("--bucket-bytes", type=int, default=256 << 20)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    facts = read_facts(arguments.model)
    layout = Layout(tensor=arguments.tensor, pipeline=arguments.pipeline, expert=arguments.expert)
    count = facts.experts.count if facts.experts else 0
    by_rank = [pieces(facts, layout, place) for place in layout.places()]
    rows: list[dict[str, Any]] = []
    print("engines take    itemsize  buckets    plan s   all pairs s   now s   ratio")
    for what, expert in (("all experts", 1), ("their own", arguments.expert)):
        experts = [local_experts(rank, arguments.expert, expert, count) for rank in range(len(by_rank))]
        for itemsize in (4, 2):
            begin = time.perf_counter()
            whole = plan(layout, by_rank, list(tensors(facts)), arguments.bucket_bytes, itemsize, experts)
            planned = time.perf_counter()
            now = [expert_exchange(whole, bucket, 0, 0) for bucket in whole.buckets]
            exchanged = time.perf_counter()
            then = [all_pairs(whole, bucket, 0, 0) for bucket in whole.buckets]
            paired = time.perf_counter()
            assert [None if each is None else (each.sent, each.got, each.alike) for each in now] == then
            row = {
                "engines_take": what,
                "itemsize": itemsize,
                "buckets": len(whole.buckets),
                "plan_seconds": planned - begin,
                "all_pairs_seconds": paired - exchanged,
                "seconds": exchanged - planned,
            }
            rows.append(row)
            ratio = row["all_pairs_seconds"] / row["seconds"]
            print(
                f"{what:16}{itemsize:8}{len(whole.buckets):9}{row['plan_seconds']:10.2f}"
                f"{row['all_pairs_seconds']:14.2f}{row['seconds']:8.3f}{ratio:8.0f}"
            )
    if arguments.json:
        arguments.json.write_text(json.dumps({"model": arguments.model.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
