"""Experiments 5 and 7: vLLM in the learner's process.

cycles                 sleep, wake weights, layer-wise reload, wake cache, receipt; 20 times without a leak
seeds                  one request's tokens, whatever is sampled beside it; a response continued from its middle
mismatch               learner against engine on what the engine sampled, by precision of both
against_standalone     the same prompts and seeds in a vLLM of its own, which reads the same folder from disk
"""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.rollout.engine import Completion, Request

from .colocated import LENGTHS, Colocated, colocate, in_flight, logprobs_of, requests_of, stopped_share, stops_of
from .measure import free_bytes
from .rank import TINY, make_model
from .report import Report
from .runner import ROOT

CYCLES = 20
# Between the second and the last cycle nothing may grow: 32 pages of 2 MiB, below the smallest buffer of an engine.
GROWN_BYTES = 64 << 20
# A token is another one where two candidates are closer than the batch's composition moves logits: in bf16 some 1e-2 of
# log-probs whose gaps are of size 1, so one token in a hundred at most, and every later one of that response with it.
# Half of the responses of 64 tokens may end differently before something else must be the reason.
SAME_RESPONSES = 0.5
# NeMo-RL calls a mean exp |Δ| of up to 1.05 healthy in bf16 (docs/fp8.md). FP8 on either side: what rounding alone does
# to this model (te.py), once for each side.
BF16_RATIO, FP8_RATIO = 1.05, 1.35


def cycles_on(report: Report, backend: Backend, cycles: int = CYCLES, **rollout: Any) -> None:
    cuda = backend.device == "cuda"
    both = colocate(make_model(), backend, stops=stops_of(TINY["vocab_size"]), **rollout)
    requests = requests_of(both.facts.vocab, 16)
    rows: list[dict[str, Any]] = []
    sampled: list[list[Completion]] = []
    receipts = []
    for _ in range(cycles):
        row: dict[str, Any] = {}
        start = time.perf_counter()
        with both.residency.publishing():
            row["awake_seconds"] = time.perf_counter() - start
            receipts.append(both.publish())
        row["publish_seconds"] = receipts[-1].seconds
        with both.residency.rollout():
            sampled.append(both.sample(requests))
            row["in_flight"] = in_flight(both.engine)
            row["used_rollout"] = backend.used_bytes()
            start = time.perf_counter()
        row["asleep_seconds"] = time.perf_counter() - start
        row["free_asleep"] = free_bytes() if cuda else 0
        with both.residency.training():
            row["used_training"] = backend.used_bytes()
        rows.append(row)
    wanted, last = sampled[0], sampled[-1]
    report.holds(
        "every receipt is of the backend's strength", {r.strength for r in receipts} == {backend.receipt_strength}
    )
    report.holds("every receipt names the same weights", len({r.weights for r in receipts}) == 1)
    report.number("receipt: strength, tensors, bytes", [receipts[0].strength, receipts[0].tensors, receipts[0].bytes])
    report.claim("canary, the largest of all cycles", max(float(r.canary) for r in receipts), 0.25)
    same = [all(_equal(a, b) for a, b in zip(each, wanted, strict=True)) for each in sampled]
    # The same requests in the same order, weights equal bit for bit: nothing is left that could differ.
    report.holds(f"tokens and log-probs after every reload, equal to the last bit, {cycles} times", all(same))
    report.claim_above("share of responses that end on a stop token", stopped_share(wanted), 0.5)
    report.claim("steps left in vLLM's queue", max(row["in_flight"] for row in rows), 0)
    difference = logprobs_of(last) - both.scores(requests, last)
    report.number("engine − learner, mean |Δ log-prob|", float(difference.abs().mean()))
    middle = {k: statistics.median(row[k] for row in rows) for k in rows[0] if k.endswith("seconds")}
    report.number("seconds, median", middle)
    if cuda:
        report.number(
            "device bytes in use: rollout, training (last cycle)",
            [rows[-1][k] for k in ("used_rollout", "used_training")],
        )
        report.claim(
            f"device bytes lost over {cycles} cycles, asleep",
            rows[1]["free_asleep"] - rows[-1]["free_asleep"],
            GROWN_BYTES,
        )
        asleep_less = rows[-1]["used_rollout"] - rows[-1]["used_training"]
        report.number("rollout's bytes less training's", asleep_less)
    report.headline(f"{cycles} cycles, receipt `{receipts[0].strength}`, asleep in {middle['asleep_seconds']:.3f} s")


