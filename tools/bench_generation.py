"""Generation in the learner's process beside vLLM alone: the same prompts, seeds, weights and threads, in turns.

    python tools/bench_generation.py [--rounds 3] [--json FILE]

in process    `a3po train` with a learning rate that moves no weight: tokens of a step by its seconds of rollout, which
              deals out prompts, grades, and writes the journal besides
alone         vllm.LLM.generate in a process of its own, with the engine arguments, prompts and seeds of the run: its
              tokens must be the same

demo          32 prompts × 8 rollouts of a few tokens; ten_million: 8 prompts × 4 rollouts of 256 (tools/bench_trl.py)
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tools.bench_trl import CASES, ROOT, SIDE_SECONDS, SKIPPED, Case, model_of, one_thread, options_of

STILL = 1e-38  # a learning rate whose product with anything is lost in float32


def in_process(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """One round; the run is left in `folder`/run."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    options = options_of(case, model, folder) | {"optimizer.lr": STILL, "optimizer.weight_decay": 0}
    words = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "a3po_megatron", "train", "configs/demo-dapo.yaml", "--run-dir", str(run), *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=SIDE_SECONDS, stdout=subprocess.DEVNULL, env=one_thread())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["rollout/tokens"] / row["perf/seconds_rollout"] for row in rows[SKIPPED:]}


def alone(run: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tools.bench_generation", "--child", str(run)]
    ended = subprocess.run(command, cwd=ROOT, timeout=SIDE_SECONDS, env=one_thread(), capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"vLLM alone ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def child(run: Path) -> None:
    """Generates what a run generated, and prints tokens a second of each step."""
    import os

    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from a3po_megatron.config import load_resolved
    from a3po_megatron.data.prompts import Prompts
    from a3po_megatron.data.tokenizer import Tokenizer
    from a3po_megatron.files.run_folder import RunFolder, rollout_files
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.ranks.backend import CPU
    from a3po_megatron.report.read import read_rollouts
    from a3po_megatron.rollout.vllm_engine import engine_arguments

    settings = load_resolved(RunFolder(run).config)
    facts = read_facts(settings.model.path)
    tokenizer = Tokenizer.of(settings.data, Path(settings.model.path), facts.vocab, facts.eos)
    prompts = Prompts(settings.data, tokenizer, settings.trainer.seed, settings.rollout.max_prompt_tokens)
    arguments = engine_arguments(Path(settings.model.path), settings.rollout, torch.float32, CPU, facts.layers)
    arguments |= {"load_format": "auto", "distributed_executor_backend": "uni"}
    llm, speeds = LLM(**arguments), {}
    for step, files in rollout_files(run).items():
        rollouts = [each for path in files for each in read_rollouts(path) if each["step"] == step]
        asked = [{"prompt_token_ids": list(prompts.at(each["prompt_index"]).tokens)} for each in rollouts]
        how = [
            SamplingParams(
                temperature=1.0,
                max_tokens=settings.rollout.max_tokens,
                seed=each["seed"],
                logprobs=0,
                stop_token_ids=list(facts.eos),
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            for each in rollouts
        ]
        llm.reset_prefix_cache()
        begin = time.perf_counter()
        outputs = llm.generate(asked, how, use_tqdm=False)
        seconds = time.perf_counter() - begin
        tokens = [list(output.outputs[0].token_ids) for output in outputs]
        assert tokens == [list(each["tokens"]) for each in rollouts], f"step {step}: other tokens"
        speeds[step] = sum(map(len, tokens)) / seconds
    print(json.dumps({step: speed for step, speed in speeds.items() if step >= SKIPPED}))


def compared(name: str, rounds: int) -> dict[str, Any]:
    case, found = CASES[name], []
    with tempfile.TemporaryDirectory(prefix="bench-generation-") as place:
        folder = Path(place)
        model = model_of(name, folder / "model")
        in_process(case, model, folder)  # the first round's tokens, for vLLM alone to begin with
        for number in range(rounds):
            if number % 2:
                by_alone, by_run = alone(folder / "run"), in_process(case, model, folder)
            else:
                by_run, by_alone = in_process(case, model, folder), alone(folder / "run")
            sides = [statistics.median(each.values()) for each in (by_run, by_alone)]
            found.append(sides)
            print(f"{name}: {sides[0]:.0f} tokens/s in process, {sides[1]:.0f} alone", flush=True)
    ratios = [ours / theirs for ours, theirs in found]
    return {"tokens_per_second": found, "ratios": ratios, "ratio": statistics.median(ratios)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child)
        return
    results = {name: compared(name, options.rounds) for name in options.case or CASES}
    for name, result in results.items():
        print(f"{name}: in process {result['ratio']:.2f} of what vLLM generates alone")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
