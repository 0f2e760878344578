"""The built-in arithmetic task, and the shipped model that was warm-started on it."""

from __future__ import annotations

import importlib.util
import json
import random
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from a3po_megatron.data import arithmetic
from a3po_megatron.errors import RequestError

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = ROOT / "configs" / "models" / "tiny-arithmetic"
GUESSER = ROOT / "configs" / "models" / "tiny-guesser"


def value_of(text: str) -> int:
    """An independent oracle: Python's own arithmetic, forced from left to right."""
    value = 0
    for operator, digit in re.findall(r"([-+*]?)(\d)", text):
        value = eval(f"({value}){operator or '+'}{digit}") % 10
    return value


def test_the_answer_is_the_left_to_right_value_modulo_ten() -> None:
    for index in range(-200, 2000):
        text, answer = arithmetic.problem(index, seed=3)
        assert re.fullmatch(r"\d([-+*][1-9]){1,5}:", text)
        assert answer == str(value_of(text))


def test_a_problem_is_a_function_of_seed_and_index_alone() -> None:
    forwards = [arithmetic.problem(i, 5) for i in range(100)]
    random.seed(0)
    backwards = [arithmetic.problem(i, 5) for i in reversed(range(100))]
    assert forwards == backwards[::-1]
    assert len({arithmetic.problem(7, seed) for seed in range(50)}) > 40
    # Pinned: a change of the hash changes every run's data, its resumption included.
    assert arithmetic.problem(0, 0) == ("5-4:", "1")
    assert arithmetic.problem(5, 1) == ("4*2*8-2*2-3:", "1")


