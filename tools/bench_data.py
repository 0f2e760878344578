"""How long and how much memory it takes to load a large data set, twice: docs/evidence/data_bench.json.

    python tools/bench_data.py FOLDER --data math_train.jsonl dapo_math_17k_first5000.jsonl --tokenizer MODEL

Makes FOLDER/rows.jsonl once: `--rows` unique rows whose problems and gold answers are drawn from the files in equal
parts, each problem with a number of its own behind it. Every start is a process of its own with an empty cache before
the first; it ends when the first 128 prompts are there. Prints seconds and the peak of resident memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

EVIDENCE = Path(__file__).resolve().parents[1] / "docs/evidence/data_bench.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", type=Path, nargs="+", required=True)
    parser.add_argument("--tokenizer", type=Path, required=True, help="Folder of a model, with config.json.")
    parser.add_argument("--rows", type=int, default=1_800_000)
    parser.add_argument("--template", default="dapo")
    parser.add_argument("--limit", type=int, default=2048, help="rollout.max_prompt_tokens")
    parser.add_argument("--start", action="store_true", help="One start, in this process.")
    options = parser.parse_args()
    if options.start:
        start(options)
        return
    rows = options.folder / "rows.jsonl"
    if not rows.exists():
        make(rows, options.data, options.rows)
    print(f"{options.rows} rows, {rows.stat().st_size / 1e6:.0f} MB, template {options.template}")
    shutil.rmtree(options.folder / "cache", ignore_errors=True)
    found: dict[str, Any] = {"rows": options.rows, "template": options.template, "cpus": len(os.sched_getaffinity(0))}
    for name in ("first", "second"):
        done = subprocess.run([sys.executable, *sys.argv, "--start"], stdout=subprocess.PIPE, text=True, check=True)
        found[name] = json.loads(done.stdout)
        seconds, imports = found[name]["seconds"], found[name]["of_which_imports_and_tokenizer"]
        print(f"{name:<8}{seconds} s (of which {imports} s imports and tokenizer), {found[name]['peak_gb']} GB")
    print(*found["first"]["said"], sep="\n")
    EVIDENCE.write_text(json.dumps(found, indent=1) + "\n")


def make(path: Path, files: list[Path], count: int) -> None:
    draw = random.Random(0)
    from a3po_megatron.data.read import rows_of

    pools = [[row for _, row in rows_of(file)] for file in files]
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as out:
        for number in range(count):
            row = draw.choice(pools[number % len(pools)])
            out.write(json.dumps({"problem": f"{row['problem']} ({number})", "answer": row["answer"]}) + "\n")


def start(options: argparse.Namespace) -> None:
    begin = time.perf_counter()
    from a3po_megatron.config import DataOptions
    from a3po_megatron.data.prompts import Prompts
    from a3po_megatron.data.tokenizer import Tokenizer
    from a3po_megatron.model.read import read_facts

    data = DataOptions(
        path=str(options.folder / "rows.jsonl"),
        template=options.template,
        drop_long_prompts=True,
        unreadable_golds="drop",
        cache=str(options.folder / "cache"),
    )
    facts = read_facts(str(options.tokenizer))
    tokens = Tokenizer.of(data, options.tokenizer, facts.vocab, facts.eos)
    imported = time.perf_counter() - begin
    prompts = Prompts(data, tokens, 0, options.limit, check_golds=True)
    for index in range(128):
        prompts.at(index)
    seconds, peak = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    found = {"seconds": round(seconds, 1), "of_which_imports_and_tokenizer": round(imported, 1)}
    print(json.dumps(found | {"peak_gb": round(peak, 2), "said": prompts.remarks}))


if __name__ == "__main__":
    main()
