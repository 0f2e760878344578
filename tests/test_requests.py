"""Bad requests to `a3po train`: exit code 2 and one message that says what is wrong, before any rank or run folder."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from a3po_megatron import cli
from a3po_megatron.errors import RunFailed
from a3po_megatron.launch import local
from tests.distributed import cases_requests
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import VOCAB, make_checkpoint, save_tokenizer

STARTED = "the ranks would start now"


@dataclass
class Place:
    """A folder with a sound request in it: configuration, model and data. Tests spoil one of them."""

    folder: Path
    options: dict[str, Any]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def rows(self) -> Path:
        return self.folder / "rows.jsonl"

    @property
    def config(self) -> Path:
        return self.folder / "request.yaml"

    def write(self) -> None:
        self.config.write_text(yaml.safe_dump(self.options, sort_keys=False))

    def set(self, section: str, **options: Any) -> None:
        self.options.setdefault(section, {}).update(options)
        self.write()

    def alter_model(self, **fields: Any) -> None:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    def replace_model(self, **changes: Any) -> None:
        shutil.rmtree(self.model)
        make_checkpoint(self.model, **changes)

    def alter_weights(self, change: Callable[[dict[str, Any]], Any]) -> None:
        tensors = load_file(self.model / "model.safetensors")
        change(tensors)
        save_file(tensors, self.model / "model.safetensors")


@dataclass
class Ended:
    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint") / "model")


@pytest.fixture
def place(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    work = tmp_path / "work"  # where runs/ would appear
    work.mkdir()
    monkeypatch.chdir(work)
    shutil.copytree(checkpoint, tmp_path / "model")
    found = Place(
        tmp_path,
        {
            "model": {"path": "model"},
            "data": {"path": "rows.jsonl", "template": "raw"},
            "parallel": {"tensor": 2},
            "rollout": {"max_prompt_tokens": 16, "max_tokens": 32},
            "trainer": {"steps": 2, "prompts_per_step": 4, "mini_batches": 2},
        },
    )
    found.write()
    rows = [{"id": f"row-{n}", "problem": f"{n}+{n}=", "answer": 2 * n} for n in range(6)]
    found.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return found


@pytest.fixture
def a3po(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ended]:
    """`a3po …` in this process, up to the point where ranks would start."""

    def would_start(*_: object) -> None:
        raise RunFailed(STARTED)

    monkeypatch.setattr(local, "run_local", would_start)

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["a3po", *map(str, words)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        streams = capfd.readouterr()
        return Ended(int(caught.value.code or 0), streams.out, streams.err)

    return call


def assert_one_message(ended: Ended, *named: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("error:") == 1, ended
    assert ended.out == ""
    assert "Traceback" not in ended.err
    assert STARTED not in ended.err
    for words in named:
        assert words in ended.err


def assert_refused(place: Place, a3po: Callable[..., Ended], *named: str) -> None:
    """Refused, with and without a run folder of one's choice; none is left behind."""
    before = set(place.folder.rglob("*"))
    assert_one_message(a3po("train", place.config), *named)
    assert_one_message(a3po("train", place.config, "--run-dir", place.folder / "chosen"), *named)
    assert set(place.folder.rglob("*")) == before


def test_the_request_that_all_cases_spoil_is_sound(place: Place, a3po: Callable[..., Ended]) -> None:
    ended = a3po("train", place.config, "--run-dir", place.folder / "chosen")
    assert ended.code == 1
    assert STARTED in ended.err
    assert (place.folder / "chosen" / "config.yaml").exists()


