"""Generation in the learner's process beside vLLM alone: the same prompts, seeds, weights and threads, in turns.

    python -m tools.bench_generation [--case demo|ten_million] [--rounds 3] [--json FILE]

step          `a3po train` with a learning rate that moves no weight: tokens of a step by its seconds of rollout, which
              deals out prompts, grades, and writes the journal besides
beside        the run's engine, beside its learner, asked for the same rollouts at once
alone         vllm.LLM.generate in a process of its own, with the engine arguments, prompts and seeds of the run: its
              tokens must be the same

demo          32 prompts × 8 rollouts of a few tokens; ten_million: 8 prompts × 4 rollouts of 256 (tools/bench_trl.py)
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tools.bench_trl import CASES, ROOT, SKIPPED, Case, model_of, one_thread, options_of, said_by, trained

STILL = 1e-38  # a learning rate whose product with anything is lost in float32


def in_steps(case: Case, model: Path, folder: Path) -> list[float]:
    """Tokens a second of each step's rollout; the run is left in `folder`/run."""
    options = options_of(case, model, folder) | {"optimizer.lr": STILL, "optimizer.weight_decay": 0}
    rows = trained(folder / "run", options)
    return [row["rollout/tokens"] / row["perf/seconds_rollout"] for row in rows]


def generated(run: Path, side: str) -> dict[str, Any]:
    """Tokens a second of each step, generated again in a process of its own."""
    command = [sys.executable, "-m", "tools.bench_generation", f"--{side}", str(run)]
    return said_by(side, command, ROOT, one_thread())


def timed(run: Path, generate: Callable[[list[Any]], list[list[int]]], ask: Callable[[Any, int], Any]) -> None:
    """Prints tokens a second of each step; `ask`: a request of a prompt's tokens and a seed."""
    from a3po_megatron.config import load_resolved
    from a3po_megatron.data.prompts import Prompts
    from a3po_megatron.data.tokenizer import Tokenizer
    from a3po_megatron.files.run_folder import RunFolder, rollout_files
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.report.read import read_rollouts

    settings = load_resolved(RunFolder(run).config)
    facts, speeds = read_facts(settings.model.path), {}
    tokenizer = Tokenizer.of(settings.data, Path(settings.model.path), facts.vocab, facts.eos)
    prompts = Prompts(settings.data, tokenizer, settings.trainer.seed, settings.rollout.max_prompt_tokens)
    for step, files in rollout_files(run).items():
        rollouts = [each for path in files for each in read_rollouts(path) if each["step"] == step]
        asked = [ask(prompts.at(each["prompt_index"]).tokens, each["seed"]) for each in rollouts]
        begin = time.perf_counter()
        tokens = generate(asked)
        seconds = time.perf_counter() - begin
        assert tokens == [list(each["tokens"]) for each in rollouts], f"step {step}: other tokens"
        speeds[step] = sum(map(len, tokens)) / seconds
    print(json.dumps({step: speed for step, speed in speeds.items() if step >= SKIPPED}))


def beside_learner(run: Path) -> None:
    import yaml

    from a3po_megatron.files.run_folder import RunFolder
    from a3po_megatron.launch.local import free_port
    from a3po_megatron.launch.shell import LOOPBACK
    from a3po_megatron.rank import start

    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(LOOPBACK | place | {"MASTER_PORT": str(free_port())})
    path = RunFolder(run).config
    settings = yaml.safe_load(path.read_text())
    settings["trainer"]["steps"] += 1  # a run that has done its steps is not taken up
    path.write_text(yaml.safe_dump(settings))

    def loop(parts: Any) -> None:
        from a3po_megatron.rollout.engine import Request, in_order

        with parts.residency.publishing():
            parts.publish()

        def generate(asked: list[Any]) -> list[list[int]]:
            parts.engine.forget()
            return [completion.tokens.tolist() for completion in in_order(parts.engine.sample(asked))]

        timed(run, generate, lambda tokens, seed: Request(tokens, seed))

    start(run, loop)


def alone(run: Path) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import torch
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from a3po_megatron.config import load_resolved
    from a3po_megatron.files.run_folder import RunFolder
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.ranks.backend import CPU
    from a3po_megatron.rollout.vllm_engine import engine_arguments

    settings = load_resolved(RunFolder(run).config)
    facts = read_facts(settings.model.path)
    arguments = engine_arguments(Path(settings.model.path), settings.rollout, torch.float32, CPU, facts.layers)
    llm = LLM(**arguments | {"load_format": "auto", "distributed_executor_backend": "uni"})

    def ask(tokens: Any, seed: int) -> Any:
        return {"prompt_token_ids": list(tokens)}, SamplingParams(
            temperature=1.0,
            max_tokens=settings.rollout.max_tokens,
            seed=seed,
            logprobs=0,
            stop_token_ids=list(facts.eos),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )

    def generate(asked: list[Any]) -> list[list[int]]:
        llm.reset_prefix_cache()
        prompts, how = zip(*asked, strict=True)
        outputs = llm.generate(list(prompts), list(how), use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    timed(run, generate, ask)


SIDES: dict[str, Callable[[Path], None]] = {"beside-learner": beside_learner, "alone": alone}


def compared(name: str, rounds: int) -> dict[str, Any]:
    case, found = CASES[name], []
    with tempfile.TemporaryDirectory(prefix="bench-generation-") as place:
        folder = Path(place)
        steps = in_steps(case, model_of(name, folder / "model"), folder)
        for number in range(rounds):
            order = list(SIDES) if number % 2 == 0 else list(reversed(SIDES))
            by_side = {side: statistics.median(generated(folder / "run", side).values()) for side in order}
            found.append(by_side)
            print(name, {side: round(speed) for side, speed in by_side.items()}, "tokens/s", flush=True)
    ratios = [each["beside-learner"] / each["alone"] for each in found]
    whole = statistics.median(steps) / statistics.median(each["alone"] for each in found)
    return {"tokens_per_second": found, "ratios": ratios, "ratio": statistics.median(ratios), "step_ratio": whole}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=[*CASES], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    for side in SIDES:
        parser.add_argument(f"--{side}", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    for side, begin in SIDES.items():
        if run := getattr(options, side.replace("-", "_")):
            begin(run)
            return
    results = {name: compared(name, options.rounds) for name in options.case or CASES}
    for name, result in results.items():
        print(
            f"{name}: beside the learner {result['ratio']:.2f} of what vLLM generates alone, a step's rollout "
            f"{result['step_ratio']:.2f}"
        )
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