def _equal(a: Completion, b: Completion) -> bool:
    return bool(
        (a.tokens.shape == b.tokens.shape) and (a.tokens == b.tokens).all() and (a.logprobs == b.logprobs).all()
    )


def cycles(report: Report) -> None:
    cycles_on(report, CUDA)


def seeds_on(report: Report, backend: Backend, exactly: bool) -> None:
    """Which responses come again: alone, in another order, and from their middle."""
    both = colocate(make_model(), backend, batch_invariant=exactly)
    with both.residency.publishing():
        both.publish()
    requests = requests_of(both.facts.vocab, 48)
    with both.residency.rollout():
        first = both.sample(requests)
        again = both.sample(requests)
        order = list(range(len(requests)))
        random.Random(0).shuffle(order)
        shuffled = both.sample([requests[i] for i in order])
        few = both.sample(requests[:5])
        cut = LENGTHS["max_tokens"] // 2
        continued = both.sample(
            [Request([*r.prompt, *c.tokens[:cut].tolist()], r.seed) for r, c in zip(requests, first, strict=True)]
        )
    found = {
        "the same requests again": same_share(first, again),
        "in another order": same_share([first[i] for i in order], shuffled),
        "five of them alone": same_share(first[:5], few),
        # Noise by seed and absolute position: what came before was drawn, or was given, alike.
        "continued from the middle, same seed": same_share(first, continued, skip=cut),
    }
    for name, share in found.items():
        report.number(f"{name}: share of equal responses", share)
        report.claim_above(f"{name}: share of equal responses", share, 1.0 if exactly else SAME_RESPONSES)
    distinct = len({tuple(c.tokens.tolist()) for c in first}) / len(first)
    report.claim_above("different seeds give different responses", distinct, 0.95)
    report.number("VLLM_BATCH_INVARIANT", os.environ.get("VLLM_BATCH_INVARIANT"))
    report.headline(", ".join(f"{name} {share:.0%}" for name, share in found.items()))


def same_share(a: Sequence[Completion], b: Sequence[Completion], skip: int = 0) -> float:
    """Share of responses whose tokens are equal, from `skip` on, over the length of the shorter."""
    equal = 0
    for one, other in zip(a, b, strict=True):
        left = one.tokens[skip:]
        right = other.tokens[: len(left)]
        equal += len(right) == len(left) and bool((left == right).all())
    return equal / len(a)


def seeds(report: Report) -> None:
    seeds_on(report, CUDA, exactly=False)


def seeds_exact(report: Report) -> None:
    seeds_on(report, CUDA, exactly=True)


def gap(engine: Tensor, learner: Tensor) -> dict[str, float]:
    """Learner against engine, over tokens that the engine sampled. All of engine's distribution q and learner's p."""
    difference = learner.double() - engine.double()
    return {
        "abs_mean": float(difference.abs().mean()),
        "exp_abs_mean": float(difference.abs().exp().mean()),  # NeMo-RL's token_mult_prob_error
        "largest": float(difference.abs().max()),
        "kl_k3": float((difference.exp() - 1 - difference).mean()),
        "beyond_tis_cap_2": float((difference > torch.tensor(2.0).log()).double().mean()),
    }


def mismatch_on(
    report: Report, backend: Backend, precisions: Sequence[str], quantization: str | None, count: int = 64
) -> None:
    """Of so many requests."""
    rollout = {} if quantization is None else {"quantization": quantization}
    both = colocate(make_model(), backend, {"precision": precisions[0]}, **rollout)
    with both.residency.publishing():
        receipt = both.publish()
    requests = requests_of(both.facts.vocab, count)
    with both.residency.rollout():
        completions = both.sample(requests)
    engine, table = logprobs_of(completions), {}
    with both.residency.training():
        for precision in precisions:
            both.replace_learner(precision=precision)
            table[precision] = gap(engine, both.scores(requests, completions))
            report.number(f"learner {precision}, engine {quantization or 'bf16'}", table[precision])
            plain = precision == "bf16" and quantization is None
            report.claim(
                f"learner {precision}: mean exp |Δ log-prob|",
                table[precision]["exp_abs_mean"],
                BF16_RATIO if plain else FP8_RATIO,
            )
    wanted = backend.receipt_strength if quantization is None else "requantised"
    report.holds(f"the receipt says `{wanted}`", receipt.strength == wanted)
    report.number("canary", receipt.canary)
    report.headline(
        "mean |Δ log-prob|: " + ", ".join(f"learner {name} {row['abs_mean']:.4f}" for name, row in table.items())
    )