# --- options -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "options", "named"),
    [
        ("trainer", {"stesp": 3}, ["request.yaml:", "trainer.stesp", "did you mean trainer.steps?"]),
        ("trainer", {"steps": "soon"}, ["request.yaml:", "trainer.steps", "'soon'"]),
        ("optimizer", {"momentum": 0.9}, ["request.yaml:", "optimizer.momentum has no effect", "optimizer.name"]),
        ("parallel", {"tensor": 3}, ["parallel.tensor = 3", "num_attention_heads = 4"]),
        ("parallel", {"tensor": 4}, ["parallel.tensor = 4", "num_key_value_heads = 2"]),
        ("parallel", {"virtual": 2}, ["parallel.virtual = 2", "parallel.pipeline > 1"]),
        ("parallel", {"virtual": 2, "pipeline": 2}, ["parallel.virtual = 4 chunks", "2 layers"]),
        ("parallel", {"expert": 2}, ["parallel.expert = 2", "no experts"]),
        ("rollout", {"expert": 2}, ["rollout.expert = 2", "no experts"]),
        ("rollout", {"routing_replay": True}, ["rollout.routing_replay: true", "no experts"]),
        ("rollout", {"tensor": 4}, ["rollout.tensor = 4", "2 ranks"]),
        ("rollout", {"data": 3}, ["rollout.data = 3", "2 engines"]),
        ("rollout", {"max_tokens": 241}, ["257", "256", "rollout.max_tokens", "max_position_embeddings"]),
        ("rollout", {"kv_cache_bytes": 10_000}, ["rollout.kv_cache_bytes = 10000", "48 tokens"]),
        ("trainer", {"mini_batches": 5}, ["trainer.mini_batches = 5", "trainer.prompts_per_step = 4"]),
        ("lr_schedule", {"warmup_steps": 2}, ["lr_schedule.warmup_steps = 2", "trainer.steps = 2"]),
        ("optimizer", {"name": "sgd", "distributed": True}, ["request.yaml:", "optimizer.distributed", "False"]),
        (
            "trainer",
            {"mini_batches": 16, "mini_batch_prompts": 5},
            ["trainer.mini_batch_prompts = 5", "trainer.prompts_per_step = 4"],
        ),
        ("reward", {"correct": 0.0}, ["reward.correct = 0", "reward.wrong = 0"]),
        ("reward", {"overlong_tokens": 33}, ["reward.overlong_tokens = 33", "rollout.max_tokens = 32"]),
        ("data", {"template": "chat"}, ["data.template", "chat template"]),
        ("data", {"path": "nowhere.jsonl"}, ["request.yaml:", "data.path", "nowhere.jsonl"]),
        ("model", {"path": "nowhere"}, ["request.yaml:", "model.path", "nowhere"]),
    ],
    ids=lambda value: "-".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_an_option_that_cannot_work_is_refused_by_name(
    place: Place, a3po: Callable[..., Ended], section: str, options: dict[str, Any], named: list[str]
) -> None:
    place.set(section, **options)
    assert_refused(place, a3po, *named)


@pytest.mark.parametrize(
    ("sizes", "parallel", "rollout", "named"),
    [
        ({}, {"tensor": 2}, {}, ["parallel.tensor = 2", "parallel.sequence: true"]),
        # Seen: after two updates the copies of an expert on tensor neighbours differed.
        (
            {},
            {"tensor": 2, "sequence": True, "expert_tensor": 1},
            {},
            ["parallel.expert_tensor = 1", "parallel.tensor = 2", "parallel.expert > 1"],
        ),
        ({"hidden_size": 48}, {"data": 2}, {}, ["hidden_size 48", "multiple of 32"]),
        ({}, {"data": 2}, {"expert": 2}, ["rollout.expert = 2", "rollout.tensor = 1"]),
        ({}, {"data": 3, "expert": 3}, {}, ["parallel.expert = 3", "num_experts = 4"]),
        (
            {"moe_intermediate_size": 33},
            {"data": 2},
            {"tensor": 2},
            ["rollout.tensor = 2", "moe_intermediate_size = 33"],
        ),
        ({"num_experts": 3}, {"data": 2}, {"tensor": 2, "expert": 2}, ["rollout.expert = 2", "num_experts = 3"]),
    ],
)
def test_a_layout_that_a_mixture_of_experts_cannot_have_is_refused_by_name(
    place: Place,
    a3po: Callable[..., Ended],
    sizes: dict[str, int],
    parallel: dict[str, Any],
    rollout: dict[str, Any],
    named: list[str],
) -> None:
    place.replace_model(kind="qwen3_moe", **{"hidden_size": 64, "moe_intermediate_size": 32} | sizes)
    place.options["parallel"] = {}
    place.set("parallel", **parallel)
    place.set("rollout", **rollout)
    assert_refused(place, a3po, *named)


@pytest.mark.parametrize(
    ("experts", "rollout", "extra", "named"),
    [
        (257, {}, {}, ["at most 256 experts", "has 257"]),
        (4, {"tensor": 2}, {}, ["rollout.tensor = 1, not 2"]),
        (4, {}, {"moe_router_fusion": True}, ["megatron.extra.moe_router_fusion"]),
        (256, {}, {}, ["vLLM cannot say", "(cpu)"]),
    ],
)
def test_routing_replay_is_refused_where_it_cannot_work(
    place: Place,
    a3po: Callable[..., Ended],
    experts: int,
    rollout: dict[str, Any],
    extra: dict[str, Any],
    named: list[str],
) -> None:
    place.replace_model(kind="qwen3_moe", hidden_size=64, moe_intermediate_size=32, num_experts=experts)
    place.options["parallel"] = {}
    place.set("parallel", data=2)
    place.set("megatron", extra=extra)
    place.set("rollout", **rollout)
    place.set("rollout", routing_replay=True)
    assert_refused(place, a3po, "rollout.routing_replay: true", *named)


def test_the_longest_context_that_the_model_has_is_accepted(place: Place, a3po: Callable[..., Ended]) -> None:
    place.set("rollout", max_tokens=240)  # and 16 prompt tokens: 256
    assert STARTED in a3po("train", place.config).err


