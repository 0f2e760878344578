"""What a rank computes on the host in a step, beside the plain way of doing it, in one run.

    python tools/bench_host.py [--tokens 1000000] [--json FILE]

micro-batches   packed from rollouts (learner/micro_batch.py), against lists that grow token by token
balance         dealing a step's rollouts over replicas (schedule/balance.py); no other way
parcel          rollouts as one tensor of bytes and back (rollout/parcel.py), against pickle
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a3po_megatron.batch import Prompt, Rollout, Segment
from a3po_megatron.compat import prepare
from a3po_megatron.rollout.parcel import pack, unpack
from a3po_megatron.schedule.balance import costs_of, deal

PROMPT = Prompt("p", "q", "a", tuple(range(200)), 0)


def rollouts_of(tokens: int) -> list[Rollout]:
    """So many response tokens, with the lengths that long reasoning has: lognormal, cut at 16,384."""
    draw, left = np.random.default_rng(0), tokens
    made: list[Rollout] = []
    while left > 0:
        length = min(left, int(min(np.exp(np.log(6000) + 0.8 * draw.normal()), 16384)) + 1)
        response, logprobs = draw.integers(0, 150000, length), draw.normal(-1, 1, length).astype(np.float32)
        segments = (Segment(length, 1),)
        made.append(Rollout(PROMPT, len(made), 0, 0, response, logprobs, "stop", "x" * 4 * length, segments))
        left -= length
    return made


def seconds(work: Callable[[], Any], times: int = 5) -> float:
    took = []
    for _ in range(times):
        begin = time.perf_counter()
        work()
        took.append(time.perf_counter() - begin)
    return statistics.median(took)


def by_lists(sequences: Sequence[tuple[Sequence[int], np.ndarray]], starts: Sequence[int]) -> list[torch.Tensor]:
    """What a micro-batch holds of every token, in lists that grow."""
    tokens: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    for (prompt, response), start in zip(sequences, starts, strict=True):
        answer = response.tolist()
        begin = len(tokens) + len(prompt) - 1
        tokens += [*prompt, *answer][:-1]
        positions += range(len(prompt) + len(answer) - 1)
        predicting += range(begin, begin + len(answer))
        targets += answer
        index += range(start, start + len(answer))
    return [torch.tensor(values) for values in (tokens, positions, predicting, targets, index)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="response tokens of a rank")
    parser.add_argument("--json", type=Path, help="write the numbers there")
    arguments = parser.parse_args()
    prepare()
    from a3po_megatron.learner.micro_batch import micro_batch

    rollouts = rollouts_of(arguments.tokens)
    sequences = [(rollout.prompt.tokens, rollout.tokens) for rollout in rollouts]
    lengths = [len(rollout.tokens) for rollout in rollouts]
    starts = (np.cumsum(lengths) - lengths).tolist()
    costs, owners = costs_of(lengths, 50000.0), [number // 8 % 64 for number in range(len(lengths))]
    parcel = pack(rollouts)
    rows = {
        "micro-batches": (lambda: micro_batch(sequences, starts), lambda: by_lists(sequences, starts)),
        "balance over 64 replicas": (lambda: deal(costs, owners, 64), None),
        "parcel, packed": (lambda: pack(rollouts), lambda: pickle.dumps(rollouts)),
        "parcel, unpacked": (lambda: unpack(parcel, lambda _: PROMPT), lambda: pickle.loads(pickle.dumps(rollouts))),
    }
    found: list[dict[str, Any]] = []
    print(f"{arguments.tokens} response tokens in {len(rollouts)} rollouts\n")
    print(f"{'':26}  ns a token   the plain way   ratio")
    for name, (work, plain) in rows.items():
        ours, theirs = seconds(work), None if plain is None else seconds(plain)
        per = 1e9 / arguments.tokens
        found.append({"what": name, "ns_a_token": ours * per, "plain_ns_a_token": theirs and theirs * per})
        beside = "" if theirs is None else f"{theirs * per:16.1f}{theirs / ours:8.1f}"
        print(f"{name:26}{ours * per:12.1f}{beside}")
    if arguments.json:
        arguments.json.write_text(json.dumps({"tokens": arguments.tokens, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
