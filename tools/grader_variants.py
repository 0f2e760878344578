"""How the grader takes gold answers in other spellings, and gold answers that were changed: docs/evidence/grader.json.

    python tools/grader_variants.py FILE.jsonl… [--seed 0] [--mutated 5000]

A variant means the same (Unicode, calculator syntax, decimals, separators, typesetting, tags) and should be accepted;
a mutated one has one digit or sign changed and should not be, but for true equalities: each accepted one is listed.
"""

from __future__ import annotations

import argparse
import collections
import json
import random
import re
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from a3po_megatron.data.read import rows_of  # noqa: E402
from a3po_megatron.reward.math import gold_text, grade, prepare  # noqa: E402

EVIDENCE = ROOT / "docs/evidence/grader.json"
SIGNS = {r"\pi": "π", r"\cdot": "·", r"\times": "×", r"\infty": "∞", r"\le": "≤", r"\ge": "≥", r"\cup": "∪", "-": "−"}
SIGNS |= {r"\theta": "θ", r"\alpha": "α", r"^\circ": "°", r"\pm": "±", r"\ne": "≠", r"\in": "∈"}
UP = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")
FULL = str.maketrans("0123456789", "０１２３４５６７８９")
VULGAR = {(1, 2): "½", (1, 3): "⅓", (2, 3): "⅔", (1, 4): "¼", (3, 4): "¾", (1, 5): "⅕", (1, 8): "⅛"}
NUMBER = re.compile(r"-?\d+")
FRACTION = re.compile(r"\\frac\{(-?\d+)\}\{(\d+)\}")
MIXED = re.compile(r"\d ?\\frac|\\frac ?[^{ ]")  # 2((1)/(4)) is no mixed number
SIMPLE = re.compile(r"(?:[\d+\-=(),. ]|[a-z](?![a-z])|\\(?:frac|sqrt|pi|cdot)(?![a-z])|[{}^])*")


def in_unicode(gold: str) -> str:
    text = FRACTION.sub(
        lambda f: VULGAR.get((int(f[1]), int(f[2])), f[0]) if not f.string[: f.start()][-1:].isdigit() else f[0], gold
    )
    text = re.sub(r"\\sqrt\{(\d+)\}", r"√\1", text)
    text = re.sub(r"\^(?:\{(\d+)\}|(\d))", lambda f: (f[1] or f[2]).translate(UP), text)
    for command, sign in SIGNS.items():
        text = re.sub(re.escape(command) + r"(?![A-Za-z])" if command != "-" else "-", sign, text)
    return text


def in_calculator_syntax(gold: str) -> str | None:
    if not SIMPLE.fullmatch(gold) or ("\\" not in gold and "^" not in gold) or MIXED.search(gold):
        return None
    before, text = "", gold
    while text != before:
        before = text
        text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", text)
        text = re.sub(r"\\sqrt\{([^{}]*)\}", r"sqrt(\1)", text)
        text = re.sub(r"\^\{([^{}]*)\}", r"^(\1)", text)
    text = re.sub(r"\\pi ?(?=[A-Za-z(])", "pi*", text.replace(r"\cdot", "*"))
    text = re.sub(r"(?<=[a-z\d)]) ?(?=sqrt)", "*", re.sub(r"\\pi ?", "pi", text))
    return text if "{" not in text else None


def in_decimals(gold: str) -> str | None:
    found = FRACTION.fullmatch(gold.removeprefix("-"))
    if found is None:
        return None
    value = Fraction(int(found[1]), int(found[2]))
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    text = f"{abs(value.numerator) / value.denominator:.12f}".rstrip("0").rstrip(".")
    sign = "-" if gold.startswith("-") != (value < 0) else ""
    return f"{sign}{text}" if rest == 1 and value.denominator < 10**6 else None


def with_separators(gold: str) -> str | None:
    if not NUMBER.fullmatch(gold) or abs(int(gold)) < 1000:
        return None
    return f"{int(gold):,}"


