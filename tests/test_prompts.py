"""Prompts: bad data is named by file and line, and the order depends on nothing but seed and position."""

from __future__ import annotations

import bz2
import itertools
import json
import lzma
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from a3po_megatron.batch import Prompt
from a3po_megatron.config import ARITHMETIC, DataOptions
from a3po_megatron.data.load import load
from a3po_megatron.data.order import named_order, rollout_seed
from a3po_megatron.data.prompts import Prompts
from a3po_megatron.data.tokenizer import Tokenizer
from a3po_megatron.errors import RequestError
from a3po_megatron.files.cache import Cache
from tests.harness.taking import take
from tests.harness.tiny_models import VOCAB, save_tokenizer

GOOD = '{"problem": "1+1", "answer": "2"}'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One token a character, and a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(folder, VOCAB)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings["chat_template"] = (
        "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}answer: {% endif %}"
    )
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def tokens(tokenizer: Path) -> Tokenizer:
    return Tokenizer(tokenizer, VOCAB, (1,), "raw")


def rows(folder: Path, count: int) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n}+{n}", "answer": 2 * n}) + "\n" for n in range(count)))
    return path


def prompts(path: Path | str, tokens: Tokenizer, seed: int = 0, limit: int = 64, **options: Any) -> Prompts:
    return Prompts(DataOptions(path=str(path), **options), tokens, seed, limit)


def read_rows(options: DataOptions) -> list[tuple[str, Any, Any, int]]:
    """(id, problem, gold, place) of every row."""
    loaded = load(options, Cache())
    return [(loaded.id(row), row.problem, row.gold, row.place) for row in loaded.rows]


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        read_rows(DataOptions(path=str(path), **options))
    return str(caught.value)


# --- reading -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ('{"problem": "1+2", "answer": "3"', "not valid JSON"),
        ("1+2 = 3", "not valid JSON"),
        ('["1+2", "3"]', "expected an object"),
        ('"1+2"', "expected an object"),
        ('{"answer": "3"}', "'problem' is missing"),
        ('{"problem": "1+2"}', "'answer' is missing"),
        ('{"problem": "", "answer": "3"}', "'problem' is empty"),
        ('{"problem": " \\n ", "answer": "3"}', "'problem' is empty"),
        ('{"problem": "1+2", "answer": ""}', "'answer' is empty"),
        ('{"problem": "1+2", "answer": null}', "'answer' is empty or no text"),
        ('{"problem": "1+2", "answer": []}', "'answer' is empty or no text"),
        ('{"problem": "1+2", "answer": ["3", null]}', "'answer' is empty or no text"),
        ('{"problem": "1+2", "answer": true}', "'answer' is empty or no text"),
        ('{"problem": "1+1", "answer": "7"}', "the problem stands in line 2 with another gold answer, here '7': '1+1'"),
        ('{"problem": "1+2", "answer": "3", "id": "a"}', "the id stands in line 4 already: 'a'"),
    ],
)
def test_a_bad_row_is_named_with_file_and_line(tmp_path: Path, bad: str, says: str) -> None:
    path = tmp_path / "rows.jsonl"
    # A blank line is no row, but it counts as a line.
    path.write_text("\n".join(["", GOOD, "", '{"id": "a", "problem": "0+1", "answer": 1}', bad, "{"]))
    message = refusal(path)
    assert message.startswith(f"{path}:5: ")
    assert says in message


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_a_file_without_prompts_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    assert refusal(tmp_path / "rows.jsonl") == f"{tmp_path / 'rows.jsonl'}: the file holds no prompts"


def test_a_file_that_is_not_utf8_or_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "latin.jsonl"
    path.write_bytes(GOOD.encode() + '\n{"problem": "café", "answer": "2"}\n'.encode("latin-1"))
    assert str(path) in refusal(path)
    assert str(tmp_path) in refusal(tmp_path)