PRECISIONS = ("bf16", "fp8-blockwise", "fp8-tensorwise")


def mismatch(report: Report) -> None:
    mismatch_on(report, CUDA, PRECISIONS, None)


def mismatch_fp8_engine(report: Report) -> None:
    mismatch_on(report, CUDA, PRECISIONS, "fp8_per_block")


STANDALONE = """
import json, sys
from vllm import LLM, SamplingParams
ask = json.loads(open(sys.argv[1]).read())
llm = LLM(model=ask["model"], **ask["engine"])
outputs = llm.generate(
    [{"prompt_token_ids": prompt} for prompt, _ in ask["requests"]],
    [SamplingParams(temperature=1.0, max_tokens=ask["max_tokens"], seed=seed, logprobs=0, detokenize=False)
     for _, seed in ask["requests"]],
)
found = [{"tokens": list(o.outputs[0].token_ids),
          "logprobs": [e[t].logprob for e, t in zip(o.outputs[0].logprobs, o.outputs[0].token_ids)]} for o in outputs]
open(sys.argv[2], "w").write(json.dumps(found))
"""


def standalone(
    folder: Path, requests: Sequence[Request], engine: dict[str, Any], seconds: float = 300
) -> list[dict[str, Any]]:
    """What a vLLM of its own, with its own scheduler process, samples: nothing of this package takes part."""
    with tempfile.TemporaryDirectory() as place:
        ask, answer = Path(place, "ask.json"), Path(place, "answer.json")
        given = [[list(map(int, r.prompt)), r.seed] for r in requests]
        ask.write_text(
            json.dumps({"model": str(folder), "engine": engine, "requests": given, "max_tokens": LENGTHS["max_tokens"]})
        )
        ours = ("VLLM_ENABLE_V1_MULTIPROCESSING", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
        settings = {name: value for name, value in os.environ.items() if name not in ours}
        command = [sys.executable, "-c", STANDALONE, str(ask), str(answer)]
        subprocess.run(command, env=settings, check=True, timeout=seconds, cwd=ROOT)
        return list(json.loads(answer.read_text()))


def against_standalone_on(report: Report, backend: Backend, sizes: dict[str, Any] = TINY, **engine: Any) -> None:
    folder = make_model(sizes)
    requests = requests_of(sizes["vocab_size"], 32)
    common: dict[str, Any] = {
        "dtype": "bfloat16",
        "max_model_len": LENGTHS["max_prompt_tokens"] + LENGTHS["max_tokens"],
        "max_num_seqs": LENGTHS["max_sequences"],
        "skip_tokenizer_init": True,
        "generation_config": "vllm",
        "seed": 0,
        **engine,
    }
    theirs = standalone(folder, requests, common)
    both: Colocated = colocate(folder, backend)
    with both.residency.publishing():
        both.publish()
    with both.residency.rollout():
        ours = both.sample(requests)
    equal, differences = 0, []
    for mine, other in zip(ours, theirs, strict=True):
        tokens = mine.tokens.tolist()
        until = next((i for i, (a, b) in enumerate(zip(tokens, other["tokens"], strict=False)) if a != b), len(tokens))
        equal += tokens == other["tokens"]
        differences += [
            abs(float(a) - b) for a, b in zip(mine.logprobs[:until], other["logprobs"][:until], strict=False)
        ]
    share = equal / len(ours)
    report.number("responses, share equal, tokens compared", [len(ours), share, len(differences)])
    report.claim_above("share of equal responses", share, SAME_RESPONSES)
    # bf16 logits of the same weights; the batch's composition alone moves them.
    report.claim(
        "mean |Δ log-prob| up to the first difference",
        statistics.fmean(differences) if differences else float("nan"),
        0.02,
    )
    report.headline(
        f"{share:.0%} of {len(ours)} responses equal, mean |Δ log-prob| {statistics.fmean(differences or [0]):.1e}"
    )


def against_standalone(report: Report) -> None:
    # Its share of a device that is empty: it starts and ends before the engine in process is built.
    against_standalone_on(report, CUDA, gpu_memory_utilization=0.3)
