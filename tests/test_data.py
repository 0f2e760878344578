"""Data sets as people have them: every layout gives the rows that were written into it, each problem once."""

from __future__ import annotations

import csv
import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard

from a3po_megatron.config import DataOptions, load_config
from a3po_megatron.data import load as loading
from a3po_megatron.data.golds import unreadable, unreadable_rows
from a3po_megatron.data.load import Loaded, load
from a3po_megatron.errors import RequestError
from a3po_megatron.files.cache import Cache
from a3po_megatron.reward.math import gold_text, grade
from a3po_megatron.reward.worker import judge

ROWS = [
    {"problem": 'What is 1+1?\nThink, "please".', "answer": "2"},
    {"problem": "Größe, β ≤ 7, a\u2028b", "answer": "\\frac{1}{2}"},
    {"problem": "x, y\tand z", "answer": "-7"},
]


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(str(tmp_path / "cache"))


def loaded(path: Path | list[Path], cache: Cache, **options: Any) -> Loaded:
    named = str(path) if isinstance(path, Path) else tuple(map(str, path))
    return load(DataOptions(path=named, **options), cache)


def pairs(data: Loaded) -> list[tuple[Any, Any]]:
    return [(row.problem, row.gold) for row in data.rows]


def refusal(path: Path | list[Path], cache: Cache, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        loaded(path, cache, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def table(rows: list[dict[str, Any]], sign: str) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter=sign)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def zstd_in_frames(data: bytes) -> bytes:
    """Several frames one after the other, as parallel compressors write them."""
    return zstandard.compress(data[:50]) + zstandard.compress(data[50:])


def saved_to_disk(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """What `datasets` writes: Arrow streams and what describes them."""
    folder.mkdir(parents=True)
    whole = pyarrow.Table.from_pylist(rows)
    names = [f"data-{n:05d}-of-00002.arrow" for n in range(2)]
    for name, part in zip(names, (whole.slice(0, 2), whole.slice(2)), strict=True):
        with pyarrow.ipc.new_stream(str(folder / name), whole.schema) as stream:
            stream.write_table(part)
    (folder / "dataset_info.json").write_text('{"features": {}}')
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "f", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    return folder


def written(folder: Path, kind: str, rows: list[dict[str, Any]]) -> Path:
    """The rows in one of the kinds of files and folders that are read."""
    path = folder / f"rows.{kind}"
    texts = {
        "jsonl": lines(rows),
        "json": json.dumps(rows, indent=2, ensure_ascii=False).encode(),
        "line.json": b"\xef\xbb\xbf" + json.dumps(rows).encode(),
        "csv": table(rows, ","),
        "tsv": table(rows, "\t"),
        "jsonl.gz": gzip.compress(lines(rows), mtime=0x092C092C),  # its header holds tabs and commas
        "jsonl.zst": zstandard.compress(lines(rows)),
        "json.zst": zstd_in_frames(json.dumps(rows).encode()),
        "csv.gz": gzip.compress(table(rows, ",")),
    }
    if kind in texts:
        path.write_bytes(texts[kind])
    elif kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    elif kind == "arrow":
        whole = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(str(path), whole.schema) as file:
            file.write_table(whole, max_chunksize=2)
    elif kind == "save_to_disk":
        saved_to_disk(path, rows)
    elif kind == "dataset_dict":
        saved_to_disk(path / "train", rows)
        (path / "dataset_dict.json").write_text('{"splits": ["train"]}')
    elif kind == "shards":
        path.mkdir()
        for number, row in enumerate(rows):
            file = path / "data" / f"train-{number:05d}-of-{len(rows):05d}.parquet"
            file.parent.mkdir(exist_ok=True)
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), file)
        (path / "README.md").write_text("# card")
    return path


KINDS = ["jsonl", "json", "line.json", "csv", "tsv", "jsonl.gz", "jsonl.zst", "json.zst", "csv.gz", "parquet", "arrow"]
FOLDERS = ["save_to_disk", "dataset_dict", "shards"]


