"""Settings: every mistake is named with its place and the nearest valid name, and what was read is what is kept."""

from __future__ import annotations

import itertools
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from a3po_megatron.config import AdamOptions, Config, Settings, TrainerOptions, load_config, load_resolved, resolve
from a3po_megatron.config.alerts import THRESHOLDS
from a3po_megatron.config.describe import options
from a3po_megatron.config.fields import SECTIONS, kinds, known_options
from a3po_megatron.config.nearest import SYNONYMS
from a3po_megatron.config.renamed import NULL_WAS, RENAMED
from a3po_megatron.errors import RequestError
from a3po_megatron.ranks.backend import CPU, Backend, backend_of
from a3po_megatron.run.folder import save_resolved
from tests.harness.ranks import ROOT

PAIRS = [[ROOT / f"configs/{name}.yaml", ROOT / f"configs/{name}-dapo.yaml"] for name in ("demo", "arithmetic")]
LEAST = {"model.path": "m", "data.path": "rows.jsonl"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder in which `model.path: m` and `data.path: rows.jsonl` exist."""
    (tmp_path / "m").mkdir()
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1", "answer": "2"}\n')
    return tmp_path


def nested(options: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for option, value in options.items():
        section, _, name = option.partition(".")
        if name:
            tree.setdefault(section, {})[name] = value
        else:
            tree[section] = value
    return tree


def write(folder: Path, options: dict[str, Any], name: str = "c.yaml") -> Path:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(yaml.safe_dump(nested(options), sort_keys=False))
    return path


def read(folder: Path, options: dict[str, Any], *overrides: str) -> Config:
    return load_config(write(folder, LEAST | options), overrides)


def resolved(config: Config, backend: Backend = CPU, ranks: int | None = None) -> Settings:
    """With a model of five layers."""
    return resolve(config, SimpleNamespace(layers=5), backend, ranks)


def refusal(path: Path, *overrides: str) -> str:
    with pytest.raises(RequestError) as caught:
        load_config(path, overrides)
    assert caught.value.exit_code == 2
    return str(caught.value)


def value_of(config: Config, option: str) -> Any:
    """None where the section is another one of several, which has no such option."""
    section, _, name = option.partition(".")
    return getattr(getattr(config, section), name, None)


# --- mistakes in a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line", "unknown", "nearest"),
    [
        ("trainer:\n  seed: 1\n  stesp: 4\n", 5, "trainer.stesp", "trainer.steps"),
        ("rollout:\n  temprature: 1.0\n", 4, "rollout.temprature", "rollout.temperature"),
        ("learner:\n  micro_batch_size: 4\n", 4, "learner.micro_batch_size", "learner.micro_batch_tokens"),
        ("trainr:\n  steps: 4\n", 3, "trainr", "trainer"),
        ("seed: 4\n", 3, "seed", "trainer.seed"),
        ("shaping: {fraction: 0.5, rhoo: 2.0}\n", 3, "shaping.rhoo", "shaping.rho"),
    ],
)
def test_an_unknown_option_is_named_with_file_line_and_nearest_valid_option(
    folder: Path, text: str, line: int, unknown: str, nearest: str
) -> None:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: rows.jsonl}\n" + text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert f"unknown option {unknown};" in message
    assert message.endswith(f"did you mean {nearest}?")


def test_every_option_is_the_nearest_one_to_itself_with_two_letters_swapped(folder: Path) -> None:
    known, missed = known_options(), {}
    for option in known:
        section, _, name = option.rpartition(".")
        typo = ".".join(filter(None, (section, name[:1] + name[2:3] + name[1:2] + name[3:])))
        if len(name) < 4 or typo in known:
            continue
        message = refusal(write(folder, LEAST | {typo: 1}))
        if not message.endswith(f"did you mean {option}?"):
            missed[typo] = message
    assert not missed


def test_a_duplicate_key_is_named_with_both_lines(folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: rows.jsonl}\ntrainer:\n  steps: 5\n  seed: 1\n  steps: 6\n")
    assert refusal(path) == f"{path}:6: trainer.steps is given twice (first in line 4)"
    path.write_text("model: {path: m}\ndata: {path: rows.jsonl}\ntrainer: {steps: 5}\ntrainer: {seed: 6}\n")
    assert refusal(path) == f"{path}:4: trainer is given twice (first in line 3)"
    path.write_text("model: {path: m}\ndata: {path: rows.jsonl}\ntrainer: {steps: 5}\ntrainer.steps: 6\n")
    assert refusal(path).startswith(f"{path}:4: trainer.steps is given twice")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("trainer.steps", "many"),
        ("trainer.steps", 0),
        ("trainer.steps", 1.5),
        ("trainer.steps", {"x": 1}),
        ("trainer.rollouts_per_prompt", 1),
        ("trainer.seed", -1),
        ("shaping.fraction", 0.0),
        ("shaping.fraction", 1.01),
        ("shaping.rho", 0.0),
        ("shaping.metric", "confidence"),
        ("rollout.temperature", 0.0),
        ("rollout.top_k", -2),
        ("objective.clip_low", 1.01),
        ("regulariser.kl", -0.1),
        ("regulariser.estimator", "k4"),
        ("regulariser.place", "advantage"),
        ("objective.dual_clip", 1.0),
        ("optimizer.lr", float("nan")),
        ("optimizer.lr", float("inf")),
        ("optimizer.name", "adamw8bit"),
        ("model.dtype", "float16"),
        ("data.template", "llama"),
        ("data.shuffle", "perhaps"),
        ("cluster.port", 80),
        ("cluster.port", 65536),
        ("reward.max_invalid_rate", 1.5),
        ("telemetry.texts_per_step", -1),
        ("parallel.tensor", 0),
    ],
)
def test_a_wrong_type_or_range_is_named_with_place_option_and_value(folder: Path, option: str, value: Any) -> None:
    path = write(folder, LEAST | {option: value})
    name = option.partition(".")[2]
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if text.strip().startswith(f"{name}:"))
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: {option}: ")
    shown = value[-1] if isinstance(value, list) and len(value) == 2 else value
    assert f"(got {shown!r})" in message


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "a b"])
def test_a_run_name_that_cannot_be_a_folder_is_refused(folder: Path, name: str) -> None:
    path = write(folder, LEAST | {"name": name})
    assert refusal(path).startswith(f"{path}:5: name: ")


def test_numbers_as_people_write_them_are_read(folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_text("model: {path: m}\ndata: {path: rows.jsonl}\noptimizer: {lr: 2e-4, eps: 1.0e-9}\n")
    config = load_config(path)
    assert (config.optimizer.lr, config.optimizer.eps) == (2e-4, 1e-9)  # YAML 1.1 takes 2e-4 for text


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "empty"),
        ("# nothing but a comment\n", "empty"),
        ("- model\n", "expected sections"),
        ("model: m\n", "c.yaml:1: model is a section"),
        ("model: {path: m\n", "not valid YAML"),
        ("model:\n\tpath: m\n", "not valid YAML"),
        ("data: {path: rows.jsonl}\n", "model.path"),
        ("model: {path: m}\n", "data.path"),
        ("model: {dtype: float32}\ndata: {path: rows.jsonl}\n", "model.path"),
        ("model: {path: null}\ndata: {path: rows.jsonl}\n", "model.path"),
    ],
)
def test_a_file_that_is_no_configuration_says_so_in_one_line(folder: Path, text: str, says: str) -> None:
    path = folder / "c.yaml"
    path.write_text(text)
    message = refusal(path)
    assert says in message
    assert "\n" not in message


def test_a_file_that_cannot_be_read_is_named(folder: Path) -> None:
    assert str(folder / "none.yaml") in refusal(folder / "none.yaml")
    assert str(folder) in refusal(folder)
    (folder / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    assert str(folder / "latin.yaml") in refusal(folder / "latin.yaml")


# --- base --------------------------------------------------------------------------------------------------------


def test_a_file_overrides_its_base_option_by_option_through_several_files(folder: Path) -> None:
    write(folder, LEAST | {"trainer.steps": 5, "trainer.seed": 1, "shaping.rho": 3.0}, "a.yaml")
    write(folder, {"base": "a.yaml", "trainer.seed": 2, "trainer.mini_batches": 4}, "b.yaml")
    config = load_config(write(folder, {"base": "b.yaml", "trainer.mini_batches": 8}))
    assert (config.trainer.steps, config.trainer.seed, config.trainer.mini_batches) == (5, 2, 8)
    assert config.shaping.rho == 3.0


def test_null_takes_an_option_or_a_whole_section_of_the_base_back_to_its_default(folder: Path) -> None:
    write(folder, LEAST | {"trainer.steps": 5, "trainer.seed": 7, "optimizer.lr": 0.5, "shaping.decay": 0.1}, "a.yaml")
    config = load_config(write(folder, {"base": "a.yaml", "trainer.steps": None, "optimizer": None}))
    plain = read(folder, {})
    assert config.trainer.steps == plain.trainer.steps
    assert config.trainer.seed == 7
    assert config.optimizer == plain.optimizer
    assert config.shaping.decay == 0.1


def test_what_is_off_says_so_and_null_never_does(folder: Path) -> None:
    config = read(folder, {"objective.dual_clip": 0, "correction.name": "none"})
    assert config.objective.dual_clip == 0
    assert config.correction.name == "none"
    assert "null is no longer off, which is 0 now" in refusal(write(folder, LEAST | {"objective.dual_clip": None}))
    for option in known_options():  # else it is as if it had not been written
        if option not in (*LEAST, *NULL_WAS, "model", "data"):
            assert read(folder, {option: None}) == read(folder, {}), option


@pytest.mark.parametrize("old", RENAMED)
def test_an_option_that_was_renamed_answers_with_its_new_name(folder: Path, old: str) -> None:
    assert old not in known_options()
    new = RENAMED[old].partition(",")[0]
    assert new in known_options()
    path = write(folder, LEAST | {old: 1})
    assert refusal(path).startswith(f"{path}:") and f"{old} is now {new}" in refusal(path)
    assert refusal(write(folder, LEAST), f"{old}=1") == f"--set {old}: {old} is now {RENAMED[old]}"


@pytest.mark.parametrize("section", [section for section in SECTIONS if len(kinds(section)) > 1])
def test_a_section_that_may_be_several_is_its_first_where_no_name_is_given_and_takes_no_others_options(
    folder: Path, section: str
) -> None:
    several = {kind.model_fields["name"].default: kind for kind in kinds(section)}
    assert getattr(read(folder, {}), section) == kinds(section)[0]()
    wanted = {
        name: {option: "http://host" for option, field in kind.model_fields.items() if field.is_required()}
        for name, kind in several.items()
    }
    for name, kind in several.items():
        chosen = {f"{section}.{option}": value for option, value in {"name": name, **wanted[name]}.items()}
        assert getattr(read(folder, chosen), section) == kind(**wanted[name])
    choices = " or ".join(f"'{name}'" for name in several)
    assert f"{section}.name: Input should be {choices} (got 'x')" in refusal(write(folder, LEAST), f"{section}.name=x")
    for (name, mine), (_, theirs) in itertools.permutations(several.items(), 2):
        for option in theirs.model_fields.keys() - mine.model_fields.keys():
            own = {f"{section}.{name}": value for name, value in wanted[name].items()}
            path = write(folder, LEAST | own | {f"{section}.name": name, f"{section}.{option}": 1})
            assert f"{section}.{option} has no effect, because {section}.name is {name}" in refusal(path)


def test_an_option_of_the_base_that_null_took_back_is_no_longer_without_effect(folder: Path) -> None:
    write(folder, LEAST | {"shaping.decay": 0.1}, "a.yaml")
    assert "shaping.decay has no effect" in refusal(write(folder, {"base": "a.yaml", "shaping.rho": 1.0}))
    kept = load_config(write(folder, {"base": "a.yaml", "shaping.rho": 1.0, "shaping.decay": None}))
    assert kept.shaping.rho == 1.0


@pytest.mark.parametrize("chain", [["c.yaml"], ["a.yaml", "c.yaml"], ["a.yaml", "b.yaml", "a.yaml"]])
def test_a_circle_of_base_files_is_refused(folder: Path, chain: list[str]) -> None:
    for name, base in zip(["c.yaml", *chain], chain, strict=False):
        write(folder, {"base": base}, name)
    assert "comes back to itself" in refusal(folder / "c.yaml")


def test_a_missing_or_nameless_base_is_refused(folder: Path) -> None:
    assert "none.yaml" in refusal(write(folder, {"base": "none.yaml"}))
    path = write(folder, {"name": "x", "base": ["a.yaml"]})
    assert refusal(path).startswith(f"{path}:2: base ")


def test_a_mistake_in_a_base_is_named_with_the_file_and_line_of_the_base(folder: Path) -> None:
    base = write(folder, LEAST | {"trainer.steps": 0}, "a.yaml")
    assert refusal(write(folder, {"base": "a.yaml", "name": "x"})).startswith(f"{base}:6: trainer.steps: ")


# --- --set -------------------------------------------------------------------------------------------------------


def test_set_goes_over_the_file_and_the_last_set_wins(folder: Path) -> None:
    config = read(
        folder,
        {"trainer.steps": 5, "optimizer.betas": [0.5, 0.5]},
        "trainer.steps=6",
        "trainer.steps = 7",
        "optimizer.betas=[0.1, 0.2]",
        "shaping={rho: 3.0, decay: 0.5}",
        "name=x-1",
    )
    assert config.trainer.steps == 7
    assert config.optimizer.betas == (0.1, 0.2)
    assert (config.shaping.rho, config.shaping.decay) == (3.0, 0.5)
    assert config.name == "x-1"


def test_set_to_null_takes_the_files_value_back_to_the_default(folder: Path) -> None:
    assert read(folder, {"trainer.steps": 5}, "trainer.steps=null").trainer.steps == read(folder, {}).trainer.steps


def test_set_adds_single_entries_to_the_pass_through_options(folder: Path) -> None:
    given = {"rollout.engine_args": {"a": 1, "b": 2}}
    config = read(folder, given, "rollout.engine_args.b=3", "rollout.engine_args.c=x", "megatron.extra.d=[1]")
    assert config.rollout.engine_args == {"a": 1, "b": 3, "c": "x"}
    assert config.megatron.extra == {"d": [1]}


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("trainer.steps", "section.key=value"),
        ("trainer.stesp=3", "did you mean trainer.steps?"),
        ("trainer.steps=[", "not YAML"),
        ("trainer.steps=soon", "(got 'soon')"),
        ("trainer.steps=0", "trainer.steps: "),
        ("trainer=5", "trainer is a section"),
        ("trainer.steps.more=5", "did you mean trainer.steps?"),
        ("=5", "unknown option"),
        ("shaping.rho=1.0", "shaping.decay has no effect"),
    ],
)
def test_a_bad_set_is_refused_and_named(folder: Path, override: str, says: str) -> None:
    path = write(folder, LEAST | {"shaping.decay": 0.1})
    message = refusal(path, override)
    assert says in message
    # What has no effect is the option in the file, and the file is where it must go.
    assert message.startswith(f"{path}:" if "no effect" in says else "--set")


# --- options without effect --------------------------------------------------------------------------------------

UNSHAPED = {"shaping.rho": 1.0}
IDLE: list[tuple[str, Any, dict[str, Any]]] = [
    ("shaping.fraction", 0.5, UNSHAPED),
    ("shaping.decay", 0.1, UNSHAPED),
    ("shaping.origin", 3, UNSHAPED),
    ("shaping.metric", "entropy", UNSHAPED),
    ("shaping.source", "rollout", UNSHAPED),
    ("shaping.rounding", "ceil", UNSHAPED),
    ("shaping.fraction", 0.5, UNSHAPED | {"shaping.rho_negative": 1.0}),
    ("shaping.origin", 3, {"shaping.decay": 0.0}),
    ("shaping.schedule", "cosine", UNSHAPED),
    ("shaping.schedule", "cosine", {"shaping.decay": 0.0}),
    ("shaping.decay", 0.1, {"shaping.schedule": "constant"}),
    ("shaping.origin", 3, {"shaping.schedule": "constant"}),
    ("shaping.positives", "likely", UNSHAPED),
    ("shaping.positives", "likely", UNSHAPED | {"shaping.rho_negative": 2.0}),
    ("shaping.negatives", "unlikely", UNSHAPED),
    ("shaping.negatives", "unlikely", {"shaping.rho_negative": 1.0}),
    ("reward.overlong_penalty", 0.5, {}),
    ("learner.bf16_layers", [1, 1], {}),
    ("rollout.bf16_layers", [1, 1], {}),
    ("publish.canary_tokens", 8, {"publish.canary_prompts": 0}),
    ("publish.canary_bound", 0.1, {"publish.canary_prompts": 0}),
    ("publish.witness_bound", 0.1, {"publish.canary_prompts": 0}),
    ("trainer.mini_batches", 3, {"trainer.prompts_per_step": 8, "trainer.mini_batch_prompts": 2}),
    ("publish.witness_every", 2, {"publish.canary_prompts": 0}),
    ("telemetry.texts_per_step", 2, {"telemetry.rollouts": False}),
    ("alerts.entropy_correct", 0.5, {"alerts.entropy_share": 0.0}),
    ("alerts.window", 5, {f"alerts.{name}": 0.0 for names in THRESHOLDS.values() for name in names}),
    ("alerts.stop", ["mismatch"], {"alerts.mismatch_kl": 0.0, "alerts.mismatch_logprob": 0.0}),
    ("data.problem_field", "question", {"data.path": "builtin:arithmetic"}),
    ("data.answer_field", "solution", {"data.path": "builtin:arithmetic"}),
    ("data.id_field", "name", {"data.path": "builtin:arithmetic"}),
    ("data.grader", "choice", {"data.path": "builtin:arithmetic"}),
    ("data.grader_field", "grader", {"data.path": "builtin:arithmetic"}),
    ("data.shuffle", False, {"data.path": "builtin:arithmetic"}),
    ("shaping.source", "rollout", {"shaping.metric": "entropy"}),
    ("process.weight", 0.0, {"process.name": "spans"}),
    ("process.weight", 0.0, {"process.name": "to_go"}),
    ("data.drop_long_prompts", True, {"data.path": "builtin:arithmetic"}),
    ("data.duplicates", "error", {"data.path": "builtin:arithmetic"}),
    ("data.conflicts", "drop", {"data.path": "builtin:arithmetic"}),
    ("data.unreadable_golds", "drop", {"data.path": "builtin:arithmetic"}),
    ("data.cache", "/tmp", {"data.path": "builtin:arithmetic"}),
    ("data.weights", [1.0, 2.0], {}),
    ("data.template_file", str(Path(__file__).resolve()), {"data.template": "qwen"}),
    ("data.template_arguments", {"enable_thinking": False}, {"data.template": "qwen"}),
    ("data.system", "Be brief.", {"data.template": "raw"}),
    ("advantage.ddof", 0, {"advantage.normalise_std": False}),
    ("advantage.eps", 1e-3, {"advantage.normalise_std": False}),
    ("reward.judge_model", "m", {}),
    ("reward.judge_key_variable", "KEY", {}),
    ("reward.judge_max_tokens", 64, {}),
    ("reward.judge_retries", 1, {}),
    ("reward.judge_timeout_seconds", 3.0, {}),
    ("evaluation.benchmarks", ["gsm8k"], {}),
    ("evaluation.data", str(Path(__file__).resolve().parent), {}),
    ("evaluation.samples", 2, {}),
    ("evaluation.max_tokens", 64, {}),
    ("evaluation.release", "v5", {}),
    ("evaluation.window", "2024-08-01:2025-01-31", {}),
    ("evaluation.keep_best", "gsm8k", {}),
    ("telemetry.profile_kind", "nsys", {}),
    ("telemetry.wandb_entity", "team", {}),
    ("telemetry.wandb_mode", "offline", {}),
    *(
        (f"parallel.{name}", value, {"parallel.layout": "auto"})
        for name, value in {
            **dict.fromkeys(("tensor", "pipeline", "context", "expert", "expert_tensor", "virtual", "data"), 2),
            **{"stages": [1, 1], "sequence": True},
        }.items()
    ),
    ("regulariser.estimator", "k1", {}),
    ("regulariser.place", "reward", {}),
    ("regulariser.entropy_target", 0.5, {}),
    ("regulariser.entropy_step", 0.01, {"regulariser.entropy": 0.001}),
    *(
        ("objective.constant", 64, {"objective.name": name, "objective.normaliser": "tokens"})
        for name in ("clipped", "gspo_token", "cispo", "sapo", "vespo", "reinforce")
    ),
]
# The same options where they do something.
ACTIVE: dict[str, dict[str, Any]] = {
    "reward.overlong_penalty": {"reward.overlong_tokens": 16},
    "data.weights": {"data.path": ["rows.jsonl", "rows.jsonl"]},
    **{
        f"reward.judge_{name}": {"reward.judge_url": "http://127.0.0.1:1/v1"}
        for name in ("model", "key_variable", "max_tokens", "retries", "timeout_seconds")
    },
    **{
        f"evaluation.{name}": {"evaluation.every_steps": 10}
        for name in ("benchmarks", "data", "samples", "max_tokens", "release", "window", "keep_best")
    },
    "process.weight": {"process.name": "spans", "process.polarity": "tokens"},
    "objective.constant": {"objective.normaliser": "constant"},
    **{f"regulariser.{name}": {"regulariser.kl": 0.01} for name in ("estimator", "place")},
    "telemetry.profile_kind": {"telemetry.profile_steps": [1]},
    **{f"telemetry.wandb_{name}": {"telemetry.wandb_project": "rlvr"} for name in ("entity", "mode")},
    "regulariser.entropy_target": {"regulariser.entropy": 0.001},
    "regulariser.entropy_step": {"regulariser.entropy_target": 0.5},
    "learner.bf16_layers": {"learner.precision": "fp8-blockwise"},
    "rollout.bf16_layers": {"rollout.quantization": "fp8_per_block"},
}


def test_the_cases_below_cover_every_declared_rule() -> None:
    rules = [
        (f"{section}.{name}", rule.because)
        for section in SECTIONS
        for kind in kinds(section)
        for rule in kind.without_effect
        for name in rule.options
    ]
    declared = sorted(rules)
    assert len(declared) == len(IDLE) - 1  # one of them twice: rho_negative 1 beside rho 1
    assert {option for option, _ in declared} == {option for option, _, _ in IDLE}


@pytest.mark.parametrize(("option", "value", "beside"), IDLE)
def test_an_explicit_option_without_effect_is_refused_by_name(
    folder: Path, option: str, value: Any, beside: dict[str, Any]
) -> None:
    path = write(folder, LEAST | beside | {option: value})
    message = refusal(path)
    assert message.startswith(f"{path}:")
    assert f"{option} has no effect, because " in message
    assert load_config(write(folder, LEAST | beside)), "the combination is fine once the option is removed"


@pytest.mark.parametrize(("option", "value"), sorted({option: value for option, value, _ in IDLE}.items(), key=str))
def test_the_same_option_is_accepted_where_it_has_an_effect(folder: Path, option: str, value: Any) -> None:
    found = value_of(read(folder, ACTIVE.get(option, {}) | {option: value}), option)
    assert found == (tuple(value) if isinstance(value, list) else value)


def test_shaping_of_the_negatives_alone_is_shaping(folder: Path) -> None:
    assert read(folder, UNSHAPED | {"shaping.rho_negative": 2.0, "shaping.decay": 0.1}).shaping.decay == 0.1


@pytest.mark.parametrize("path", [path for pair in PAIRS for path in pair], ids=lambda path: path.stem)
def test_no_rule_refuses_a_shipped_recipe_or_its_resolved_form(path: Path, tmp_path: Path) -> None:
    settings = resolved(load_config(path))
    save_resolved(settings, tmp_path / "config.yaml")
    assert load_resolved(tmp_path / "config.yaml") == settings
    assert resolved(load_config(tmp_path / "config.yaml")) == settings, "it can be asked for again"


@pytest.mark.parametrize(
    ("device", "asked", "found"),
    [
        ("cpu", None, "float32"),
        ("cuda", None, "bfloat16"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cuda", "float32", "float32"),
    ],
)
def test_the_dtype_is_the_devices_unless_it_was_given(device: Any, asked: str | None, found: str, folder: Path) -> None:
    config = read(folder, {} if asked is None else {"model.dtype": asked})
    assert config.model.dtype == asked
    assert resolved(config, backend_of(device)).model.dtype == found


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[0].stem)
def test_the_two_recipes_of_an_example_differ_in_shaping_alone(pair: list[Path]) -> None:
    shaped, plain = (load_config(path).model_dump() for path in pair)
    assert plain["shaping"] == {"name": "none"} and shaped["shaping"]["rho"] > 1
    for tree in (shaped, plain):
        del tree["name"], tree["shaping"]
    assert shaped == plain


# --- paths -------------------------------------------------------------------------------------------------------


def test_a_path_is_looked_for_beside_the_file_that_sets_it_and_then_in_the_current_directory(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = folder / "elsewhere"
    (elsewhere / "m").mkdir(parents=True)
    (elsewhere / "only-here").mkdir()
    monkeypatch.chdir(elsewhere)
    assert read(folder, {}).model.path == str(folder / "m")
    assert read(folder, {"model.path": "only-here"}).model.path == str(elsewhere / "only-here")
    assert read(folder, {}, "model.path=m").model.path == str(elsewhere / "m")
    assert read(folder, {"model.path": str(elsewhere / "m")}).model.path == str(elsewhere / "m")


def test_a_path_that_a_base_sets_is_beside_the_base(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = folder / "below"
    (below / "m").mkdir(parents=True)
    monkeypatch.chdir(below)
    write(folder, LEAST, "a.yaml")
    config = load_config(write(below, {"base": "../a.yaml"}))
    assert (config.model.path, config.data.path) == (str(folder / "m"), str(folder / "rows.jsonl"))


def test_the_path_that_is_kept_is_absolute_and_a_missing_one_names_the_places(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    current = tmp_path_factory.mktemp("current")
    monkeypatch.chdir(folder)
    assert load_config(Path(os.path.relpath(write(folder, LEAST)))).model.path == str(folder / "m")
    monkeypatch.chdir(current)
    for option in ("model.path", "data.path"):
        path = write(folder, LEAST | {option: "nowhere"})
        message = refusal(path)
        assert message.startswith(f"{path}:")
        for place in (option, str(folder / "nowhere"), str(current / "nowhere")):
            assert place in message


# --- what was read is what is kept ---------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lr=st.floats(min_value=1e-300, max_value=1e300),
    bound=st.none() | st.floats(min_value=1e-12, max_value=1.0),
    betas=st.tuples(*[st.floats(min_value=0, max_value=1, exclude_max=True)] * 2),
    steps=st.integers(1, 10**12),
    port=st.just(0) | st.integers(1024, 65535),
    extra=st.dictionaries(
        st.text(max_size=8),
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=8),
        max_size=4,
    ),
    field=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8),
)
def test_a_saved_configuration_reads_back_equal(
    folder: Path,
    lr: float,
    bound: float | None,
    betas: tuple[float, float],
    steps: int,
    port: int | None,
    extra: dict[str, Any],
    field: str,
) -> None:
    tree = nested(LEAST) | {
        "optimizer": {"lr": lr, "betas": betas},
        "publish": {"canary_bound": bound},
        "trainer": {"steps": steps},
        "cluster": {"port": port},
        "rollout": {"engine_args": extra},
    }
    tree["data"]["id_field"] = field
    settings = resolved(Config.model_validate(tree))
    save_resolved(settings, folder / "config.yaml")
    assert load_resolved(folder / "config.yaml") == settings


def test_every_option_stands_in_the_saved_configuration(folder: Path) -> None:
    settings = resolved(read(folder, {}))
    save_resolved(settings, folder / "config.yaml")
    saved = yaml.safe_load((folder / "config.yaml").read_text())
    assert saved.keys() == Config.model_fields.keys()
    for section in SECTIONS:
        assert saved[section].keys() == type(getattr(settings, section)).model_fields.keys(), section
    assert "null" not in (folder / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("options", "ranks", "found"),
    [
        ({}, None, {"parallel.data": 1, "parallel.expert_tensor": 1, "parallel.stages": (5,), "rollout.data": 1}),
        ({"parallel.pipeline": 2}, None, {"parallel.stages": (3, 2), "parallel.data": 1, "rollout.data": 2}),
        ({"parallel.tensor": 2, "rollout.tensor": 2}, 8, {"parallel.data": 4, "rollout.data": 4}),
        ({"parallel.expert": 4, "parallel.context": 2}, None, {"parallel.data": 2}),
        ({"parallel.data": 3}, 8, {"parallel.data": 3}),
        ({}, None, {"learner.precision": "fp32", "learner.offload": "none", "publish.canary_bound": 1e-4}),
        ({"model.dtype": "bfloat16"}, None, {"learner.precision": "bf16", "publish.canary_bound": 1.0}),
        ({"model.dtype": "bfloat16", "learner.precision": "fp8-blockwise"}, None, {"publish.witness_bound": 4.0}),
        ({"rollout.quantization": "fp8_per_block"}, None, {"publish.canary_bound": 4.0, "publish.witness_bound": 1e-4}),
        ({"publish.canary_bound": 0.5}, None, {"publish.canary_bound": 0.5, "publish.witness_bound": 0.5}),
        ({"shaping.rho": 3.0}, None, {"shaping.rho_negative": 3.0}),
        ({"rollout.max_tokens": 96}, None, {"objective.normaliser": "tokens", "objective.constant": 96}),
        (
            {"objective.name": "sapo", "objective.constant": 7, "objective.normaliser": "constant"},
            None,
            {"objective.constant": 7},
        ),
        ({"slurm.gpus_per_node": "h200:4"}, None, {"slurm.tasks_per_node": 4}),
        ({"trainer.prompts_per_step": 24, "trainer.mini_batch_prompts": 8}, None, {"trainer.mini_batches": 3}),
    ],
)
def test_what_a_user_leaves_open_follows(
    folder: Path, options: dict[str, Any], ranks: int | None, found: dict[str, Any]
) -> None:
    settings = resolved(read(folder, options), ranks=ranks)
    assert {option: value_of(settings, option) for option in found} == found


def test_what_a_user_says_is_what_a_run_does(folder: Path) -> None:
    """Every option but those that follow from others is in the settings as it was in the configuration."""
    config = read(folder, {})
    settings = resolved(config)
    for option in known_options():
        if option.partition(".")[2] and value_of(config, option) is not None and option != "trainer.mini_batches":
            assert value_of(settings, option) == value_of(config, option), option


@pytest.mark.parametrize(
    "options",
    [
        {"publish.canary_prompts": 0},
        {"shaping.rho": 1.0},
        {"trainer.prompts_per_step": 6, "trainer.mini_batch_prompts": 4},
        {"optimizer.name": "sgd", "correction.name": "none", "grader_pool.name": "ray", "shaping.name": "none"},
    ],
)
def test_what_a_run_wrote_down_can_be_asked_for_again_and_changed(folder: Path, options: dict[str, Any]) -> None:
    """All options stand there, also those that do nothing: only what is added has to have an effect."""
    settings = resolved(read(folder, options))
    save_resolved(settings, folder / "run.yaml")
    assert resolved(load_config(folder / "run.yaml")) == settings
    above = write(folder, {"base": "run.yaml", "optimizer.name": "adam", "optimizer.lr": 0.5}, "above.yaml")
    kept = settings.optimizer.distributed
    assert resolved(load_config(above)).optimizer == AdamOptions(lr=0.5, distributed=kept)
    assert "optimizer.momentum has no effect" in refusal(
        folder / "run.yaml", *("optimizer.name=adam", "optimizer.momentum=0.1")
    )
    if "publish.canary_prompts" in options:
        assert "publish.canary_tokens has no effect" in refusal(folder / "run.yaml", "publish.canary_tokens=7")


@pytest.mark.parametrize(
    ("trainer", "groups", "updates"),
    [
        ({"mini_batches": 4, "prompts_per_step": 8}, 8, 4),
        ({"mini_batches": 4, "prompts_per_step": 8}, 3, 3),  # fewer groups: smaller mini-batches, one group at least
        ({"mini_batch_prompts": 2, "prompts_per_step": 8}, 8, 4),
        ({"mini_batch_prompts": 2, "prompts_per_step": 8}, 4, 2),  # fewer groups: fewer mini-batches of that size
        ({"mini_batch_prompts": 2, "prompts_per_step": 8}, 5, 3),
        ({"mini_batch_prompts": 4, "prompts_per_step": 8}, 5, 1),
        ({"mini_batch_prompts": 4, "prompts_per_step": 8}, 1, 1),
    ],
)
def test_a_step_makes_so_many_updates(trainer: dict[str, int], groups: int, updates: int) -> None:
    assert TrainerOptions(**trainer).updates(groups) == updates


def test_the_size_and_the_number_of_mini_batches_must_agree_where_both_are_given(folder: Path) -> None:
    given = {"trainer.prompts_per_step": 8, "trainer.mini_batch_prompts": 2}
    assert read(folder, given | {"trainer.mini_batches": 4})
    message = refusal(write(folder, LEAST | given | {"trainer.mini_batches": 2}))
    assert "trainer.mini_batches has no effect, because trainer.mini_batch_prompts" in message


def test_the_configuration_of_another_version_is_refused_by_name(folder: Path) -> None:
    path = folder / "config.yaml"
    save_resolved(resolved(read(folder, {})), path)
    tree = yaml.safe_load(path.read_text())
    tree["optimizer"]["schedule"] = "cosine"
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(RequestError) as caught:
        load_resolved(path)
    assert str(caught.value).startswith(
        f"{path}: this is not the configuration of a run of this version: optimizer.schedule: "
    )


def test_settings_are_frozen(folder: Path) -> None:
    config = read(folder, {})
    for name in Config.model_fields:
        with pytest.raises(ValidationError, match="frozen"):
            setattr(config, name, getattr(config, name))
    with pytest.raises(ValidationError, match="frozen"):
        config.trainer.steps = 3  # type: ignore[misc]
    assert config == read(folder, {})


@pytest.mark.parametrize(
    ("device", "options", "replay"),
    [
        ("cpu", {}, "exact"),
        ("cuda", {}, "all"),  # a replay there ends in other last bits: nothing would be found again
        ("cuda", {"rollout": {"batch_invariant": True}}, "exact"),
        ("cuda", {"checkpoint": {"replay": "exact"}}, "exact"),
        ("cpu", {"checkpoint": {"replay": "all"}}, "all"),
    ],
)
def test_what_a_replay_believes_follows_from_the_device_unless_it_is_given(
    device: Any, options: dict[str, Any], replay: str
) -> None:
    config = Config.model_validate({"model": {"path": "m"}, "data": {"path": "builtin:arithmetic"}} | options)
    settings = resolved(config, backend_of(device))
    assert settings.checkpoint.replay == replay
    assert settings.cluster.device == device


# --- what YAML makes of text, and what a shell leaves of it ---------------------------------------------------------

TEXTS = ["0123", "4:00:00", "1e3", "on", "No", "2026-01-02", "2026-99-99", "0x1F", "1_000", "12", "1.50", ".inf", "+1"]
TEXTS += ["9" * 5000]


@pytest.mark.parametrize("text", TEXTS)
def test_an_option_that_takes_text_gets_what_was_written_in_a_file_and_after_set(folder: Path, text: str) -> None:
    path = folder / "c.yaml"
    path.write_text(
        f"model: {{path: m}}\ndata: {{path: rows.jsonl, id_field: {text}}}\n"
        f"slurm:\n  setup: [{text}]\n  environment: {{A: {text}, B: '{text}'}}\n"
    )
    for config in (load_config(path), load_config(path, [f"data.id_field={text}", f"slurm.environment.C={text}"])):
        assert config.data.id_field == text
        assert config.slurm.setup == (text,)
        assert set(config.slurm.environment.values()) == {text}
    save_resolved(resolved(config), folder / "config.yaml")
    assert load_resolved(folder / "config.yaml") == resolved(config)


def test_text_through_anchors_and_merges_is_what_was_written(folder: Path) -> None:
    path = folder / "c.yaml"
    path.write_text(
        "model: {path: m}\ndata: &d {path: rows.jsonl, id_field: &n 010}\n"
        "slurm: {account: *n, environment: {A: *n, <<: {B: 010}}}\n"
    )
    config = load_config(path)
    assert (config.data.id_field, config.slurm.account) == ("010", "010")
    assert config.slurm.environment == {"A": "010", "B": "010"}


@pytest.mark.parametrize(
    ("override", "shell"),
    [
        ("data.path=*.jsonl", "--set 'data.path=\"*.jsonl\"'"),
        ("slurm.setup=echo a: b", "--set 'slurm.setup=\"echo a: b\"'"),
        ("slurm.setup=module load x # newest", "--set 'slurm.setup=\"module load x # newest\"'"),
        ("name=@x", "--set 'name=\"@x\"'"),
        ("slurm.setup='it", "--set 'slurm.setup=\"'\"'\"'it\"'"),
    ],
)
def test_a_set_that_yaml_would_misread_is_refused_with_the_form_that_works_in_a_shell(
    folder: Path, override: str, shell: str
) -> None:
    message = refusal(write(folder, LEAST), override)
    assert message.startswith(f"--set {override}: ")
    assert message.endswith(shell)
    # A real shell makes words of it that are then read as the text.
    words = subprocess.run(["bash", "-c", f"printf '%s\\0' {shell}"], capture_output=True, text=True).stdout.split("\0")
    option, _, text = override.partition("=")
    if option != "data.path" and option != "name":
        assert read(folder, {}, words[1]).slurm.setup == (text,)


@pytest.mark.parametrize("text", ["010", "1:30", "-010", "1:30.5"])
def test_a_number_that_yaml_reads_otherwise_than_a_person_is_refused(folder: Path, text: str) -> None:
    path = folder / "c.yaml"
    path.write_text(f"model: {{path: m}}\ndata: {{path: rows.jsonl}}\noptimizer: {{betas: [0.9, {text}]}}\n")
    assert refusal(path).startswith(f"{path}:3: optimizer.betas: YAML reads {text} as ")
    assert "YAML reads" in refusal(write(folder, LEAST), f"trainer.seed={text}")


# --- near names across sections -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unknown", "says"),
    [
        ("trainer.lr", "did you mean optimizer.lr?"),
        ("trainer.learning_rate", "did you mean optimizer.lr?"),
        ("optimizer.max_grad_norm", "did you mean optimizer.clip_grad?"),
        ("sampling.temperature", "did you mean rollout.temperature?"),
        ("sampling.temprature", "did you mean rollout.temperature?"),
        ("trainer.tensor", "did you mean parallel.tensor or rollout.tensor?"),
        ("actor.tensor_model_parallel_size", "did you mean parallel.tensor?"),
        ("trainer.max_new_tokens", "did you mean rollout.max_tokens?"),
        ("trainer.every_step", "did you mean checkpoint.every_steps?"),
        ("slurm.reservation", "slurm.extra takes it: slurm.extra: ['--reservation=…']"),
        ("slurm.exclusive", "slurm.extra takes it: slurm.extra: ['--exclusive']"),
        ("slurm.mail_user", "slurm.extra takes it: slurm.extra: ['--mail-user=…']"),
        ("slurm.constraint", "slurm.extra takes it: slurm.extra: ['--constraint=…']"),
        ("slurm.mem", "did you mean slurm.memory?"),
        ("slurm.ntasks_per_node", "did you mean slurm.tasks_per_node?"),
        ("slurm.job-name", "--job-name is set by name"),
        ("slurm.output", "--output is set by the run folder's logs/slurm-*.out"),
        ("slurm.walltime", "did you mean slurm.time?"),
    ],
)
def test_an_unknown_option_is_told_where_what_was_meant_is(folder: Path, unknown: str, says: str) -> None:
    message = refusal(write(folder, LEAST), f"{unknown}=1")
    assert message == f"--set {unknown}: unknown option {unknown}; {says}"


def test_every_synonym_is_no_option_and_stands_for_one() -> None:
    known = known_options()
    assert set(SYNONYMS.values()) <= set(known)
    assert not set(SYNONYMS) & {name.rpartition(".")[2] for name in known}


# --- paths as people write them -------------------------------------------------------------------------------------


@pytest.fixture
def homely(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home with a model and an image in it, $DATA beside it, and a current directory with things of its own."""
    for part in ("home/m", "data/x", "here/in", "here/cache-here"):
        (folder / part).mkdir(parents=True)
    for part in ("home/p.sqsh", "data/rows.jsonl", "here/in/python"):
        (folder / part).write_text("")
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.setenv("DATA", str(folder / "data"))
    monkeypatch.setenv("TWICE", "$DATA")
    monkeypatch.setenv("EMPTY", "")
    monkeypatch.delenv("NOWHERE", raising=False)
    monkeypatch.chdir(folder / "here")
    return folder


@pytest.mark.parametrize(
    ("option", "written", "meant"),
    [
        ("model.path", "~/m", "home/m"),
        ("model.path", "$HOME/m", "home/m"),
        ("model.path", "m", "m"),
        ("model.path", "in", "here/in"),
        ("data.path", "${DATA}/rows.jsonl", "data/rows.jsonl"),
        ("slurm.cache", "~/new/cache", "home/new/cache"),
        ("slurm.cache", "cache-here", "here/cache-here"),
        ("slurm.cache", "m", "m"),  # beside the file
        ("slurm.cache", "not-yet", "here/not-yet"),
        ("slurm.container", "~/p.sqsh", "home/p.sqsh"),
        ("slurm.container", "home/p.sqsh", "home/p.sqsh"),
        ("slurm.container", "$DATA/only-on-nodes.sqsh", "data/only-on-nodes.sqsh"),
        ("slurm.python", "in/python", "here/in/python"),
    ],
)
def test_a_path_means_the_same_in_every_option(homely: Path, option: str, written: str, meant: str) -> None:
    assert value_of(read(homely, {option: written}), option) == str(homely / meant)
    if written[0] in "~$":
        assert value_of(read(homely, {}, f"{option}={written}"), option) == str(homely / meant)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("~/m:/model,$DATA:/data:ro", ["{}/home/m:/model", "{}/data:/data:ro"]),
        ("m:/model", ["{}/m:/model"]),
        ("/scratch", ["/scratch"]),
        ("$DATA/x:$DATA/x", ["{}/data/x:{}/data/x"]),
    ],
)
def test_mounts_get_absolute_paths(homely: Path, written: str, meant: list[str]) -> None:
    assert read(homely, {"slurm.mounts": [written]}).slurm.mounts == (",".join(meant).format(*[homely] * 2),)


