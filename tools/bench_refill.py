"""How long a step samples, by the rule that releases prompts: as engines have room, against rounds. A simulation.

    python tools/bench_refill.py [--steps 60] [--json FILE]

Engines have room for all that is released, so that only waiting counts: a prompt's group of 8 takes as long as its
longest response, lognormal (median 4,000 tokens, sigma 0.6, cut at 16,384). Time is in units of what the prompts take
that a step begins with; 1 is as short as it gets. Carried: groups that a step leaves to the next, of those it wants.
"""

from __future__ import annotations

import argparse
import heapq
import json
import math
import random
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from a3po_megatron.schedule.refill import Refill, Share

CASES = ((512, 0.6), (128, 0.4), (32, 0.5), (8, 0.3), (32, 0.95))
BATCHES = 4  # rollout.max_batches
Step = tuple[int, int, float]  # prompts sampled, groups that count, time


def group_seconds(draw: random.Random) -> float:
    return max(min(16384.0, draw.lognormvariate(math.log(4000), 0.6)) for _ in range(8))


def refilled(wanted: int, share: float, carried: int, before: Share, draw: random.Random) -> Step:
    refill = Refill(max(0, wanted - carried), wanted, BATCHES * wanted, before)
    begun, kept, now, running = 0, 0, 0.0, list[tuple[float, int, bool]]()
    first = 0.0
    while True:
        for number in range(begun, refill.released):
            heapq.heappush(running, (now + group_seconds(draw), number, draw.random() < share))
        begun = max(begun, refill.released)
        first = first or max((end for end, *_ in running), default=1.0)
        if not running:
            return begun, kept, now / first
        now, number, counts = heapq.heappop(running)
        kept += counts
        refill.add(number, counts)


def in_rounds(wanted: int, share: float, carried: int, before: Share, draw: random.Random) -> Step:
    """As it was before: the next round begins when the last response of the one before it is graded."""
    tried = kept = 0
    now = first = 0.0
    for _ in range(BATCHES):
        missing = wanted - carried - kept
        if missing <= 0:
            break
        count = missing if not kept else min(wanted, math.ceil(missing * tried / kept))
        took = max(group_seconds(draw) for _ in range(count))
        now, first = now + took, first or took
        kept += sum(draw.random() < share for _ in range(count))
        tried += count
    return tried, kept, now / (first or 1.0)


def steps_of(way: Callable[..., Step], wanted: int, share: float, steps: int) -> dict[str, float]:
    draw, before, carried = random.Random(0), Share(), 0
    times, left = [], []
    for _ in range(steps):
        tried, kept, time = way(wanted, share, min(carried, wanted), before, draw)
        before = before.after(kept, tried)
        carried = max(0, carried + kept - wanted)
        if tried:
            times.append(time)
        left.append(carried / wanted)
    return {"time": statistics.mean(times), "carried": statistics.mean(left)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("wanted   share   rounds: time  carried   refill: time  carried   ratio")
    for wanted, share in CASES:
        then, now = (steps_of(way, wanted, share, arguments.steps) for way in (in_rounds, refilled))
        rows.append({"wanted": wanted, "share": share, "rounds": then, "refill": now})
        print(
            f"{wanted:6}{share:8}{then['time']:15.2f}{then['carried']:9.1%}{now['time']:15.2f}{now['carried']:9.1%}"
            f"{then['time'] / now['time']:8.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