@pytest.mark.parametrize("kind", KINDS + FOLDERS)
def test_every_kind_of_file_and_folder_gives_the_rows_that_were_written(
    tmp_path: Path, cache: Cache, kind: str
) -> None:
    data = loaded(written(tmp_path, kind, ROWS), cache)
    assert pairs(data) == [(row["problem"], row["answer"]) for row in ROWS]
    assert len({data.id(row) for row in data.rows}) == 3


def test_a_row_is_placed_where_it_begins_in_its_file(tmp_path: Path, cache: Cache) -> None:
    places = {"jsonl": [1, 2, 3], "json": [1, 2, 3], "csv": [2, 4, 5], "parquet": [1, 2, 3]}
    for kind, wanted in places.items():
        data = loaded(written(tmp_path, kind, ROWS), cache)
        assert [row.place for row in data.rows] == wanted, kind
    assert loaded(tmp_path / "rows.parquet", cache).where(data.rows[1]) == f"{tmp_path}/rows.parquet: row 2"


def test_an_array_of_any_size_is_read_as_the_standard_library_reads_it(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With chunks of seven characters, every row and every blank lies across several."""
    monkeypatch.setattr("a3po_megatron.data.read.CHUNK", 7)
    random_ = random.Random(0)
    rows = [{"problem": f"{n} " + "".join(random_.choices('ab"\\{}[],\n é', k=n % 40)), "answer": n} for n in range(60)]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows, indent=random_.choice([None, 1, 4]), ensure_ascii=False))
    assert pairs(loaded(path, cache)) == [(row["problem"], str(row["answer"])) for row in json.loads(path.read_text())]


# --- layouts of public data sets -----------------------------------------------------------------------------------

VERL = [
    {
        "data_source": "math_dapo",
        "prompt": [{"role": "user", "content": f"Solve. Answer: $Answer\n\nWhat is {n}+{n}?"}],
        "ability": "MATH",
        "reward_model": {"ground_truth": str(2 * n), "style": "rule-lighteval/MATH_v2"},
        "extra_info": {"index": f"9a9b6eb4-{n}"},
    }
    for n in range(3)
]
GSM8K = [
    {"question": "A robe takes 2 bolts and half that. How many?", "answer": "2/2=<<2/2=1>>1\nso 1,2\n#### 3"},
    {"question": "How many are 1000 and 80?", "answer": "They are <<1000+80=1080>>1,080.\n#### 1,080"},
]
MATH = [
    {"problem": "Find $x$.", "level": "Level 5", "type": "Algebra", "solution": "We get $x=\\boxed{\\frac{3}{4}}$."},
    {"problem": "Find $y$.", "level": "Level 1", "type": "Algebra", "solution": "So $y = \\boxed{5}$, as wanted."},
]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize(
    ("rows", "problems", "right"),
    [
        (VERL, [row["prompt"][0]["content"] for row in VERL], ["0", "2", "4"]),
        (GSM8K, [row["question"] for row in GSM8K], ["3", "1080"]),
        (MATH, [row["problem"] for row in MATH], ["0.75", "5"]),
        ([{"question": "q", "final_answer": ["2", "two"], "unit": None}], ["q"], ["2"]),
        ([{"question": "q", "answer": 27.0}], ["q"], ["27"]),
    ],
    ids=["verl", "gsm8k", "math", "olympiadbench", "amc"],
)
def test_the_layouts_of_public_data_sets_need_no_converter(
    tmp_path: Path, cache: Cache, kind: str, rows: list[dict[str, Any]], problems: list[str], right: list[str]
) -> None:
    data = loaded(written(tmp_path, kind, rows), cache)
    assert [row.problem for row in data.rows] == problems
    for row, answer in zip(data.rows, right, strict=True):
        assert judge(grade, f"\\boxed{{{answer}}}", row.gold).outcome == "correct"
        assert judge(grade, "\\boxed{-1}", row.gold).outcome == "wrong"


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "save_to_disk"])
def test_a_field_is_found_by_its_path(tmp_path: Path, cache: Cache, kind: str) -> None:
    path = written(tmp_path, kind, VERL)
    fields = {"problem_field": "prompt[0].content", "answer_field": "reward_model.ground_truth"}
    data = loaded(path, cache, **fields, id_field="extra_info.index")
    assert pairs(data) == [(row["prompt"][0]["content"], row["reward_model"]["ground_truth"]) for row in VERL]
    given = [data.id(row).rpartition("/")[2] for row in data.rows]
    assert given == [row["extra_info"]["index"] for row in VERL]
    assert (
        loaded(path, cache, **fields | {"problem_field": "prompt[-1].content"}).rows[0].problem == data.rows[0].problem
    )


def test_a_field_whose_name_is_a_path_is_that_field(tmp_path: Path, cache: Cache) -> None:
    (tmp_path / "rows.jsonl").write_bytes(lines([{"a.b": "the name", "a": {"b": "the path"}, "answer": 1}]))
    assert loaded(tmp_path / "rows.jsonl", cache, problem_field="a.b").rows[0].problem == "the name"


@pytest.mark.parametrize(
    ("field", "says"),
    [
        ("reward_model.gold", "the field 'reward_model.gold' is missing; the row has 'data_source', 'prompt'"),
        ("reward_model.gold", '(\'reward_model\' holds {"ground_truth": "0"'),
        ("prompt[3].content", "the field 'prompt[3].content' is missing"),
        ("reward_model[0]", "the field 'reward_model[0]' is missing"),
        ("reward_model..x", "is no path of a field"),
        ("[0]", "is no path of a field"),
        ("reward_model", "'reward_model' is empty or no text"),
    ],
)
def test_a_mistyped_field_is_refused_by_name(tmp_path: Path, cache: Cache, field: str, says: str) -> None:
    assert says in refusal(written(tmp_path, "jsonl", VERL), cache, answer_field=field)


TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": [{"type": "text", "text": "And "}, {"type": "text", "text": "2+2?"}]},
]


@pytest.mark.parametrize("kind", ["jsonl", "json"])
def test_a_conversation_keeps_its_turns_and_a_lone_users_is_text(tmp_path: Path, cache: Cache, kind: str) -> None:
    rows = [{"prompt": TURNS, "answer": 4}, {"prompt": TURNS[1:2], "answer": 2}]
    data = loaded(written(tmp_path, kind, rows), cache, problem_field="prompt")
    assert data.rows[0].problem == (
        ("system", "Be brief."),
        ("user", "1+1?"),
        ("assistant", "2"),
        ("user", "And 2+2?"),
    )
    assert data.rows[1].problem == "1+1?"


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        (TURNS[:3], "ends with a turn of the assistant: a prompt ends with a user's"),
        ([TURNS[1], TURNS[0], TURNS[1]], "a system message that is not the first"),
        ([{"role": "human", "content": "q"}], "turn 0 of the field 'prompt' has the role \"human\""),
        ([{"from": "human", "value": "q"}], "turn 0 of the field 'prompt' is no message"),
        ([{"role": "user", "content": [{"type": "image", "text": ""}]}], "holds something else than text"),
        ([{"role": "user", "content": ""}], "turn 0 of the field 'prompt' is empty or no text"),
    ],
)
def test_a_conversation_that_is_none_is_refused_by_its_turn(
    tmp_path: Path, cache: Cache, turns: list[dict[str, Any]], says: str
) -> None:
    path = written(tmp_path, "jsonl", [{"prompt": turns, "answer": "4"}])
    assert refusal(path, cache, problem_field="prompt").startswith(f"{path}:1: ")
    assert says in refusal(path, cache, problem_field="prompt")


# --- gold answers --------------------------------------------------------------------------------------------------


def test_of_several_gold_answers_any_makes_a_response_correct_and_none_that_fails_makes_it_wrong() -> None:
    assert judge(grade, "\\boxed{1/2}", ["7", "0.5"]).outcome == "correct"
    assert judge(grade, "\\boxed{8}", ("7", "0.5")).outcome == "wrong"
    assert judge(grade, "\\boxed{8}", ["7", " "]).outcome == "invalid"
    assert judge(grade, "\\boxed{7}", [" ", "7"]).outcome == "correct"
    assert (
        judge(grade, "so it may be 7", ["7", "8"], False).outcome
        == grade("so it may be 7", "7", finished=False).outcome
    )


def test_a_row_names_its_grader_which_reads_its_gold_answer_and_another_name_is_refused(
    tmp_path: Path, cache: Cache
) -> None:
    kinds = [("math", "1/2"), ("choice", "B"), ("numeric", '{"value": "3", "tolerance": 0.1}')]
    rows = [{"id": str(n), "problem": f"p{n}", "answer": gold, "by": name} for n, (name, gold) in enumerate(kinds)]
    path = written(tmp_path, "jsonl", rows)
    data = load(DataOptions(path=str(path), grader_field="by"), cache)
    assert [(row.grader, row.gold) for row in data.rows] == kinds
    assert {name: data.golds(name) for name in data.graders()} == {name: [gold] for name, gold in kinds}
    assert unreadable_rows(data, "math", cache) == []
    # The same gold answers by another one's rules; rows that name none are of the configured grader.
    mixed = [("choice", "1/2"), ("numeric", "{}"), ("math", "))((")]
    rows = [{"id": str(n), "problem": f"p{n}", "answer": gold, "by": name} for n, (name, gold) in enumerate(mixed)]
    found = unreadable_rows(
        load(DataOptions(path=str(written(tmp_path, "jsonl", rows)), grader_field="by"), cache), "math", cache
    )
    assert [(bad.row.grader, bad.gold) for bad in found] == mixed
    plain = load(DataOptions(path=str(written(tmp_path, "jsonl", rows))), cache)
    assert plain.graders() == [""]
    assert [bad.gold for bad in unreadable_rows(plain, "choice", cache)] == ["1/2", "{}", "))(("]
    for value, says in (("maths", "'maths' is no grader: there are math, choice"), (7, "'by' names no grader")):
        path = written(tmp_path, "jsonl", [rows[0] | {"by": value}])
        assert refusal(path, cache, grader_field="by").startswith(f"{path}:1: ")
        assert says in refusal(path, cache, grader_field="by")


def test_unreadable_golds_are_those_that_the_grader_calls_so_and_each_is_read_once(
    cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    golds = ["7", "-0.5", "\\frac{1}{2}", "so \\boxed{3}", "", "$", "\\text{Softball, Kickball}", "))((", "12" * 200]
    asked: list[str] = []

    def read_gold(text: str) -> Any:
        asked.append(text)
        return real(text)

    from a3po_megatron.data import golds as module

    real = module.read_gold
    monkeypatch.setattr(module, "read_gold", read_gold)
    found = unreadable(golds, cache)
    for gold in golds:
        verdict = grade("\\boxed{some other thing 5}", gold)
        assert (gold in found) == (verdict.outcome == "invalid"), gold
    assert found["$"] == "the gold answer is empty"
    assert "7" not in asked and "-0.5" not in asked
    before = len(asked)
    assert unreadable(golds, cache) == found
    assert len(asked) == before, "what was read once is kept"
    assert gold_text("so \\boxed{3}") not in asked


# --- duplicates and conflicts --------------------------------------------------------------------------------------


def repeated(folder: Path) -> Path:
    rows = [
        {"problem": "a", "answer": "1"},
        {"problem": "b", "answer": "2"},
        {"problem": " a\n", "answer": 1},
        {"problem": "b", "answer": "so #### 9\n#### 2"},
        {"problem": "c", "answer": ["3", "4"]},
        {"problem": "c", "answer": ["4", "3"]},
    ]
    path = folder / "rows.jsonl"
    path.write_bytes(lines(rows))
    return path


def test_identical_rows_are_merged_into_the_first_and_counted(tmp_path: Path, cache: Cache) -> None:
    data = loaded(repeated(tmp_path), cache)
    assert pairs(data) == [("a", "1"), ("b", "2"), ("c", ("3", "4"))]
    assert data.counts.remarks() == ["3 of 6 rows stand more than once and were merged (data.duplicates)"]
    assert len(loaded(repeated(tmp_path), cache, duplicates="all").rows) == 6
    message = refusal(repeated(tmp_path), cache, duplicates="error")
    assert message.startswith(
        f"{tmp_path}/rows.jsonl:3: the problem stands in line 1 already: 'a' (and 2 more like it)"
    )


def test_a_data_set_that_repeats_its_prompts_a_hundred_times_is_read_as_one_copy(tmp_path: Path, cache: Cache) -> None:
    data = loaded(written(tmp_path, "parquet", VERL * 100), cache)
    assert pairs(data) == pairs(loaded(written(tmp_path, "jsonl", VERL), cache))
    assert (data.counts.read, data.counts.repeated) == (300, 297)


@pytest.mark.parametrize("duplicates", ["merge", "error", "all"])
def test_one_problem_with_two_golds_is_an_error_with_both_lines_or_dropped_whole(
    tmp_path: Path, cache: Cache, duplicates: str
) -> None:
    rows = [{"problem": p, "answer": a} for p, a in (("x", 1), ("a", 1), ("b", 2), ("a", 3), ("c", 4), ("b", 5))]
    path = written(tmp_path, "jsonl", rows)
    message = refusal(path, cache, duplicates=duplicates)
    assert message.startswith(f"{path}:4: the problem stands in line 2 with another gold answer, here '3': 'a' (and 1 ")
    assert "data.conflicts: drop" in message
    data = loaded(path, cache, duplicates=duplicates, conflicts="drop")
    assert pairs(data) == [("x", "1"), ("c", "4")]
    assert data.counts.conflicting == 4


def test_a_conflict_between_files_names_both(tmp_path: Path, cache: Cache) -> None:
    for name, answer in (("one", 1), ("two", 2)):
        (tmp_path / f"{name}.jsonl").write_bytes(lines([{"problem": "p", "answer": answer}]))
    message = refusal([tmp_path / "one.jsonl", tmp_path / "two.jsonl"], cache)
    assert message.startswith(f"{tmp_path}/two.jsonl:1: the problem stands in {tmp_path}/one.jsonl:1 with another gold")


def test_an_id_that_stands_twice_or_is_what_another_row_is_called_is_refused(tmp_path: Path, cache: Cache) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines([{"id": 7, "problem": "p", "answer": 1}, {"id": "7", "problem": "q", "answer": 1}]))
    assert refusal(path, cache).startswith(f"{path}:2: the id stands in line 1 already: '7'")
    path.write_bytes(lines([{"id": "rows.jsonl/2", "problem": "p", "answer": 1}, {"problem": "q", "answer": 1}]))
    assert refusal(path, cache).startswith(f"{path}:1: the id is what the row in {path}:2 is called")


def test_merging_is_that_of_a_dictionary_on_random_rows(tmp_path: Path, cache: Cache) -> None:
    random_ = random.Random(1)
    rows = [{"problem": f"p{random_.randrange(40)}", "answer": random_.randrange(2)} for _ in range(300)]
    golds: dict[str, set[int]] = {}
    for row in rows:
        golds.setdefault(row["problem"], set()).add(row["answer"])
    wanted = [(problem, str(next(iter(answers)))) for problem, answers in golds.items() if len(answers) == 1]
    data = loaded(written(tmp_path, "jsonl", rows), cache, conflicts="drop")
    assert pairs(data) == wanted
    assert data.counts.read - data.counts.repeated - data.counts.conflicting == len(wanted)


# --- files that are damaged, folders that do not say ---------------------------------------------------------------


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst", "json", "json.zst", "parquet", "arrow", "csv.gz"])
def test_a_file_that_is_cut_off_is_refused_by_name(tmp_path: Path, cache: Cache, kind: str) -> None:
    path = written(tmp_path, kind, ROWS)
    path.write_bytes(path.read_bytes()[:-9])
    message = refusal(path, cache)
    assert message.startswith(f"{path}:")
    assert any(words in message for words in ("cannot read the prompts", "damaged", "not valid JSON", "file ends"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('[{"problem": "p", "answer": 1}', ":1: not valid JSON: expected a comma or the array's end"),
        ('[{"problem": "p", "answer": 1}\n {"problem": "q"}]', ":2: not valid JSON: expected a comma"),
        (
            '[{"problem": "p", "answer": 1},\n\n {"problem": q}]',
            ":3: not valid JSON: Expecting value: line 3 column 13",
        ),
        ('[{"problem": "p", "answer": 1},\n7]', ":2: expected an object"),
        ('[{"problem": "p", "answer": 1}]\n{}', ":2: something stands behind the end of the array"),
        ('[{"problem": "p", "problem": "q", "answer": 1}]', ":1: not valid JSON: a field of"),
        ("[]", ": the file holds no prompts"),
    ],
)
def test_an_array_that_is_none_is_refused_by_line(tmp_path: Path, cache: Cache, text: str, says: str) -> None:
    (tmp_path / "rows.json").write_text(text)
    assert refusal(tmp_path / "rows.json", cache).startswith(f"{tmp_path}/rows.json{says}")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("problem,answer\np,1,2\n", ":2: 3 cells, but 2 columns: problem, answer"),
        ('problem,answer\n"a\nb",1\nq\n', ":4: 1 cells, but 2 columns"),
        ("problem,problem\np,q\n", ":1: a column's name stands twice"),
        ('problem,answer\n"p"x,1\n', ":2: not a valid table"),
        ("problem,answer\np,\n", ":2: the field 'answer' is empty"),
    ],
)
def test_a_table_that_is_none_is_refused_by_line(tmp_path: Path, cache: Cache, text: str, says: str) -> None:
    (tmp_path / "rows.csv").write_text(text)
    assert refusal(tmp_path / "rows.csv", cache).startswith(f"{tmp_path}/rows.csv{says}")


def test_a_folder_that_does_not_say_which_rows_are_meant_is_refused(tmp_path: Path, cache: Cache) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    assert "holds no file of rows" in refusal(folder, cache)
    for split in ("train", "test"):
        (folder / f"{split}-00000-of-00001.jsonl").write_bytes(lines(ROWS))
    assert f"several splits (test, train): name the files to read, such as {folder}/train" in refusal(folder, cache)
    (folder / "test-00000-of-00001.jsonl").rename(folder / "train.csv")
    assert "several kinds (.csv, .jsonl)" in refusal(folder, cache)
    both = tmp_path / "dict"
    saved_to_disk(both / "train", ROWS)
    (both / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert f"holds 2 splits (train, test): name one, such as {both}/train" in refusal(both, cache)
    state = both / "train" / "state.json"
    state.write_text(json.dumps(json.loads(state.read_text()) | {"_indices_data_files": [{"filename": "i.arrow"}]}))
    assert "flatten_indices" in refusal(both / "train", cache)
    state.write_text("{}")
    assert "not what save_to_disk writes" in refusal(both / "train", cache)


# --- the cache -----------------------------------------------------------------------------------------------------


def test_a_large_data_set_is_kept_by_content_and_comes_back_the_same(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = repeated(tmp_path)
    plain = loaded(path, cache)
    assert not cache.folder.exists(), "a small one is read anew"
    monkeypatch.setattr(loading, "LARGE_BYTES", 1)
    first = loaded(path, cache)
    with monkeypatch.context() as without_reading:
        without_reading.setattr("a3po_megatron.data.read.rows_of", None)
        again = loaded(path, cache)
    assert pairs(plain) == pairs(first) == pairs(again)
    assert first.counts == again.counts == plain.counts
    path.write_bytes(path.read_bytes().replace(b'"c"', b'"d"'))
    assert ("d", ("3", "4")) in pairs(loaded(path, cache))
    assert len(loaded(path, cache, duplicates="all").rows) == 6, "what was asked for is part of the name"


def test_what_is_kept_of_several_files_is_by_the_content_and_the_source_of_each(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LARGE_BYTES", 1)
    folder, more = tmp_path / "shards", tmp_path / "more.jsonl"
    folder.mkdir()
    for name, rows in (("0.jsonl", ROWS[:1]), ("1.jsonl", ROWS[1:2])):
        (folder / name).write_bytes(lines(rows))
    more.write_bytes(lines(ROWS[2:3]))
    first = loaded([folder, more], cache)
    assert [len(first.rows), first.bounds] == [3, [0, 2, 3]]
    kept = set(cache.folder.iterdir())
    assert pairs(loaded([folder, more], cache)) == pairs(first) and set(cache.folder.iterdir()) == kept
    # The same three files, as one source and as three, in another order, and with another content of the last.
    assert loaded([folder / "0.jsonl", folder / "1.jsonl", more], cache).bounds == [0, 1, 2, 3]
    assert pairs(loaded([more, folder], cache)) == [*pairs(first)[2:], *pairs(first)[:2]]
    more.write_bytes(lines([{"problem": "another", "answer": "5"}]))
    assert pairs(loaded([folder, more], cache)) == [*pairs(first)[:2], ("another", "5")]
    (folder / "1.jsonl").write_bytes(lines([{"problem": "one more", "answer": "6"}]))
    assert pairs(loaded([folder, more], cache)) == [pairs(first)[0], ("one more", "6"), ("another", "5")]


def test_a_cache_that_cannot_be_written_is_said_and_does_not_matter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "LARGE_BYTES", 1)
    (tmp_path / "file").write_text("")
    cache = Cache(str(tmp_path / "file" / "cache"))
    assert pairs(loaded(repeated(tmp_path), cache)) == [("a", "1"), ("b", "2"), ("c", ("3", "4"))]
    assert cache.refused is not None and "nothing can be kept here" in cache.refused


def test_rows_of_many_batches_are_found_by_number_and_in_order(
    tmp_path: Path, cache: Cache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("a3po_megatron.data.table.BATCH", 7)
    rows = [{"problem": f"p{n}", "answer": n % 3 if n % 5 else 9} for n in range(100)]
    data = loaded(written(tmp_path, "jsonl", rows), cache)
    kept = np.arange(100) % 5 != 0
    fewer = data.only(kept)
    wanted = [(f"p{n}", str(n % 3)) for n in range(100) if n % 5]
    assert pairs(fewer) == wanted
    assert [(fewer.rows[n].problem, fewer.rows[n].gold) for n in range(len(fewer.rows))] == wanted
    assert sorted(fewer.golds()) == ["0", "1", "2"]
    assert data.bounds == [0, 100] and fewer.bounds == [0, 80]


def test_paths_of_a_configuration_may_be_a_list(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(ROWS))
    (tmp_path / "m").mkdir()
    (tmp_path / "run.yaml").write_text("model: {path: m}\ndata: {path: [a.jsonl, b.jsonl], weights: [3, 1]}\n")
    config = load_config(tmp_path / "run.yaml")
    assert config.data.path == (f"{tmp_path}/a.jsonl", f"{tmp_path}/b.jsonl")
    assert config.data.weights == (3, 1)