@pytest.mark.parametrize("image", ["nvcr.io#nvidia/pytorch:25.01-py3", "docker://ubuntu", "pytorch"])
def test_an_image_of_a_registry_is_no_path(homely: Path, image: str) -> None:
    assert read(homely, {"slurm.container": image}).slurm.container == image


def test_a_base_is_found_like_any_other_path(homely: Path) -> None:
    write(homely / "home", {"trainer.steps": 7}, "base.yaml")
    write(homely / "here", {"trainer.steps": 8}, "here.yaml")
    for written, steps in (("~/base.yaml", 7), ("$HOME/base.yaml", 7), ("home/base.yaml", 7), ("here.yaml", 8)):
        assert read(homely, {"base": written}).trainer.steps == steps


@pytest.mark.parametrize(
    "option", ["model.path", "data.path", "slurm.cache", "slurm.container", "slurm.mounts", "base"]
)
@pytest.mark.parametrize(
    ("written", "says"),
    [
        ("$NOWHERE/x", "the variable NOWHERE is not set"),
        ("a/${NOWHERE}", "the variable NOWHERE is not set"),
        ("$EMPTY/x", "the variable EMPTY is not set"),
        ("${NOWHERE:-x}", "${NOWHERE:-x} is not expanded here"),
        ("~nobody-of-this-name/x", "there is no home folder of nobody-of-this-name"),
        ("$TWICE/x", None),  # expanded once: there is no folder $DATA
    ],
)
def test_what_cannot_be_expanded_is_refused_by_name_with_file_and_line(
    homely: Path, option: str, written: str, says: str | None
) -> None:
    path = write(homely, LEAST | {option: written})
    if says is None:
        if option not in ("slurm.cache", "slurm.container"):  # one is made, the other a registry's
            assert "no " in refusal(path) and "$DATA/x" in refusal(path)
        return
    line = next(n for n, text in enumerate(path.read_text().splitlines(), 1) if written in text)
    message = refusal(path)
    assert message.startswith(f"{path}:{line}: ")
    assert f"{written}: {says}" in message