def test_two_to_six_operands_are_equally_frequent() -> None:
    counts = Counter(len(arithmetic.problem(i, 1)[0]) // 2 for i in range(5000))
    assert set(counts) == {2, 3, 4, 5, 6}
    assert all(900 < count < 1100 for count in counts.values())


def test_solutions_end_in_the_value_of_their_own_last_step_and_checks_tell_the_truth() -> None:
    rng = random.Random(1)
    seen: Counter[str] = Counter()
    for index in range(3000):
        text, answer = arithmetic.problem(index, 2)
        *written, boxed = arithmetic.solution(rng, text).split(",")
        _, operations = arithmetic.parse(text)
        assert len(written) == len(operations)
        value = int(text[0])
        for step, (operator, operand) in zip(written, operations, strict=True):
            parts = re.fullmatch(r"(?:(\d)([-+*])(\d)=)?(\d)(?:\?(?:(y)|n(\d)))?", step)
            assert parts, step
            right = value_of(f"{value}{operator}{operand}")
            if parts[1]:
                assert (int(parts[1]), parts[2], int(parts[3])) == (value, operator, operand)
            claimed = int(parts[4])
            assert not parts[5] or claimed == right
            assert not parts[6] or (claimed != right and int(parts[6]) == right)
            kind = "full" if parts[1] else "terse"
            seen[kind] += 1
            seen[f"{kind} wrong"] += claimed != right
            seen["checked"] += bool(parts[5] or parts[6])
            value = int(parts[6] or parts[4])
        assert boxed == f"\\boxed{{{value}}}"
        seen["solutions"] += 1
        seen["correct"] += str(value) == answer
    assert 0.57 < seen["correct"] / seen["solutions"] < 0.65  # what the warm start has to imitate
    assert 0.25 < seen["terse wrong"] / seen["terse"] < 0.31
    assert 0.13 < seen["full wrong"] / seen["full"] < 0.19
    assert seen["checked"] > 1000


def test_the_same_generator_state_writes_the_same_solution() -> None:
    texts = [arithmetic.problem(i, 0)[0] for i in range(50)]
    first, second, other = random.Random("a"), random.Random("a"), random.Random("b")
    assert [arithmetic.solution(first, t) for t in texts] == [arithmetic.solution(second, t) for t in texts]
    assert [arithmetic.solution(first, t) for t in texts] != [arithmetic.solution(other, t) for t in texts]


@pytest.mark.parametrize(
    ("response", "way"),
    [
        ("\\boxed{3}", "at_once"),
        ("", "at_once"),
        ("3\\boxed{3}", "at_once"),  # no step was finished
        ("\\boxed{3}1,2,", "at_once"),  # what follows the answer did not lead to it
        ("1,\\boxed{3}", "stepwise"),
        ("1*8=8?y,3,\\boxed{3}", "stepwise"),
        ("1,1,1,", "stepwise"),  # cut off before its answer
    ],
)
def test_a_response_is_stepwise_if_a_step_stands_before_its_answer(response: str, way: str) -> None:
    assert arithmetic.way_of(response) == way


@pytest.mark.parametrize("text", ["", "5", "5:x", "5+:", "5+12:", "5/2:", "5+2", ":", "٣+2:"])
def test_a_text_that_is_no_problem_is_refused_by_name(text: str) -> None:
    with pytest.raises(RequestError, match=re.escape(repr(text))):
        arithmetic.solution(random.Random(0), text)


def test_the_task_needs_no_torch() -> None:
    code = "import sys, a3po_megatron.data.arithmetic; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


# ----- the shipped checkpoints


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_tiny_model", ROOT / "tools" / "make_tiny_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("folder", [SHIPPED, GUESSER], ids=lambda folder: folder.name)
def test_a_checkpoint_holds_the_declared_files_and_is_small(recipe: ModuleType, folder: Path) -> None:
    files = {path.name: path.stat().st_size for path in folder.iterdir()}
    assert set(files) == {*recipe.SHIPPED, "README.md"}
    assert sum(files.values()) <= 4 << 20


def test_every_id_of_the_vocabulary_has_a_name_and_the_vocabulary_can_be_split_in_four(recipe: ModuleType) -> None:
    config = json.loads((SHIPPED / "config.json").read_text())
    vocabulary = json.loads((SHIPPED / "tokenizer.json").read_text())["model"]["vocab"]
    assert sorted(vocabulary.values()) == list(range(config["vocab_size"]))
    assert config["vocab_size"] % 4 == 0
    assert vocabulary["<eos>"] == config["eos_token_id"]
    assert vocabulary["\\boxed{"] == recipe.VOCABULARY.index("\\boxed{")


def test_the_shipped_tokenizer_encodes_one_id_per_symbol_and_decodes_exactly(recipe: ModuleType) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(SHIPPED)
    rng = random.Random(0)
    for index in range(200):
        text, _ = arithmetic.problem(index, 9)
        whole = text + arithmetic.solution(rng, text)
        ids = tokens(whole)["input_ids"]
        assert len(ids) == len(whole.replace("\\boxed{", "B"))
        assert tokens.unk_token_id not in ids
        assert tokens.decode(ids) == whole
    assert tokens("5 x\n")["input_ids"][1:] == [tokens.unk_token_id] * 3


def measured(recipe: ModuleType, folder: Path, prompts: int) -> Any:
    import torch
    from transformers import AutoTokenizer, Qwen3ForCausalLM

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return recipe.evaluate(model, AutoTokenizer.from_pretrained(folder), prompts=prompts, samples=1)
    finally:
        torch.set_num_threads(threads)


def test_the_shipped_model_half_knows_the_task_and_never_samples_an_unwritten_id(recipe: ModuleType) -> None:
    found = measured(recipe, SHIPPED, 256)
    assert 0.25 < found.correct_rate < 0.55  # standard error 0.03
    assert 0.35 < found.entropy < 0.6
    assert found.cut_rate == 0.0
    assert found.unwritten < 1e-7
    assert found.stepwise_rate == 1.0


def test_the_guesser_hardly_ever_writes_steps_and_is_right_one_time_in_five(recipe: ModuleType) -> None:
    found = measured(recipe, GUESSER, 1024)
    assert abs(found.stepwise_rate - recipe.SHARE) < 0.025  # of 1,024 responses: standard error 0.006
    assert 0.15 < found.correct_rate < 0.25  # standard error 0.013
    assert found.unwritten < 1e-7
    tokenizers = [(folder / "tokenizer.json").read_bytes() for folder in (SHIPPED, GUESSER)]
    assert tokenizers[0] == tokenizers[1]