VARIANTS: dict[str, Callable[[str], str | None]] = {
    "unicode": in_unicode,
    "calculator": in_calculator_syntax,
    "decimals": in_decimals,
    "thousands, comma": with_separators,
    "thousands, LaTeX comma": lambda gold: (text := with_separators(gold)) and text.replace(",", "{,}"),
    "thousands, thin space": lambda gold: (text := with_separators(gold)) and text.replace(",", "\\,"),
    "full-width digits": lambda gold: gold.translate(FULL) if NUMBER.fullmatch(gold) else None,
    "typesetting": lambda gold: rf"\displaystyle {re.sub(r'(?<![A-Za-z])frac', 'dfrac', gold)}\,",
    "bold": lambda gold: rf"\boldsymbol{{{gold}}}",
    "named": lambda gold: f"N = {gold}" if NUMBER.fullmatch(gold) or FRACTION.fullmatch(gold) else None,
    "float": lambda gold: f"{gold}.0" if NUMBER.fullmatch(gold) else None,
}
PLACES = {
    "box": r"So it is $\boxed{{{}}}$.",
    "tag": "<think>2 + 2 = 5?</think><answer>{}</answer>",
    "line": "First 7, then:\n\n**Answer:** ${}$\n\nThis took 3 steps.",
    "below": "**Final Answer:**\n\n$${}$$",
}


def mutated(gold: str, draw: random.Random) -> str | None:
    """With one digit changed, or its sign."""
    places = [found.start() for found in re.finditer(r"\d", gold)]
    if not places or draw.random() < 0.2:
        return (
            gold[1:]
            if gold.startswith("-")
            else f"-{gold}"
            if NUMBER.match(gold) or gold.startswith("\\frac")
            else None
        )
    place = draw.choice(places)
    return gold[:place] + draw.choice([d for d in "0123456789" if d != gold[place]]) + gold[place + 1 :]


def golds(files: list[Path]) -> Iterator[str]:
    for file in files:
        for _, row in rows_of(file):
            yield gold_text(str(row["answer"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--mutated", type=int, default=5000)
    parser.add_argument("--each", type=int, default=400, help="golds for each kind of variant")
    options = parser.parse_args()
    prepare()
    draw = random.Random(options.seed)
    answers = sorted(set(golds(options.files)))
    draw.shuffle(answers)
    accepted: dict[str, list[int]] = collections.defaultdict(lambda: [0, 0])
    refused: dict[str, list[str]] = collections.defaultdict(list)
    for kind, vary in VARIANTS.items():
        made = [(gold, text) for gold in answers if (text := vary(gold)) and text != gold][: options.each]
        for number, (gold, text) in enumerate(made):
            place = list(PLACES)[number % len(PLACES)]
            right = grade(PLACES[place].format(text), gold).outcome == "correct"
            accepted[kind][0] += right
            accepted[kind][1] += 1
            if not right:
                refused[kind].append(f"{gold} | {text} | {place}")
    wrong, tried = [], 0
    while tried < options.mutated:
        gold = answers[tried % len(answers)]
        text = mutated(gold, draw)
        tried += 1
        if text is not None and text != gold and grade(rf"\boxed{{{text}}}", gold).outcome == "correct":
            wrong.append(f"{gold} | {text}")
    good, all_ = (sum(pair[i] for pair in accepted.values()) for i in (0, 1))
    for kind, (right, count) in accepted.items():
        print(f"{kind:24} {right:5} of {count:5}  {'; '.join(refused[kind][:3])}")
    print(f"{'all variants':24} {good:5} of {all_:5}: {good / all_:.4f}")
    print(f"mutated accepted: {len(wrong)} of {tried}", *wrong, sep="\n  ")
    evidence = {"seed": options.seed, "golds": len(answers), "variants": accepted, "refused": refused}
    evidence |= {"mutated": tried, "mutated accepted": wrong}
    EVIDENCE.write_text(json.dumps(evidence, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