# --- what an option means -------------------------------------------------------------------------------------------


def test_every_option_has_a_type_a_default_and_a_meaning_and_none_is_listed_twice() -> None:
    listed = options(None)
    assert [option.name for option in listed] == known_options()
    for option in listed:
        assert option.meaning, option.name
        assert "\n" not in option.meaning, option.name
        assert option.kind and option.default, option.name


def test_a_default_in_the_list_of_options_is_the_one_that_a_run_has(folder: Path) -> None:
    """Set to what the list says, every option is as if it had not been set."""
    plain = read(folder, {})
    for option in options(None):
        section, _, name = option.name.partition(".")
        if option.default != "required" and (not name or name in kinds(section)[0].model_fields):
            entry = read(folder, {}, f"{option.name}={option.default}")
            assert entry == plain, option.name


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("cluster.port", "integer ≥ 0, ≤ 65535"),
        ("shaping.metric", "probability | entropy"),
        ("objective.dual_clip", "number ≥ 0"),
        ("slurm.environment", "mapping to text"),
        ("parallel.stages", "list of integer ≥ 1 | null"),
    ],
)
def test_the_type_of_an_option_is_told_with_its_limits(name: str, kind: str) -> None:
    assert {option.name: option.kind for option in options(None)}[name] == kind


def test_the_options_of_a_section_that_there_is_not_are_refused_with_the_nearest() -> None:
    assert {option.name.partition(".")[0] for option in options("reward")} == {"reward"}
    assert [option.name for option in options("name")] == ["name"]
    with pytest.raises(RequestError, match="there is no section optimiser; did you mean optimizer?"):
        options("optimiser")
