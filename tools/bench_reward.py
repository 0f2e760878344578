"""How many answers a second are graded, by kind, beside math-verify alone; how long a sandbox takes to start:
docs/evidence/reward_bench.json.

    python tools/bench_reward.py [--answers 300] [--kinds integer,fraction]

Each kind has as many answers as asked for, all different, half of them right. The pool has 1 and then 2 workers; its
start is not counted. math-verify parses gold and response and verifies them, in this process and without a time limit:
as fast as it can be. Right: how many of the verdicts are as they should be.

Of sandboxes: milliseconds from a program that does nothing to how it ended, beside those of the same interpreter
without any, and from a response to the verdict of tests that call it once (medians).
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from a3po_megatron.reward import code  # noqa: E402
from a3po_megatron.reward.math import grade  # noqa: E402
from a3po_megatron.reward.pool import GraderPool  # noqa: E402
from a3po_megatron.reward.sandbox.choose import AUTO, sandbox_of, why_not  # noqa: E402
from a3po_megatron.reward.sandbox.program import Chosen, Program  # noqa: E402

EVIDENCE = ROOT / "docs/evidence/reward_bench.json"
TIMEOUT, MEMORY = 30.0, 2 << 30
Pair = tuple[str, str]  # one way to write an answer, another
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")


def integer(n: int) -> Pair:
    return f"{n:,}", str(n)


def decimal(n: int) -> Pair:
    return f"{n}.250", f"{n}.25"


def fraction(n: int) -> Pair:
    return rf"\dfrac{{{2 * n}}}{{14}}", rf"\frac{{{n}}}{{7}}"


def radical(n: int) -> Pair:
    return rf"\sqrt{{{4 * (n + 2)}}}", rf"2\sqrt{{{n + 2}}}"


def polynomial(n: int) -> Pair:
    return f"(x+{n})(x-2)", f"x^2+{n - 2}x-{2 * n}"


def listing(n: int) -> Pair:
    return rf"{n + 2}, {n} \text{{ and }} {n + 1}", f"{n},{n + 1},{n + 2}"


def interval(n: int) -> Pair:
    return rf"{n} < x \le {n + 9}", f"({n}, {n + 9}]"


def matrix(n: int) -> Pair:
    rows = rf"{n}&2\\3&-{n}"
    return rf"\begin{{bmatrix}}{rows}\end{{bmatrix}}", rf"\begin{{pmatrix}}{rows}\end{{pmatrix}}"


def words(n: int) -> Pair:
    return rf"\text{{{DAYS[n % 7]} {n}}}".lower(), rf"\text{{{DAYS[n % 7]} {n}}}"


KINDS: dict[str, Callable[[int], Pair]] = {
    **{"integer": integer, "decimal": decimal, "fraction": fraction, "radical": radical, "polynomial": polynomial},
    **{"list": listing, "interval": interval, "matrix": matrix, "words": words, "sentence": integer},
}
BOXED, SENTENCE = "Let us see.\n\nSo the answer is $\\boxed{{{}}}$.", "We add both, so that she pays {} dollars in all."


def items(kind: str, count: int) -> list[tuple[str, str, bool]]:
    """(response, gold answer, whether it is right): the wrong half has the answer of another number."""
    numbers = random.Random(kind).sample(range(100, 100 + 20 * count), count)
    made = []
    for place, n in enumerate(numbers):
        right = place % 2 == 0
        answer, gold = KINDS[kind](n + (0 if right else 1))[0], KINDS[kind](n)[1]
        made.append(((SENTENCE if kind == "sentence" else BOXED).format(answer), gold, right))
    return made


def of_the_pool(made: list[tuple[str, str, bool]], workers: int) -> tuple[float, float]:
    """(answers a second, share of right verdicts)."""
    with GraderPool(grade, workers, TIMEOUT, MEMORY) as pool:
        pool.grade_all([("\\boxed{x+1}", "1+x+0")] * 8 * workers)
        begin = time.perf_counter()
        verdicts = pool.grade_all([(response, gold) for response, gold, _ in made])
        seconds = time.perf_counter() - begin
    agree = sum((v.outcome == "correct") == right for v, (_, _, right) in zip(verdicts, made, strict=True))
    return len(made) / seconds, agree / len(made)


def of_math_verify(made: list[tuple[str, str, bool]]) -> tuple[float, float]:
    import math_verify

    def right(response: str, gold: str) -> bool:
        wanted = math_verify.parse(f"${gold}$", parsing_timeout=None)
        found = math_verify.parse(response, parsing_timeout=None)
        return bool(math_verify.verify(wanted, found, timeout_seconds=None))

    right("\\boxed{x+1}", "1+x+0")
    begin = time.perf_counter()
    agree = sum(right(response, gold) == expected for response, gold, expected in made)
    return len(made) / (time.perf_counter() - begin), agree / len(made)


def milliseconds(call: Callable[[], object], times: int) -> float:
    """The median of so many calls, after one that does not count."""
    call()
    seconds = []
    for _ in range(times):
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return round(1000 * statistics.median(seconds), 1)


def of_sandboxes(times: int) -> dict[str, dict[str, float]]:
    """{name: {start_ms, verdict_ms}} of those that hold here; `python` is the interpreter without any."""
    bare = [os.path.realpath(sys.executable), "-I", "-S", "-c", "pass"]
    table = {"python": {"start_ms": milliseconds(lambda: subprocess.run(bare, check=True), times)}}
    gold = json.dumps({"kind": "asserts", "tests": ["assert double(2) == 4"]})
    for name in AUTO:
        if not why_not(name):
            chosen = Chosen(name)
            start = functools.partial(sandbox_of(chosen).run, Program("pass"))
            verdict = functools.partial(
                code.grade, "```python\ndef double(x):\n    return 2 * x\n```", gold, sandbox=chosen
            )
            table[name] = {"start_ms": milliseconds(start, times), "verdict_ms": milliseconds(verdict, times)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--answers", type=int, default=300, help="of each kind")
    parser.add_argument("--starts", type=int, default=50, help="of each sandbox")
    parser.add_argument("--kinds", default=",".join(KINDS), help="comma-separated; empty: sandboxes alone")
    options = parser.parse_args()
    kinds = [kind for kind in options.kinds.split(",") if kind]
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"--kinds: {', '.join(sorted(unknown))}: not one of {', '.join(KINDS)}")
    table = json.loads(EVIDENCE.read_text())["kinds"] if EVIDENCE.exists() else {}  # of kinds that are not asked for
    print("answers a second (share of right verdicts)")
    print(f"{'':12}{'math-verify':>16}{'1 worker':>16}{'2 workers':>16}{'1 worker ÷ math-verify':>26}")
    for kind in kinds:
        made = items(kind, options.answers)
        theirs, one, two = of_math_verify(made), of_the_pool(made, 1), of_the_pool(made, 2)
        cells = "".join(f"{rate:8.0f} ({right:.2f})".rjust(16) for rate, right in (theirs, one, two))
        print(f"{kind:12}{cells}{one[0] / theirs[0]:26.1f}", flush=True)
        table[kind] = {
            name: {"per_second": round(rate, 1), "right": round(right, 3)}
            for name, (rate, right) in {"math_verify": theirs, "one_worker": one, "two_workers": two}.items()
        }
    sandboxes = of_sandboxes(options.starts)
    print("\nmilliseconds: the start and end of an empty program; a verdict of tests")
    for name, row in sandboxes.items():
        print(f"{name:12}{row['start_ms']:10.1f}{row.get('verdict_ms', float('nan')):10.1f}")
    machine = {"python": platform.python_version(), "cpus": len(os.sched_getaffinity(0))}
    EVIDENCE.write_text(
        json.dumps({"answers": options.answers, **machine, "kinds": table, "sandboxes": sandboxes}, indent=1) + "\n"
    )


if __name__ == "__main__":
    main()
