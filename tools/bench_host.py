"""What a rank computes on the host in a step, beside the plain way of doing it, in one run.

    python -m tools.bench_host [--tokens 1000000] [--model FOLDER] [--json FILE]

micro-batches   packed from rollouts (learner/micro_batch.py), against lists that grow token by token
balance         dealing a step's rollouts over replicas (schedule/balance.py); no other way
parcel          rollouts as one tensor of bytes and back (rollout/parcel.py), against pickle
rollouts saved  512 rollouts × 2,000 tokens as Parquet (telemetry/rollouts.py), of which the main thread only copies, a
                thread beside it packs and writes; against lines of JSON, packed and written by the main thread
publish planned with --model: who gives whom which experts at EP 64 × PP 2, bucket by bucket, in float32 and in bf16
                (tools/bench_route.py); against asking all pairs. Seconds a publish
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zstandard

from a3po_megatron.batch import Batch, Group, Prompt, Rollout, Segment
from a3po_megatron.compat import prepare
from a3po_megatron.rollout.parcel import pack, unpack
from a3po_megatron.schedule.balance import costs_of, deal
from a3po_megatron.telemetry.rollouts import rollout_table, write_rollouts
from tools.bench_route import planning

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


def trained_on(count: int, length: int) -> tuple[list[Group], Batch]:
    """Groups of eight rollouts of a length, and their batch with what the learner found."""
    draw = np.random.default_rng(0)
    rollouts = []
    for number in range(count):
        tokens, logprobs = draw.integers(0, 150000, length), draw.normal(-1, 1, length).astype(np.float32)
        prompt = Prompt(f"p/{number // 8}", "q", "a", PROMPT.tokens, number // 8)
        text = "x" * 4 * length
        rollouts.append(Rollout(prompt, number % 8, number, 0, tokens, logprobs, "stop", text, (Segment(length, 1),)))
    groups = [Group(rollouts[first].prompt, rollouts[first : first + 8]) for first in range(0, count, 8)]
    values = torch.from_numpy(np.concatenate([rollout.logprobs for rollout in rollouts]))
    each, lengths = torch.zeros(count), torch.full((count,), length)
    index = torch.arange(count).repeat_interleave(length)
    batch = Batch(rollouts, each.long(), each.long(), 1, each, each > 0, each, lengths, index, values)
    batch.old_logprobs, batch.entropy, batch.token_weights = values + 1e-5, -values, torch.ones(len(values))
    return groups, batch


def as_lines(path: Path, groups: list[Group], batch: Batch) -> None:
    """Rollouts as they were written before: a line of JSON each, numbers with seven places."""
    ends, lines, row = batch.lengths.cumsum(0).tolist(), [], 0
    for group in groups:
        for rollout in group.rollouts:
            begin, end = ends[row] - len(rollout.tokens), ends[row]
            record: dict[str, Any] = {"prompt_id": rollout.prompt.id, "sample": rollout.sample, "seed": rollout.seed}
            record["tokens"] = rollout.tokens.tolist()
            record["logprobs"] = [round(value, 7) for value in rollout.logprobs.tolist()]
            for name in ("old_logprobs", "entropy", "token_weights"):
                record[name] = [round(value, 7) for value in getattr(batch, name)[begin:end].tolist()]
            lines.append(json.dumps(record))
            row += 1
    path.write_bytes(zstandard.compress("".join(f"{line}\n" for line in lines).encode()))


def saving_rollouts(count: int = 512, length: int = 2000) -> dict[str, Any]:
    """What saving a step's rollouts takes: seconds of the main thread, and of all cores, and the bytes of the file."""
    groups, batch = trained_on(count, length)
    found: dict[str, Any] = {"what": "rollouts saved", "rollouts": count, "tokens": count * length}
    with tempfile.TemporaryDirectory() as folder:
        begin, used = time.perf_counter(), time.process_time()
        table = rollout_table(0, groups, set(range(count)), batch, 0, list)
        found["main_thread_seconds"] = time.perf_counter() - begin
        write_rollouts(path := Path(folder) / "rollouts.parquet", table)
        found |= {"cpu_seconds": time.process_time() - used, "bytes": path.stat().st_size}
        begin, used = time.perf_counter(), time.process_time()
        as_lines(path := Path(folder) / "rollouts.jsonl.zst", groups, batch)
        found |= {"plain_main_thread_seconds": time.perf_counter() - begin}
        found |= {"plain_cpu_seconds": time.process_time() - used, "plain_bytes": path.stat().st_size}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=1_000_000, help="response tokens of a rank")
    parser.add_argument("--model", type=Path, help="folder with a config.json, whose publish is planned")
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
    found.append(saved := saving_rollouts())
    print(f"\nrollouts saved ({saved['rollouts']} of {saved['tokens']} tokens in all)   ours   the plain way")
    for name in ("main_thread_seconds", "cpu_seconds", "bytes"):
        print(f"  {name:22}{saved[name]:14.3f}{saved[f'plain_{name}']:14.3f}")
    if arguments.model:
        print("\npublish planned; engines take   bytes   buckets   once s   all pairs s   now s   ratio")
        for row in (rows := planning(arguments.model)):
            ratio = row["all_pairs_seconds"] / row["seconds"]
            print(
                f"{row['engines_take']:>29}{row['itemsize']:8}{row['buckets']:10}{row['plan_seconds']:9.2f}"
                f"{row['all_pairs_seconds']:14.2f}{row['seconds']:8.3f}{ratio:8.0f}"
            )
        found += rows
    if arguments.json:
        arguments.json.write_text(json.dumps({"tokens": arguments.tokens, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
