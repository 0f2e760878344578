"""Faults that were found once, each with the behaviour that was promised."""

from __future__ import annotations

import json
import math
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from a3po_megatron import compat
from a3po_megatron.algorithm.sums import largest_of_each
from a3po_megatron.config import AdamOptions, CosineSchedule, DataOptions, load_config
from a3po_megatron.data.load import load
from a3po_megatron.errors import RequestError
from a3po_megatron.files.cache import Cache
from a3po_megatron.launch.local import rendezvous
from a3po_megatron.learner.vocab_parallel import logprob_and_entropy
from a3po_megatron.model.read import facts_of, read_facts
from a3po_megatron.reward.math import grade
from a3po_megatron.schedule.packing import pack
from a3po_megatron.weights.load import check_checkpoint
from tests.harness.tiny_models import make_checkpoint

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
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    with pytest.raises(RequestError, match=rf"b.safetensors: {names[0]} is said to be in this file"):
        check_checkpoint(folder, read_facts(folder))


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
        (b'{"problem": "b", "problem": "c", "answer": "1"}', ":2: .*stands twice"),
        (b'{"problem": "b", "answer": NaN}', ":2: .*NaN"),
        (b'{"problem": "b", "answer": 1e999}', ":2: .*'answer'"),
        (b'{"problem": " a ", "answer": "2"}', ":2: the problem stands in line 1 with another gold"),
    ],
)
def test_a_row_that_cannot_be_read_is_named_by_its_line(tmp_path: Path, row: bytes, said: str) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(b'{"problem": "a", "answer": "1", "id": 0}\n' + row + b"\n")
    with pytest.raises(RequestError, match=said):
        load(DataOptions(path=str(path)), Cache())


def test_an_id_of_zero_is_an_id(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"problem": "a", "answer": "1", "id": 0}\n')
    assert load(DataOptions(path=str(path)), Cache()).rows[0].id == "0"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"num_attention_heads": 0}, "num_attention_heads = 0"),
        ({"num_attention_heads": 5, "num_key_value_heads": 2}, "does not divide"),
        ({"head_dim": None}, "head_dim = None"),
        ({"num_key_value_heads": 3}, "num_key_value_heads = 3 does not divide"),
        ({"rope_parameters": {"rope_theta": "much"}}, "rope_theta = 'much'"),
        ({"rope_scaling": [1]}, r"rope_scaling = \[1\]"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused_by_field(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    folder = make_checkpoint(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text()) | change
    with pytest.raises(RequestError, match=said):
        facts_of(config, "config.json")


@pytest.mark.parametrize("pull", [2.0, -3.0])
def test_an_impossible_token_keeps_finite_gradients_whatever_the_gradient_of_the_entropy(pull: float) -> None:
    logits = torch.randn(5, 7)
    logits[:, 3] = float("-inf")
    logits.requires_grad_()
    _, entropy = logprob_and_entropy(logits, torch.zeros(5, dtype=torch.int64), None)
    (pull * entropy).sum().backward()
    assert torch.isfinite(logits.grad).all()


def test_a_nan_among_the_largest_is_never_lost() -> None:
    assert math.isnan(largest_of_each([[0.1], [float("nan")], [0.2]])[0])


def test_the_last_step_of_a_decay_still_trains() -> None:
    compat.prepare()
    from a3po_megatron.learner.optimizer import schedule_of

    parameter = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "default_config": True, "is_decoupled_lr": False}], lr=1.0)
    schedule = schedule_of(optimizer, AdamOptions(lr=1.0), CosineSchedule(warmup_steps=1), steps=3)
    rates = []
    for _ in range(3):
        schedule.step(increment=1)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[0] == 1.0
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] > 0


def test_a_port_in_time_wait_is_free_and_one_that_listens_is_not() -> None:
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's store does
        listening.bind(("127.0.0.1", 0))
        listening.listen()
        port = listening.getsockname()[1]
        with pytest.raises(RequestError, match="in use"):
            rendezvous(port)
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listening.accept()
            server.close()  # this side closes first: its end of the connection goes to TIME_WAIT
            client.recv(1)
    with rendezvous(port) as found:
        assert found.getsockname()[1] == port


def test_an_escaped_percent_sign_is_a_percent_sign() -> None:
    for response in ("\\boxed{50\\%}", "\\boxed{50%}"):
        assert grade(response, "0.5").outcome == "correct", response