def test_rows_keep_their_text_their_ids_and_numbers_as_answers(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    given = [
        {"problem": "a\u2028b\r\nc {x} \\frac{1}{2}", "answer": 7, "id": "first"},
        {"problem": "z", "answer": -0.5, "level": 3},
    ]
    path.write_bytes("\r\n".join(json.dumps(row, ensure_ascii=False) for row in given).encode())
    assert read_rows(DataOptions(path=str(path))) == [
        ("first", given[0]["problem"], "7", 1),
        ("rows.jsonl/2", "z", "-0.5", 2),
    ]


def test_the_fields_can_have_other_names(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"question": "q", "gold": "g", "key": "k", "problem": "no"}\n')
    found = read_rows(DataOptions(path=str(path), problem_field="question", answer_field="gold", id_field="key"))
    assert found == [("k", "q", "g", 1)]
    assert "'gold' is missing" in refusal(rows(tmp_path, 1), answer_field="gold")


def test_a_too_long_prompt_is_named_with_line_and_lengths_or_dropped_on_request(
    tmp_path: Path, tokens: Tokenizer
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, '{"problem": "11111", "answer": "x"}', '{"problem": "1111", "answer": "x"}']))
    with pytest.raises(RequestError) as caught:
        prompts(path, tokens, limit=4)
    message = str(caught.value)
    assert message.startswith(f"{path}:2: ")
    for named in ("5 tokens", "rollout.max_prompt_tokens is 4", "data.drop_long_prompts"):
        assert named in message
    kept = prompts(path, tokens, limit=4, drop_long_prompts=True)
    assert {prompt.text for prompt in take(kept, 6)} == {"1+1", "1111"}
    assert all(len(prompt.tokens) <= 4 for prompt in take(kept, 6))
    assert len(take(prompts(path, tokens, limit=5), 3)) == 3
    with pytest.raises(RequestError, match="no prompt is left"):
        prompts(path, tokens, limit=2, drop_long_prompts=True)


# --- order -------------------------------------------------------------------------------------------------------


def test_each_epoch_is_another_permutation_and_its_ids_are_its_own(tmp_path: Path, tokens: Tokenizer) -> None:
    source = prompts(rows(tmp_path, 20), tokens)
    epochs = [take(source, 20) for _ in range(3)]
    texts = [[prompt.text for prompt in epoch] for epoch in epochs]
    assert [sorted(epoch) for epoch in texts] == [sorted(f"{n}+{n}" for n in range(20))] * 3
    assert texts[0] != texts[1] != texts[2] != texts[0]
    everything = list(itertools.chain(*epochs))
    assert len({prompt.id for prompt in everything}) == 60, "the same problem in a later epoch is another draw"
    assert [prompt.index for prompt in everything] == list(range(60))


def test_the_order_depends_on_the_seed_and_not_on_history(tmp_path: Path, tokens: Tokenizer) -> None:
    path = rows(tmp_path, 7)
    straight = take(prompts(path, tokens), 40)
    pieces = prompts(path, tokens)
    assert [p for count in (1, 0, 13, 6, 20) for p in take(pieces, count)] == straight
    backwards = prompts(path, tokens)
    assert [backwards.at(index) for index in reversed(range(40))] == straight[::-1]
    assert take(prompts(path, tokens, seed=1), 40) != straight


@pytest.mark.parametrize("builtin", [False, True])
def test_a_restored_position_gives_the_same_sequel(tmp_path: Path, tokens: Tokenizer, builtin: bool) -> None:
    path = ARITHMETIC if builtin else rows(tmp_path, 7)
    source = prompts(path, tokens, seed=3)
    take(source, 9)
    state = json.loads(json.dumps(source.state()))
    sequel = take(source, 25)
    again = prompts(path, tokens, seed=3)
    take(again, 2)
    again.restore(state)
    assert take(again, 25) == sequel


def test_without_shuffling_the_order_is_the_files(tmp_path: Path, tokens: Tokenizer) -> None:
    source = prompts(rows(tmp_path, 5), tokens, shuffle=False)
    assert [prompt.text for prompt in take(source, 10)] == [f"{n}+{n}" for n in range(5)] * 2


def test_every_first_place_is_drawn_about_equally_often() -> None:
    firsts = [named_order(6, seed, epoch)[0] for seed in range(60) for epoch in range(10)]
    # 600 draws of 6: 100 each, with a standard deviation of 9.
    assert all(60 < firsts.count(row) < 140 for row in range(6))