def test_a_context_that_yarn_stretches_ends_where_vllm_and_the_config_let_it(
    place: Place, a3po: Callable[..., Ended]
) -> None:
    yarn = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    place.alter_model(rope_parameters=None, rope_theta=1e4, rope_scaling=yarn)
    place.set("rollout", max_tokens=48)  # and 16 prompt tokens: 64
    assert STARTED in a3po("train", place.config).err
    place.set("rollout", max_tokens=49)
    assert_refused(place, a3po, "65", "context of 64", "max_position_embeddings", "YaRN's factor")
    place.alter_model(rope_scaling=yarn | {"factor": 64.0})
    place.set("rollout", max_tokens=241)
    assert_refused(place, a3po, "257", "context of 256")


def test_an_engine_may_have_more_ranks_than_kv_heads_where_one_number_divides_the_other(
    place: Place, a3po: Callable[..., Ended]
) -> None:
    place.replace_model(num_attention_heads=12, num_key_value_heads=4)
    for tensor, taken in ((1, True), (2, True), (4, True), (12, True), (6, False), (3, False), (8, False)):
        place.set("parallel", tensor=1, data=tensor)
        place.set("rollout", tensor=tensor)
        if taken:
            assert STARTED in a3po("train", place.config).err, tensor
        else:
            name = "num_attention_heads = 12" if tensor == 8 else "num_key_value_heads = 4"
            assert_refused(place, a3po, f"rollout.tensor = {tensor}", name)
    place.set("parallel", data=12)
    place.set("rollout", tensor=12)
    # Keys and values, layers, one head on each rank, head_dim, float32, prompt and response.
    needed = 2 * 2 * 1 * 32 * 4 * (16 + 32)
    place.set("rollout", kv_cache_bytes=needed)
    assert STARTED in a3po("train", place.config).err
    place.set("rollout", kv_cache_bytes=needed - 1)
    assert_refused(place, a3po, f"rollout.kv_cache_bytes = {needed - 1}", f"{needed} bytes")


def test_a_quantised_model_or_one_in_another_form_is_refused_before_ranks_start_and_fused_experts_are_taken(
    place: Place, a3po: Callable[..., Ended]
) -> None:
    place.alter_model(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]})
    assert_refused(place, a3po, "fp8", "import, export it first")
    place.alter_model(quantization_config={"quant_method": "awq"})
    assert_refused(place, a3po, "quantization_config", "awq")
    place.alter_model(quantization_config=None)
    place.alter_weights(lambda tensors: [tensors.update({f"module.{n}": tensors.pop(n)}) for n in list(tensors)])
    assert_refused(place, a3po, "module.model.embed_tokens.weight", "DDP")
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    assert_refused(place, a3po, "pytorch_model.bin", "pickled", "save_pretrained")
    place.replace_model(kind="qwen3_moe", hidden_size=64)
    AutoModelForCausalLM.from_pretrained(place.model).save_pretrained(place.model, save_original_format=False)
    assert any("gate_up_proj" in name for name in load_file(place.model / "model.safetensors"))
    place.set("parallel", tensor=1, data=2)
    assert STARTED in a3po("train", place.config).err


def test_a_bad_set_is_refused_by_name(place: Place, a3po: Callable[..., Ended]) -> None:
    assert_one_message(a3po("train", place.config, "--set", "rollout.temprature=1"), "rollout.temperature", "--set")
    assert_one_message(a3po("train", place.config, "--set", "rollout.temperature"), "section.key=value")
    assert not list(Path.cwd().iterdir())


def test_a_missing_or_empty_configuration_is_refused(place: Place, a3po: Callable[..., Ended]) -> None:
    place.config.write_text("")
    assert_refused(place, a3po, str(place.config), "empty")
    place.config.unlink()
    assert_refused(place, a3po, str(place.config))


