"""What a publish of a large model costs in planning: who gives whom which experts, bucket by bucket.

Against asking all pairs of an expert group for each bucket; tools/bench_host.py prints it. A model's folder needs its
config.json alone; nothing is sent. Engines are as large as the expert group and hold whole experts (`rollout.expert`),
or each rank takes all of them.
"""

from __future__ import annotations

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


def planning(model: Path, pipeline: int = 2, expert: int = 64, bucket_bytes: int = 256 << 20) -> list[dict[str, Any]]:
    """One row for engines that take all experts, or their own, and for float32 and bf16."""
    facts = read_facts(model)
    layout = Layout(pipeline=pipeline, expert=expert)
    count = facts.experts.count if facts.experts else 0
    by_rank = [pieces(facts, layout, place) for place in layout.places()]
    rows: list[dict[str, Any]] = []
    for what, of_engine in (("all experts", 1), ("their own", expert)):
        experts = [local_experts(rank, expert, of_engine, count) for rank in range(len(by_rank))]
        for itemsize in (4, 2):
            begin = time.perf_counter()
            whole = plan(layout, by_rank, list(tensors(facts)), bucket_bytes, itemsize, experts)
            planned = time.perf_counter()
            now = [expert_exchange(whole, bucket, 0, 0) for bucket in whole.buckets]
            exchanged = time.perf_counter()
            then = [all_pairs(whole, bucket, 0, 0) for bucket in whole.buckets]
            paired = time.perf_counter()
            assert [None if each is None else (each.sent, each.got, each.alike) for each in now] == then
            rows.append(
                {
                    "what": "publish planned",
                    "engines_take": what,
                    "itemsize": itemsize,
                    "buckets": len(whole.buckets),
                    "plan_seconds": planned - begin,
                    "all_pairs_seconds": paired - exchanged,
                    "seconds": exchanged - planned,
                }
            )
    return rows