def test_the_seed_of_a_rollout_is_pinned_and_the_same_in_another_process() -> None:
    # A change of these numbers changes every run there ever was.
    assert rollout_seed(0, 0, "p.jsonl/1", 0) == 5446908637811939668
    assert rollout_seed(7, 3, "arithmetic/5", 2) == 3668306049997047886
    assert named_order(8, 0, 0) == [1, 7, 3, 4, 5, 0, 6, 2]
    code = "from a3po_megatron.data.order import *; print(rollout_seed(7, 3, 'arithmetic/5', 2), named_order(8, 0, 0))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "3668306049997047886 [1, 7, 3, 4, 5, 0, 6, 2]"


def test_every_rollout_has_a_seed_of_its_own() -> None:
    names = list(itertools.product(range(4), range(12), ["1", "11", "a/1", "a/1@1", "a/11"], range(12)))
    seeds = [rollout_seed(*name) for name in names]
    assert len(set(seeds)) == len(names)
    assert all(0 <= seed < 2**63 for seed in seeds)
    # Numbers that would run together if the parts were only joined.
    assert rollout_seed(1, 11, "x", 0) != rollout_seed(11, 1, "x", 0)


# --- the built-in task -------------------------------------------------------------------------------------------


def test_built_in_problems_are_distinct_draws_with_the_answer_of_digit_arithmetic(tokens: Tokenizer) -> None:
    taken = take(prompts(ARITHMETIC, tokens), 300)
    for prompt in taken:
        expression = prompt.text.removesuffix(":")
        left = f"({expression[0]})"
        for operator, operand in zip(expression[1::2], expression[2::2], strict=True):
            left = f"(({left}{operator}{operand})%10)"
        assert prompt.text.endswith(":")
        assert prompt.answer == str(eval(left)), prompt
        assert prompt.tokens == tokens.encode(prompt.text)
    assert len({prompt.id for prompt in taken}) == 300
    assert len({prompt.text for prompt in taken}) > 200
    assert {len(prompt.text) for prompt in taken} == {4, 6, 8, 10, 12}  # 2 to 6 operands
    assert take(prompts(ARITHMETIC, tokens, seed=1), 300) != taken


def test_the_first_built_in_problems_are_pinned(tokens: Tokenizer) -> None:
    first = take(prompts(ARITHMETIC, tokens), 2)
    assert [(prompt.id, prompt.text, prompt.answer) for prompt in first] == [
        ("arithmetic/0", "5-4:", "1"),
        ("arithmetic/1", "8-5-7*7+3-8:", "7"),  # 3, -4 = 6, 42 = 2, 5, -3 = 7
    ]


# --- templates ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("raw", "what is {x}?"),
        ("chat", "user: what is {x}?\nanswer: "),
        ("qwen", "what is {x}?\nPlease reason step by step, and put your final answer within \\boxed{}."),
        (
            "dapo",
            "Solve the following math problem step by step. The last line of your response should be of the form "
            "Answer: $Answer (without quotes) where $Answer is the answer to the problem.\n\nwhat is {x}?\n\n"
            'Remember to put your answer on its own line after "Answer:".',
        ),
    ],
)
def test_a_template_renders_the_problem_word_for_word(tokenizer: Path, template: str, text: str) -> None:
    # One token a character: the rendered text, not only its length, is seen; unknown characters are <unk>.
    names = json.loads((tokenizer / "tokenizer.json").read_text())["model"]["vocab"]
    wanted = tuple(names.get(character, names["<unk>"]) for character in text)
    assert Tokenizer(tokenizer, VOCAB, (1,), template).encode("what is {x}?") == wanted


def test_a_response_is_decoded_without_special_tokens_and_shown_with_them(tokens: Tokenizer) -> None:
    ids = [*tokens.encode("3+4"), 1]
    assert tokens.decode(ids) == "3+4"
    assert tokens.pieces(ids) == ["3", "+", "4", "<eos>"]