def test_a_port_in_use_is_refused(place: Place, a3po: Callable[..., Ended]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        place.set("cluster", port=port)
        assert_refused(place, a3po, f"cluster.port = {port}", "in use")
    assert STARTED in a3po("train", place.config).err, "once it is free the request is sound"


# --- the model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spoil", "named"),
    [
        (lambda p: (p.model / "config.json").unlink(), ["config.json"]),
        (lambda p: (p.model / "config.json").write_text("{"), ["config.json", "not valid JSON"]),
        (lambda p: (p.model / "model.safetensors").unlink(), ["model.safetensors"]),
        (lambda p: (p.model / "model.safetensors").write_bytes(b"\0" * 100), ["model.safetensors"]),
        (lambda p: p.alter_weights(lambda t: t.pop("model.norm.weight")), ["lacks model.norm.weight"]),
        (lambda p: p.alter_model(intermediate_size=96), ["mlp.gate_proj.weight", "(80, 48)", "(96, 48)"]),
        (lambda p: p.alter_model(architectures=["MistralForCausalLM"]), ["MistralForCausalLM", "Qwen3ForCausalLM"]),
        (lambda p: p.alter_model(use_sliding_window=True), ["use_sliding_window"]),
        (lambda p: p.replace_model(head_dim=48), ["head_dim 48", "64"]),
        (lambda p: [file.unlink() for file in p.model.glob("tokenizer*")], ["tokenizer"]),
        (lambda p: (p.model / "tokenizer.json").write_text("{"), ["tokenizer cannot be read"]),
        (lambda p: save_tokenizer(p.model, VOCAB + 1), [f"id {VOCAB}", f"has {VOCAB}"]),
        (lambda p: p.alter_model(eos_token_id=VOCAB), [f"eos_token_id {VOCAB}"]),
    ],
    ids=[
        "no config",
        "broken config",
        "no weights",
        "broken weights",
        "a tensor missing",
        "weights of another shape",
        "another architecture",
        "sliding window",
        "head_dim",
        "no tokenizer",
        "broken tokenizer",
        "tokenizer too large",
        "no such end token",
    ],
)
def test_a_model_that_cannot_be_used_is_refused(
    place: Place, a3po: Callable[..., Ended], spoil: Callable[[Place], Any], named: list[str]
) -> None:
    spoil(place)
    assert_refused(place, a3po, str(place.model), *named)


# --- the data ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"problem": "7+7=", "answer"', "not valid JSON"),
        ('{"problem": "7+7="}', "'answer'"),
        ('{"problem": "", "answer": 14}', "'problem'"),
        ('{"problem": "2+2=", "answer": 5}', "line 3 with another gold answer, here '5'"),
        ('{"id": "row-2", "problem": "7+7=", "answer": 14}', "line 3"),
        ('{"problem": "1+1+1+1+1+1+1+1+1=", "answer": 9}', "18 tokens"),
    ],
    ids=["malformed", "no answer", "empty problem", "two gold answers", "duplicate id", "too long"],
)
def test_a_bad_prompt_is_refused_with_file_and_line(
    place: Place, a3po: Callable[..., Ended], line: str, named: str
) -> None:
    place.rows.write_text(place.rows.read_text() + line + "\n")
    assert_refused(place, a3po, f"{place.rows}:7: ", named)


def test_empty_data_is_refused(place: Place, a3po: Callable[..., Ended]) -> None:
    place.rows.write_text("\n")
    assert_refused(place, a3po, str(place.rows), "no prompts")


# --- the program as users start it -----------------------------------------------------------------------------------


def program(place: Place, *words: str) -> Ended:
    command = [sys.executable, "-m", "a3po_megatron", "train", str(place.config), *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def test_the_program_refuses_a_mistyped_option(place: Place) -> None:
    assert_one_message(program(place, "--set", "shaping.fractoin=0.5"), "did you mean shaping.fraction?")
    assert not list(Path.cwd().iterdir())


@pytest.mark.soak  # what it says is shown above, and that a program says no more by the one before
def test_the_program_refuses_a_problem_with_two_gold_answers(place: Place) -> None:
    place.rows.write_text(place.rows.read_text() + '{"problem": "2+2=", "answer": 5}\n')
    assert_one_message(program(place), f"{place.rows}:7: ", "line 3")
    assert not list(Path.cwd().iterdir())


def test_pass_through_options_that_the_libraries_lack_or_that_are_ours_are_refused_by_name(place: Place) -> None:
    cases = {
        "megatron.extra.attention_softmax_in_fp23=true": "did you mean attention_softmax_in_fp32?",
        "megatron.extra.moe_enable_routing_replay=true": "follows from the model and the other options",
        "rollout.engine_args.enable_return_routed_experts=true": "follows from the model and the other options",
        "megatron.extra.num_layers=3": "follows from the model and the other options",
        "megatron.extra.tensor_model_parallel_size=1": "follows from the model and the other options",
        "rollout.engine_args.max_num_batched_token=64": "did you mean max_num_batched_tokens?",
        "rollout.engine_args.max_model_len=64": "follows from the model and the other options",
        "rollout.engine_args.seed=1": "follows from the model and the other options",
    }
    asked = json.dumps([str(place.config), str(Path.cwd()), *cases])
    with mock.patch.dict(os.environ, {cases_requests.REQUEST: asked}):
        (found,) = run_ranks(1, cases_requests.refused, own=True)["refused"]  # which changes what it is started as
    for (override, words), (code, said) in zip(cases.items(), found, strict=True):
        (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
        assert code == 2 and line.startswith(f"error: {override.partition('=')[0]}: "), said
        assert words in line
        assert "Traceback" not in said
    assert not list(Path.cwd().iterdir())
