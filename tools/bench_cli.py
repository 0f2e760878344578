"""How long the commands take that a person waits for, each in a fresh process.

    python tools/bench_cli.py                     a3po --help, submit --dry-run of configs/arithmetic.yaml, and plan for
                                                  235 billion parameters on 1,024 ranks, also where
                                                  nothing fits
    python tools/bench_cli.py --times 20 --json out.json

Prints the median and the fastest of each, and the median as a ratio to that of an interpreter that does nothing: what a
machine adds to both cancels. Also what of torch, transformers, vLLM and Megatron was imported, which is to be nothing.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
NOTHING = [sys.executable, "-c", ""]
# Nothing fits, and every change is tried in vain.
UNFIT = ["plan", str(ROOT / "configs/scale/settings.yaml"), "--set", "model.path=configs/models/Qwen3-235B-A22B"]
UNFIT += ["--gpus", "1024", "--gpu", "24G"]
COMMANDS = {
    "--help": ["--help"],
    "submit --dry-run": ["submit", str(ROOT / "configs/arithmetic.yaml"), "--dry-run"],
    "plan": ["plan", str(ROOT / "configs/scale/qwen3-235b-a22b-32x8.yaml"), "--gpus", "1024"],
    "plan, no fit": [*UNFIT, "--set", "parallel.layout=auto"],
    "plan, no layout": UNFIT,
    "plan --json": ["plan", str(ROOT / "configs/scale/qwen3-235b-a22b-32x8.yaml"), "--gpus", "1024", "--json"],
}
HEAVY = ("torch", "transformers", "vllm", "megatron")
IMPORTED = """
import contextlib, io, sys
from a3po_megatron.cli import main
with contextlib.redirect_stdout(io.TextIOWrapper(io.BytesIO())), contextlib.suppress(SystemExit):
    main()
print(*[name for name in {heavy} if name in sys.modules])
"""


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    assert done.returncode in (0, 2), f"{command} ended with {done.returncode}"
    return time.perf_counter() - begin


def imported(words: list[str]) -> list[str]:
    """Which heavy packages a command had imported when it was done."""
    code = IMPORTED.format(heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert not done.stderr.startswith("Traceback"), done.stderr
    return done.stdout.split()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    every = {"(nothing)": NOTHING} | {
        name: [sys.executable, "-m", "a3po_megatron", *words] for name, words in COMMANDS.items()
    }
    taken: dict[str, list[float]] = {name: [] for name in every}
    for number in range(options.times + 1):  # in turn: a machine that slows down slows all of them
        for name, command in every.items():
            if (spent := seconds(command)) and number:  # the first fills the file system's cache
                taken[name].append(spent)
    rows = {}
    for name, values in taken.items():
        ratio = median(values) / median(taken["(nothing)"])
        rows[name] = {"median": median(values), "fastest": min(values), "ratio": ratio}
        if name in COMMANDS:
            rows[name]["imported"] = imported(COMMANDS[name])
        loaded = f"  imports {', '.join(rows[name].get('imported', [])) or 'none of them'}" if name in COMMANDS else ""
        print(f"{name:<18}{median(values):.3f} s  fastest {min(values):.3f} s  {ratio:.1f} times nothing{loaded}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