@pytest.mark.parametrize(
    ("vocab", "eos", "template", "says"),
    [
        (VOCAB - 1, (1,), "raw", f"a token with id {VOCAB - 1}, the model's vocabulary has {VOCAB - 1}"),
        (VOCAB, (), "raw", "eos_token_id is missing"),
        (VOCAB, (1, VOCAB), "raw", f"eos_token_id {VOCAB} "),
        (VOCAB, (-1,), "raw", "eos_token_id -1 "),
    ],
)
def test_a_tokenizer_that_does_not_fit_the_model_is_refused(
    tokenizer: Path, vocab: int, eos: tuple[int, ...], template: str, says: str
) -> None:
    with pytest.raises(RequestError) as caught:
        Tokenizer(tokenizer, vocab, eos, template)
    assert says in str(caught.value)
    assert str(tokenizer) in str(caught.value)


def test_a_response_ends_at_every_end_token_of_the_model_and_at_the_tokenizers_own(tokenizer: Path) -> None:
    assert Tokenizer(tokenizer, VOCAB, (1,), "raw").stops == (1,)  # <eos> is the tokenizer's own
    assert Tokenizer(tokenizer, VOCAB, (5, 3), "raw").stops == (1, 3, 5)


def test_a_folder_without_a_readable_tokenizer_or_chat_template_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no tokenizer"):
        Tokenizer(tmp_path, VOCAB, (1,), "raw")
    save_tokenizer(tmp_path, VOCAB)
    with pytest.raises(RequestError, match="chat"):
        Tokenizer(tmp_path, VOCAB, (1,), "chat")
    (tmp_path / "tokenizer.json").write_text('{"version"')
    with pytest.raises(RequestError, match="cannot be read"):
        Tokenizer(tmp_path, VOCAB, (1,), "raw")


def test_prompts_of_a_file_carry_their_tokens_and_gold_answer(tmp_path: Path, tokens: Tokenizer) -> None:
    for prompt in take(prompts(rows(tmp_path, 5), tokens), 5):
        number = int(prompt.text.partition("+")[0])
        wanted = Prompt(
            f"rows.jsonl/{number + 1}", prompt.text, str(2 * number), tokens.encode(prompt.text), prompt.index
        )
        assert prompt == wanted


# --- files that are something else ---------------------------------------------------------------------------------

ROW = {"problem": "1+1", "answer": "2"}


def packed(folder: Path, kind: str) -> tuple[Path, list[str]]:
    """A file of one kind, and the words that its refusal must hold."""
    path, text = folder / f"rows.{kind}", (json.dumps(ROW) + "\n").encode()
    contents: dict[str, tuple[bytes, list[str]]] = {
        "bz2": (bz2.compress(text), ["is compressed with bzip2"]),
        "xz": (lzma.compress(text), ["is compressed with xz", "xz -dc"]),
        "nested.json": (json.dumps({"v": 1, "data": [ROW]}).encode(), ["a list in 'data'", "jq -c '.[\"data\"][]'"]),
        "pretty.json": (json.dumps(ROW, indent=1).encode(), ["one JSON object over several lines"]),
        "utf16": (text.decode().encode("utf-16"), ["is UTF-16", "iconv"]),
        "lfs": (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            ["a pointer of git-lfs", "git lfs pull"],
        ),
        "html": (b"<!doctype html>\n<p>Sign in</p>\n", ["a page of HTML"]),
    }
    path.write_bytes(contents[kind][0])
    return path, [*contents[kind][1], "prompts are read from JSONL, JSON, CSV, Parquet and Arrow files"]


@pytest.mark.parametrize("kind", ["bz2", "xz", "nested.json", "pretty.json", "utf16", "lfs", "html"])
def test_a_file_of_another_kind_is_told_for_what_it_is_with_what_is_read_and_what_to_do(
    tmp_path: Path, kind: str
) -> None:
    path, words = packed(tmp_path, kind)
    message = refusal(path)
    assert message.startswith(f"{path}: this is ")
    for named in words:
        assert named in message
    assert "\n" not in message


