"""A step of training beside TRL's GRPOTrainer: same model, prompts, rollouts, updates and threads, in turns.

    pip install --no-deps --target .trl trl==1.16.0 accelerate==1.15.0 datasets==5.2.0 dill==0.4.1 multiprocess==0.70.19 \\
        xxhash==4.1.0 pandas python-dateutil six pytz tzdata
    python tools/bench_trl.py --trl .trl [--case demo|ten_million] [--rounds 3] [--json FILE]

demo          the README's first example: 32 prompts × 8 rollouts of a few tokens, two updates, DAPO's objective on all
              groups
ten_million   a random model of 11 million parameters, 8 prompts × 4 rollouts of 256 tokens, two updates

Each side trains in one process with one thread. TRL generates with transformers (its vLLM needs a GPU), in packs as
large as they go, without gradient checkpointing. A step's seconds are the median of a round without its first steps;
ours are told apart by phase. The answer is right by our grader on both sides; of the random model, if its text is of even
length.
"""  # noqa: E501

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "configs/models/tiny-guesser"
SIDE_SECONDS = 1500
SKIPPED = 2  # steps of a round that warm up


@dataclass(frozen=True)
class Case:
    prompts: int  # a step
    rollouts: int  # a prompt
    max_tokens: int
    steps: int  # a round
    extract: str  # the grader's; empty: even()
    lr: float = 2e-4
    updates: int = 2
    max_prompt: int = 32


CASES = {
    "demo": Case(32, 8, 64, 14, "boxed"),
    "ten_million": Case(8, 4, 256, 5, ""),
}


def even(response: str, answer: str) -> bool:
    return len(response) % 2 == 0


def model_of(name: str, folder: Path) -> Path:
    """The case's model: the demo's, or one that never ends by itself, with the demo's tokenizer."""
    if name == "demo":
        return TINY
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    sizes = Qwen3Config(
        vocab_size=4096,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=1,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(sizes)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / file, folder)
    print(f"{name}: {sum(p.numel() for p in model.parameters()):,} parameters")
    return folder


