"""Templates: a conversation is rendered as transformers renders it, and what is wrong with a template is named."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from a3po_megatron.config import DataOptions
from a3po_megatron.data.fields import Turn
from a3po_megatron.data.prompts import Prompts
from a3po_megatron.data.tokenizer import Tokenizer
from a3po_megatron.errors import RequestError
from tests.harness.taking import take
from tests.harness.tiny_models import VOCAB, save_tokenizer

CHATML = """\
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role != 'system' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""
TURNS = (Turn("system", "Be brief."), Turn("user", "1+1?"), Turn("assistant", "2"), Turn("user", " and 2+2? "))


def bytewise(folder: Path, chat_template: str | None = CHATML, normalizer: Any = None) -> Path:
    """A byte-level BPE with a few merges, as Qwen's and Llama 3's are."""
    from tokenizers import models, pre_tokenizers, trainers

    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.normalizer = normalizer
    backend.decoder = tokenizers.decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    backend.train_from_iterator(["the answer of the problem is that the other one is"] * 9, trainer)
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    made.save_pretrained(folder)
    if chat_template is not None:
        (folder / "chat_template.jinja").write_text(chat_template)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bytewise(tmp_path_factory.mktemp("bytewise"))


def tokens(folder: Path, template: str = "chat", **options: Any) -> Tokenizer:
    return Tokenizer(folder, 400, (1,), template, **options)


def refusal(folder: Path, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        tokens(folder, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}, {"enable_thinking": True}])
@pytest.mark.parametrize("problem", ["What is {x}?\n é", TURNS, TURNS[1:2]], ids=["text", "turns", "one turn"])
def test_a_conversation_is_rendered_and_tokenised_as_transformers_does_it(
    folder: Path, arguments: dict[str, Any], problem: Any
) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    turns = (Turn("user", problem),) if isinstance(problem, str) else problem
    messages = [turn._asdict() for turn in turns]
    ours = tokens(folder, arguments=arguments)
    assert ours.render(problem) == theirs.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=True, **arguments
    )
    assert list(ours.encode(problem)) == theirs.apply_chat_template(
        messages, add_generation_prompt=True, return_dict=False, **arguments
    )


def test_a_system_message_stands_in_front_and_never_beside_another(folder: Path) -> None:
    ours = tokens(folder, system="Be brief.")
    assert ours.render("1+1?") == tokens(folder).render((Turn("system", "Be brief."), Turn("user", "1+1?")))
    with pytest.raises(RequestError, match="a system message of its own beside data.system"):
        ours.render(TURNS)


def test_a_template_of_ones_own_goes_before_the_tokenizers(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    assert tokens(folder, template_file=str(own)).render("q") == "[user] q\n>"


PROMPT = "{% if add_generation_prompt %}>{% endif %}"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "has no generation prompt"),
        (
            "\n{% for m in messages %}\n{{ m.contnt }}{% endfor %}" + PROMPT,
            ":3: the chat template prints contnt, which",
        ),
        ("{% for m in messages %}{{ m.contnt }}{% endfor %}" + PROMPT, "did you mean content?"),
        ("{% for m in mesages %}{{ m.content }}{% endfor %}" + PROMPT, "leaves out the user's message"),
        ("{{ messages[0].content }}{{ answer_style }}" + PROMPT, "prints answer_style, which holds nothing"),
        ("\n\n{{ messages[0].content }}{% if %}" + PROMPT, ":3: the chat template is no Jinja: Expected an expression"),
        ("\n{{ messages[0].content }}\n{{ 1 / 0 }}" + PROMPT, ":3: the chat template refuses one turn of a user"),
        ("\n{{ raise_exception('no, never') }}" + PROMPT, ":2: the chat template refuses one turn of a user"),
    ],
)
@pytest.mark.parametrize("own", [True, False], ids=["own file", "tokenizer's"])
def test_a_template_that_is_wrong_is_refused_by_name_with_file_and_line(
    folder: Path, tmp_path: Path, template: str, says: str, own: bool
) -> None:
    if own:
        place = tmp_path / "own.jinja"
        place.write_text(template)
        message = refusal(folder, template_file=str(place))
    else:
        place = shutil.copytree(folder, tmp_path / "t") / "chat_template.jinja"
        place.write_text(template)
        message = refusal(tmp_path / "t")
    assert message.startswith(f"{place}:"), message
    assert says in message


def test_a_template_that_refuses_a_row_is_named_with_both_places(folder: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.jinja"
    own.write_text(
        "{% if messages | length > 1 %}\n{{ raise_exception('one turn only') }}{% endif %}{{ messages[0].content }}"
        + PROMPT
    )
    rows = tmp_path / "rows.jsonl"
    rows.write_text(
        "".join(
            json.dumps({"prompt": [t._asdict() for t in turns], "answer": 4}) + "\n" for turns in (TURNS[1:2], TURNS)
        )
    )
    options = DataOptions(path=str(rows), problem_field="prompt", answer_field="answer")
    with pytest.raises(RequestError) as caught:
        Prompts(options, tokens(folder, template_file=str(own)), 0, 100)
    assert str(caught.value).startswith(
        f"{rows}:2: {own}:2: the chat template refuses the turns system, user, assistant"
    )
    assert "one turn only" in str(caught.value)
    with pytest.raises(RequestError, match="which only data.template: chat renders"):
        Prompts(options, tokens(folder, "raw"), 0, 100)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("enable_thinkin", "data.template_arguments.enable_thinkin has no effect"),
        ("enable_thinkin", "did you mean enable_thinking?"),
        ("date", "it asks for enable_thinking"),
        ("add_generation_prompt", "this follows from the prompts and the tokenizer"),
    ],
)
def test_an_argument_that_no_template_asks_for_is_refused_by_name(folder: Path, argument: str, says: str) -> None:
    assert says in refusal(folder, arguments={argument: True})