@pytest.mark.parametrize(("sign", "kind"), [(",", ".csv"), ("\t", ".tsv")])
def test_a_table_whose_name_does_not_say_so_is_told_how_to_be_called(tmp_path: Path, sign: str, kind: str) -> None:
    (tmp_path / "rows").write_text(f"problem{sign}answer\n1+1{sign}2\n")
    assert f"read where its name ends in {kind}" in refusal(tmp_path / "rows")


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"query": "q", "answer": "a"},
            ["the field 'problem' is missing", "'query', 'answer'", "data.problem_field: query"],
        ),
        ({"problem": "q", "ground_truth": "a"}, ["the field 'answer' is missing", "data.answer_field: ground_truth"]),
        ({"aufgabe": "q", "answer": "a"}, ["the row has 'aufgabe', 'answer'; data.problem_field says which"]),
        ({"problem": [{"role": "user"}], "answer": "a"}, ["turn 0 of the field 'problem' is no message", '{"role"']),
        ({"problem": ["q"], "answer": "a"}, ["'problem' is empty or no text: it holds [\"q\"]"]),
        (
            {"problem": "q", "answer": {"ground_truth": "a"}},
            ["'answer' is empty or no text: it holds {\"ground_truth\""],
        ),
        ({}, ["the row has no field"]),
    ],
)
def test_a_row_with_other_fields_is_told_which_option_names_them(
    tmp_path: Path, row: dict[str, Any], says: list[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(row) + "\n")
    for words in says:
        assert words in refusal(path)


def test_rows_that_stand_twice_are_counted_and_it_is_said_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join([GOOD, GOOD, '{"problem": " 1+1 ", "answer": 2}', '{"problem": "x", "answer": "3"}']))
    assert refusal(path, duplicates="error") == (
        f"{path}:2: the problem stands in line 1 already: '1+1' (and 1 more like it): remove all but one, or set "
        "data.duplicates: merge"
    )


# --- tokenizers that raise -----------------------------------------------------------------------------------------


def altered(source: Path, folder: Path, **changes: Any) -> Path:
    """A copy of a tokenizer with other values in tokenizer.json."""
    shutil.copytree(source, folder)
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"type": "FutureBPE", "x": [1]}},
        {"pre_tokenizer": {"type": "Quantum"}},
        {"decoder": {"type": "Nothing"}},
        {"normalizer": 7},
        {"added_tokens": [{"id": -1, "content": "x"}]},
        {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b c"]}},
        {"model": {"type": "Unigram", "vocab": [], "unk_id": 9}},
        {"model": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_tokenizer_of_newer_or_damaged_make_is_refused_in_one_line_with_the_versions_here(
    tmp_path: Path, tokenizer: Path, changes: dict[str, Any]
) -> None:
    with pytest.raises(RequestError) as caught:
        Tokenizer(altered(tokenizer, tmp_path / "t", **changes), VOCAB, (1,), "raw")
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 't'}: the tokenizer cannot be read by transformers ")
    assert f"tokenizers {tokenizers.__version__}: " in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('a system message is wanted') }}", "a system message is wanted"),
        ("{{ messages[1].content }}", "no element 1"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% for %}", "Expected an expression"),
        ("{{ messages[0]['content'].nothing() }}", "nothing"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
    ],
)
def test_a_chat_template_that_raises_is_one_message_with_its_words_and_the_option(
    tmp_path: Path, tokenizer: Path, template: str, says: str
) -> None:
    folder = shutil.copytree(tokenizer, tmp_path / "t")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": template}))
    with pytest.raises(RequestError) as caught:
        Tokenizer(folder, VOCAB, (1,), "chat").encode("1+1")
    message = str(caught.value)
    assert message.startswith(f"{folder}/tokenizer_config.json: chat_template, line 1: the chat template ")
    assert says in message
    assert "\n" not in message


def test_a_problem_of_which_the_tokenizer_makes_nothing_is_named(tmp_path: Path, tokenizer: Path) -> None:
    folder = altered(
        tokenizer, tmp_path / "t", normalizer={"type": "Replace", "pattern": {"String": "x"}, "content": ""}
    )
    path = tmp_path / "rows.jsonl"
    path.write_text('{"problem": "xxx", "answer": "2"}\n')
    with pytest.raises(RequestError, match=f"{path}:1: the tokenizer makes no token at all"):
        prompts(path, Tokenizer(folder, VOCAB, (1,), "raw"))