def sums(folder: Path) -> Path:
    """A file of 64 sums."""
    path = folder / "sums.jsonl"
    rows = [{"problem": f"{11 + n}+{90 - n}=", "answer": "101"} for n in range(64)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- ours ---------------------------------------------------------------------------------------------------------


def options_of(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """Of a run that trains a case in one process."""
    options = {
        "parallel.data": 1,
        "model.path": str(model),
        "data.path": "builtin:arithmetic",
        "rollout.max_tokens": case.max_tokens,
        "rollout.dynamic_sampling": "false",
        "rollout.max_prompt_tokens": case.max_prompt,
        "trainer.steps": case.steps,
        "trainer.prompts_per_step": case.prompts,
        "trainer.rollouts_per_prompt": case.rollouts,
        "trainer.mini_batches": case.updates,
        "optimizer.lr": case.lr,
        "learner.micro_batch_tokens": 4096,
        "telemetry.tensorboard": "false",
    }
    if not case.extract:
        options |= {"reward.function": f"{Path(__file__).resolve()}:even", "data.grader": "function"}
        options["data.path"] = str(sums(folder))
    return options


def trained(run: Path, options: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a new run, without those of the first steps."""
    shutil.rmtree(run, ignore_errors=True)
    words = [word for name, value in options.items() for word in ("--set", f"{name}={value}")]
    command = [sys.executable, "-m", "a3po_megatron", "train", "configs/demo-dapo.yaml", "--run-dir", str(run), *words]
    subprocess.run(command, cwd=ROOT, check=True, timeout=SIDE_SECONDS, stdout=subprocess.DEVNULL, env=one_thread())
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][SKIPPED:]


def ours(case: Case, model: Path, folder: Path) -> dict[str, Any]:
    """One round: seconds of each step, and of its phases."""
    rows = trained(folder / "ours", options_of(case, model, folder))
    seconds = [row["rollout/tokens"] / row["perf/tokens_per_second"] for row in rows]
    phases = [name for name in rows[0] if name.startswith("perf/seconds_")]
    return {
        "seconds": seconds,
        "tokens": statistics.mean(row["rollout/tokens"] for row in rows),
        "phases": {name.rpartition("_")[2]: statistics.median(row[name] for row in rows) for name in phases},
    }


# --- TRL's --------------------------------------------------------------------------------------------------------


def theirs(case: Case, model: Path, folder: Path, trl: Path) -> dict[str, Any]:
    spec = folder / "trl.json"
    spec.write_text(json.dumps({"case": asdict(case), "model": str(model), "folder": str(folder / "trl")}))
    environment = one_thread() | {"PYTHONPATH": f"{trl.resolve()}:{ROOT}", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(Path(__file__).resolve()), "--child", str(spec)]
    return said_by("TRL", command, folder, environment)


def child(spec: dict[str, Any]) -> None:
    """Trains one round with TRL, and prints what it took."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from a3po_megatron.config import DataOptions
    from a3po_megatron.data.prompts import Prompts
    from a3po_megatron.data.tokenizer import Tokenizer
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.reward.math import grade

    torch.set_num_threads(1)
    case, model = Case(**spec["case"]), Path(spec["model"])
    facts, data = read_facts(model), DataOptions(path="builtin:arithmetic", template="raw")
    if not case.extract:
        data = DataOptions(path=str(sums(Path(spec["folder"]).parent)), template="raw", grader="function")
    prompts = Prompts(data, Tokenizer.of(data, model, facts.vocab, facts.eos), 0, case.max_prompt)
    asked = [prompts.at(number) for number in range(case.prompts * case.steps)]
    tokenizer = AutoTokenizer.from_pretrained(model)
    assert all(tuple(tokenizer(p.text).input_ids) == p.tokens for p in asked), "the prompts are not the same tokens"

    def reward(completions: list[str], answer: list[str], **_: Any) -> list[float]:
        if not case.extract:
            return [float(even(text, "")) for text in completions]
        verdicts = (grade(text, gold, extract=case.extract) for text, gold in zip(completions, answer, strict=True))
        return [float(verdict.outcome == "correct") for verdict in verdicts]

    ends: list[float] = []

    class Ends(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.perf_counter())

    update = case.prompts * case.rollouts // case.updates
    options = GRPOConfig(
        output_dir=spec["folder"],
        use_cpu=True,
        per_device_train_batch_size=update,
        gradient_accumulation_steps=1,
        steps_per_generation=case.updates,
        num_generations=case.rollouts,
        max_completion_length=case.max_tokens,
        max_steps=case.steps * case.updates,
        learning_rate=case.lr,
        lr_scheduler_type="constant",
        warmup_steps=0,
        optim="adamw_torch",
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        beta=0.0,
        epsilon=0.2,
        epsilon_high=0.28,
        loss_type="dapo",
        temperature=1.0,
        shuffle_dataset=False,
        bf16=False,
        dataloader_pin_memory=False,
        logging_strategy="steps",
        logging_steps=case.updates,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32),
        reward_funcs=reward,
        args=options,
        train_dataset=Dataset.from_dict({"prompt": [p.text for p in asked], "answer": [str(p.answer) for p in asked]}),
        processing_class=tokenizer,
        callbacks=[Ends()],
    )
    trainer.train()
    ends = ends[case.updates - 1 :: case.updates]  # of whole steps
    logs = [log for log in trainer.state.log_history if "completions/mean_length" in log][SKIPPED:]
    lengths = statistics.mean(log["completions/mean_length"] for log in logs)
    seconds = [end - begin for begin, end in zip(ends[SKIPPED - 1 :], ends[SKIPPED:], strict=False)]
    print(json.dumps({"seconds": seconds, "tokens": lengths * case.prompts * case.rollouts}))


# --- both ---------------------------------------------------------------------------------------------------------


def said_by(name: str, command: list[str], folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Returns the object in a process's last line."""
    ended = subprocess.run(command, cwd=folder, timeout=SIDE_SECONDS, env=environment, capture_output=True, text=True)
    if ended.returncode:
        raise SystemExit(f"{name} ended with {ended.returncode}:\n{ended.stderr[-3000:]}")
    return json.loads(ended.stdout.splitlines()[-1])


def one_thread() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def compared(name: str, rounds: int, trl: Path) -> dict[str, Any]:
    case = CASES[name]
    found: dict[str, list[dict[str, Any]]] = {"ours": [], "trl": []}
    with tempfile.TemporaryDirectory(prefix="bench-trl-") as place:
        folder = Path(place)
        model = model_of(name, folder / "model")
        for number in range(rounds):
            sides = ["ours", "trl"] if number % 2 == 0 else ["trl", "ours"]
            for side in sides:
                round_ = ours(case, model, folder) if side == "ours" else theirs(case, model, folder, trl)
                found[side].append(round_)
                print(f"{name}, {side}: {statistics.median(round_['seconds']):.2f} s a step", flush=True)
    medians = {side: [statistics.median(each["seconds"]) for each in of] for side, of in found.items()}
    tokens = {side: statistics.mean(each["tokens"] for each in of) for side, of in found.items()}
    pairs = [a / b for a, b in zip(medians["ours"], medians["trl"], strict=True)]
    return {
        "case": asdict(case),
        "seconds": medians,
        "tokens_a_step": tokens,
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "phases": {
            phase: statistics.median(each["phases"][phase] for each in found["ours"])
            for phase in found["ours"][0]["phases"]
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, help="folder that TRL is installed in")
    parser.add_argument("--case", choices=[*CASES], action="append")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(json.loads(options.child.read_text()))
        return
    if options.trl is None or not (options.trl / "trl").is_dir():
        parser.error("--trl: a folder that TRL is installed in; the top of this file says how")
    results = {name: compared(name, options.rounds, options.trl) for name in options.case or CASES}
    for name, result in results.items():
        print(f"{name}: a step of ours takes {result['ratio']:.2f} of one of TRL's")
        for phase, seconds in sorted(result["phases"].items(), key=lambda each: -each[1]):
            print(f"  {phase:<12}{seconds:8.3f} s")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