def test_a_tokenizer_without_a_chat_template_takes_one_from_a_file(tmp_path: Path, folder: Path) -> None:
    bare = bytewise(tmp_path / "bare", None)
    assert "data.template_file names one" in refusal(bare)
    own = str(folder / "chat_template.jinja")
    assert tokens(bare, template_file=own).render("q") == tokens(folder).render("q")


# --- the length filter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bytes", "bytes, NFC", "characters", "NFKD", "prefix space"])
@pytest.mark.parametrize("template", ["raw", "chat"])
def test_the_length_filter_is_that_of_tokenising_everything(tmp_path: Path, kind: str, template: str) -> None:
    """Texts on both sides of every limit, with characters that normalisation makes longer."""
    from tokenizers import normalizers, pre_tokenizers

    if kind == "characters":
        save_tokenizer(tmp_path / "t", VOCAB)
        (tmp_path / "t" / "chat_template.jinja").write_text(CHATML)
    else:
        steps = {"bytes, NFC": normalizers.NFC(), "NFKD": normalizers.NFKD()}
        bytewise(tmp_path / "t", normalizer=steps.get(kind))
    if kind == "prefix space":
        path = tmp_path / "t" / "tokenizer.json"
        tree = json.loads(path.read_text())
        tree["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(tree))
    del pre_tokenizers
    ours = tokens(tmp_path / "t", template)
    counted = kind in ("NFKD", "prefix space")
    assert ours.surely_within("a", 500) != counted, "where a token can be less than a byte, all are counted"
    signs = ["a", "the ", "é", "\u0958", "\ufdfa", "🙂", "9", "\ufb2c"]
    problems = [sign * count + str(n) for n, sign in enumerate(signs) for count in (1, 3, 7, 20)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": problem, "answer": 1}) + "\n" for problem in problems))
    lengths = {problem: len(ours.encode(problem)) for problem in problems}
    for limit in range(min(lengths.values()), max(lengths.values()), 5):
        options = DataOptions(path=str(path), drop_long_prompts=True, shuffle=False)
        prompts = Prompts(options, ours, 0, limit)
        wanted = [problem for problem in problems if lengths[problem] <= limit]
        kept = [prompt.text for prompt in take(prompts, len(wanted))]
        assert kept == [ours.render(problem) for problem in wanted]
        left_out = len(problems) - len(wanted)
        assert prompts.remarks == [
            f"{left_out} of {len(problems)} prompts have more than rollout.max_prompt_tokens = {limit} tokens (the "
            f"longest {max(lengths.values())}) and were left out"
        ]


def test_weights_draw_each_source_as_often_as_they_say_and_each_in_its_own_epochs(tmp_path: Path, folder: Path) -> None:
    for name, count in (("a", 5), ("b", 7), ("c", 2)):
        rows = [{"problem": f"{name}{n}", "answer": n} for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = tuple(str(tmp_path / f"{name}.jsonl") for name in "abc")
    ours = tokens(folder, "raw")
    prompts = Prompts(DataOptions(path=paths, weights=(0.5, 0.3, 0.2)), ours, 3, 100)
    drawn = [prompt.text for prompt in take(prompts, 700)]
    for start in range(0, 700, 10):
        block = "".join(sorted(text[0] for text in drawn[start : start + 10]))
        assert block == "aaaaabbbcc"
    for name, count in (("a", 5), ("b", 7), ("c", 2)):
        own = [text for text in drawn if text[0] == name]
        for epoch in range(len(own) // count):
            assert sorted(own[epoch * count : (epoch + 1) * count]) == [f"{name}{n}" for n in range(count)]
    assert len({prompts.at(index).id for index in range(700)}) == 700
    again = Prompts(DataOptions(path=paths, weights=(5, 3, 2)), ours, 3, 100)
    again.restore({"position": 333})
    assert [prompt.text for prompt in take(again, 50)] == drawn[333:383]
    without = Prompts(DataOptions(path=paths), ours, 3, 100)
    assert sorted(prompt.text for prompt in take(without, 14)) == sorted({*drawn}), "each row once an epoch"
    with pytest.raises(RequestError, match="data.weights has 2 numbers, data.path has 3 sources"):
        Prompts(DataOptions(path=paths, weights=(1, 2)), ours, 3, 100)


def test_unreadable_golds_are_refused_with_file_and_line_or_dropped_and_counted(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "rows.jsonl"
    golds = ["1", "))((", ["2", "x = "], "3", "$"]
    path.write_text("".join(json.dumps({"problem": f"p{n}", "answer": g}) + "\n" for n, g in enumerate(golds)))
    ours = tokens(folder, "raw")
    options = {"path": str(path), "cache": str(tmp_path / "cache")}
    with pytest.raises(RequestError) as caught:
        Prompts(DataOptions(**options), ours, 0, 100, check_golds=True)
    assert str(caught.value).startswith(f"{path}:2: the gold answer cannot be read: '))((' (and 2 more rows like it): ")
    prompts = Prompts(DataOptions(**options, unreadable_golds="drop"), ours, 0, 100)
    assert sorted(prompt.answer for prompt in take(prompts, 2)) == ["1", "3"]
    assert prompts.remarks == ["3 of 5 rows were left out: the grader cannot read their gold answers"]
