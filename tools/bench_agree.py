"""How long one decision of all ranks takes: along the tree, against rank 0 asking one rank after the other.

    python tools/bench_agree.py [--json FILE]

Every rank is a thread with a connection of its own to one store over loopback: what is compared is the way of words,
not the network. Prints milliseconds and how often the busiest rank asks the store.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from a3po_megatron.ranks.tree import Tree, below

WORLDS = (8, 16, 32, 64)
TIMEOUT = timedelta(seconds=60)
TREES: dict[int, Tree] = {}  # of each rank's connection


def along_tree(store: Any, rank: int, world: int, number: int) -> None:
    tree = TREES.setdefault(id(store), Tree(store, rank, world, (dist.DistStoreError,)))
    if tree.up(f"{number}", ["tag", rank]) is not None:
        tree.answer(f"{number}", {"value": number})
    assert tree.answered(f"{number}") == {"value": number}


def one_by_one(store: Any, rank: int, world: int, number: int) -> None:
    store.set(f"{number}/{rank}", json.dumps(["tag", rank]))
    if rank == 0:
        for other in range(world):
            json.loads(store.get(f"{number}/{other}"))
        store.set(f"{number}", json.dumps({"value": number}))
        for other in range(world):
            store.delete_key(f"{number}/{other}")
    json.loads(store.get(f"{number}"))


def seconds(world: int, way: Callable[[Any, int, int, int], None], times: int) -> float:
    """The median of so many decisions, from when the last rank has come to when rank 0 goes on."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=TIMEOUT)
    barrier, took = threading.Barrier(world), []
    TREES.clear()

    def run(rank: int) -> None:
        store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False, timeout=TIMEOUT)
        for number in range(times):
            barrier.wait()
            begin = time.perf_counter()
            way(store, rank, world, number)
            if rank == 0:
                took.append(time.perf_counter() - begin)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return statistics.median(took)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("ranks   tree ms   one by one ms   ratio   busiest rank asks")
    for world in WORLDS:
        tree, flat = (seconds(world, way, arguments.times) for way in (along_tree, one_by_one))
        asks = 3 * len(below(0, world)) + 6, 2 * world + 4
        rows.append({"ranks": world, "tree_ms": 1e3 * tree, "one_by_one_ms": 1e3 * flat, "asks": asks})
        print(f"{world:5}{1e3 * tree:10.2f}{1e3 * flat:16.2f}{flat / tree:8.2f}   {asks[0]} against {asks[1]}")
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
