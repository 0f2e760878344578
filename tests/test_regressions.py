"""Faults that were found once, each with the behaviour that was promised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from a3po_megatron.config import DataOptions, load_config
from a3po_megatron.data.prompts import read_rows
from a3po_megatron.errors import RequestError
from a3po_megatron.model.family import family_of, read_family
from a3po_megatron.schedule.packing import pack
from a3po_megatron.weights.load import check_checkpoint
from tests.tiny import make_checkpoint

LEAST = "model: {path: .}\ndata: {path: builtin:arithmetic}\n"


def test_one_item_above_the_limit_does_not_raise_the_limit_of_the_others() -> None:
    assert pack([100, 50, 40], 60) == [[0], [1], [2]]
    assert pack([250, 100, 100, 50], 100) == [[0], [1], [2], [3]]


def test_an_index_that_names_the_wrong_file_is_refused_by_tensor_and_file(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, folder / file)
    where = {name: file for file, part in halves.items() for name in part}
    where[names[0]] = "b.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(RequestError, match=rf"b.safetensors: {names[0]} is said to be in this file"):
        check_checkpoint(folder, read_family(folder))


@pytest.mark.parametrize(
    ("text", "overrides", "said"),
    [
        ("megatron: {extra: null}", ["megatron.extra.a=1"], None),
        ("publish: {canary_prompts: 0, canary_bound: null}", [], None),
        ("reward: {overlong_penalty: 1.0}", [], None),  # the default, as a saved configuration holds it
        ("", ["trainer.lr=1"], "did you mean optimizer.lr?"),
        ("", ["trainer.steps=true"], "trainer.steps: .*true or false"),
        ("", ["shaping.rho=true"], "shaping.rho: .*true or false"),
        ("x: &x {y: *x}", [], "alias"),
        ("", ["rollout.engine_args.x=.inf"], "rollout.engine_args"),
    ],
)
def test_settings(tmp_path: Path, text: str, overrides: list[str], said: str | None) -> None:
    (tmp_path / "c.yaml").write_text(f"{LEAST}{text}\n")
    if said is None:
        load_config(tmp_path / "c.yaml", overrides)
        return
    with pytest.raises(RequestError, match=said):
        load_config(tmp_path / "c.yaml", overrides)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (b'{"problem": "\xff", "answer": "1"}', ":2: not UTF-8"),
        (b'{"problem": "\\ud800", "answer": "1"}', ":2: .*surrogate"),
        (b"[" * 100_000, ":2: nested too deeply"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, row: bytes, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"problem": "a", "answer": "1", "id": 0}\n' + row + b"\n")
    with pytest.raises(RequestError, match=said):
        read_rows(DataOptions(path=str(path)))


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "1", "id": 0}\n')
    assert read_rows(DataOptions(path=str(path)))[0][0] == "0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "does not divide"),
        ({"head_dim": None}, "head_dim is missing"),
        ({"num_key_value_heads": None}, "num_key_value_heads is missing"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta = 'much'"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(RequestError, match=said):
        family_of(config, "config.json")
