"""Every example of docs/extending.md is complete: each is run as it stands there."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from a3po_megatron.algorithm import token_loss
from a3po_megatron.algorithm.objectives.registry import OBJECTIVES, objective_of
from a3po_megatron.algorithm.sums import Report
from a3po_megatron.algorithm.token_loss import TokenBatch, known, normaliser_count
from a3po_megatron.batch import Verdict
from a3po_megatron.config import NoCorrection, load_config
from a3po_megatron.config.methods import METHODS
from a3po_megatron.errors import RequestError
from a3po_megatron.evaluate.benchmarks import BENCHMARKS
from a3po_megatron.evaluate.problems import file_of, problems_of
from a3po_megatron.launch.check import settle
from a3po_megatron.model.cut import EngineRank, cut, hf_tensors, pieces, tensors
from a3po_megatron.model.families.registry import FAMILIES
from a3po_megatron.model.layout import Layout
from a3po_megatron.model.read import facts_of
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.reward.grader import GRADERS, Grader, grade
from a3po_megatron.telemetry.catalogue import METRICS
from tests.harness.ranks import ROOT
from tests.harness.tiny_models import make_checkpoint
from tests.test_layout import CONFIG, MOE

DOCS = (ROOT / "docs/extending.md").read_text()


def example(named: str) -> str:
    """The one block whose first line says so."""
    (found,) = (text for text in re.findall(r"```python\n(.*?)```", DOCS, re.S) if named in text.partition("\n")[0])
    return found


def run(text: str) -> dict[str, Any]:
    names: dict[str, Any] = {"__name__": "example"}
    sys.modules.setdefault("example", type(sys)("example"))  # where dataclasses look for the module's names
    exec(compile(text, "docs/extending.md", "exec", dont_inherit=True), names)
    return names


def test_a_family_is_a_table_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    family = run(example("families/biased.py"))["BIASED"]
    monkeypatch.setitem(FAMILIES, family.architecture, family)
    facts = facts_of(CONFIG | MOE | {"architectures": [family.architecture]}, "config.json")
    biases = [name for name, tensor in tensors(facts).items() if tensor.buffer]
    assert biases == [f"model.layers.{n}.mlp.gate.e_score_correction_bias" for n in range(facts.layers)]
    assert facts.experts is not None
    for name in biases:
        assert hf_tensors(facts)[name] == (facts.experts.count,)
    layout = Layout(tensor=2, pipeline=1, expert=2)
    owners = [p for place in layout.places() for p in pieces(facts, layout, place) if p.owner and p.hf.buffer]
    assert [piece.tensor for piece in owners] == biases
    assert {piece.parameter for piece in owners} == {
        f"decoder.layers.{n}.mlp.router.expert_bias" for n in range(facts.layers)
    }
    held = cut(facts, EngineRank(2, 1, (0, facts.experts.count)))
    assert [piece.parameter for piece in held if piece.hf.buffer] == biases


def test_an_objective_is_a_file_its_options_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    names = run(example("config/objective.py")) | run(example("objectives/focal.py"))
    options, kind = names["FocalOptions"], names["Focal"]
    assert DOCS.count('in ObjectiveOptions: Annotated[FocalOptions, Tag("focal")]') == 1
    assert DOCS.count("in OBJECTIVES: FocalOptions: Focal\n") == 1
    monkeypatch.setitem(OBJECTIVES, options, kind)
    objective = objective_of(options(focus=1.0), NoCorrection())
    logprobs = torch.tensor([0.5, 0.25, 0.8]).log().requires_grad_()
    old, begins = logprobs.detach(), torch.tensor([True, False, True])
    weights, advantages = torch.tensor([1.0, 2.0, 1.0]), torch.tensor([2.0, 2.0, -1.0])
    batch = TokenBatch(logprobs, old, old, advantages, weights, torch.tensor([0, 0, 1]), begins, 2, 0)
    loss, sums = objective(batch)
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-0.5 * 2, -0.75 * 2 * 2, 0.2])
    assert normaliser_count(objective, batch) == 3 and sums.keys() == objective.metrics.keys()


def test_an_objective_may_be_anything_that_is_called_and_a_metric_is_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = run(example("objectives/raft.py"))["Raft"]()
    metric = run(example("telemetry/catalogue.py"))["METRIC"]
    with pytest.raises(KeyError, match=metric.name):
        known(objective)
    monkeypatch.setattr(token_loss, "METRICS", (*METRICS, metric.name))
    assert known(objective) is objective
    logprobs = torch.tensor([-1.0, -2.0, -0.5], requires_grad=True)
    zeros = torch.zeros(3)
    advantages = torch.tensor([2.0, 2.0, -1.0])
    begins = torch.tensor([True, False, True])
    batch = TokenBatch(logprobs, zeros, zeros, advantages, zeros + 1, torch.tensor([0, 0, 1]), begins, 2, 0)
    loss, sums = objective(batch)
    assert float(loss.detach()) == 3.0
    loss.backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -1.0, 0.0]
    assert normaliser_count(objective, batch) == 2
    report = Report(objective.metrics)
    report.sums += report.vector(sums, torch.device("cpu"))
    assert report.metrics() == {"learner/loss": 3.0 / 2, metric.name: -3.5 / 2}


def test_a_benchmark_is_a_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    benchmark = run(example("evaluate/benchmarks.py"))["CLAIMS"]
    monkeypatch.setitem(BENCHMARKS, benchmark.name, benchmark)
    rows = [{"claim": "2 + 2 = 4", "holds": True}, {"claim": "All {primes} are odd.", "holds": False}]
    (tmp_path / "claims.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    remarks: list[str] = []
    problems = problems_of(BENCHMARKS["claims"], file_of("claims", tmp_path), 0, remark=remarks.append)
    assert remarks == []
    assert [(problem.id, problem.gold, problem.grader) for problem in problems] == [
        ("claims/1", "A", "choice"),
        ("claims/2", "B", "choice"),
    ]
    assert problems[1].text.startswith("All {primes} are odd.\n\nIs this so?\n\nA) yes\n")
    assert re.fullmatch("claims-[0-9a-f]{8}", benchmark.version)
    assert benchmark.chosen(samples=4).version != benchmark.version
    (tmp_path / "claims.jsonl").write_text('{"claim": "1 = 1"}')
    with pytest.raises(RequestError, match=r"claims\.jsonl:1: claims: expected the fields claim \+ holds"):
        problems_of(benchmark, file_of("claims", tmp_path), 0)


def test_a_grader_is_a_function(monkeypatch: pytest.MonkeyPatch) -> None:
    line = re.search(r'in GRADERS: "(\w+)": Grader\("(\w+)", "(.*?)", extracts=\(\)\)', DOCS)
    assert line is not None
    module = ModuleType(line[2])
    vars(module).update(run(example("reward/words_at_most.py")))
    monkeypatch.setitem(sys.modules, f"a3po_megatron.reward.{line[2]}", module)
    monkeypatch.setitem(GRADERS, line[1], Grader(line[2], line[3], extracts=()))
    assert grade("two words", "2", grader="words") == Verdict("correct")
    assert grade("not two words", "2", grader="words") == Verdict("wrong", "3 words")
    assert grade("two words", "2", grader="words", finished=False) == Verdict("wrong", "cut off")
    assert grade("two words", "two", grader="words").outcome == "invalid"
    with pytest.raises(RequestError, match="no grader: there are math, choice, numeric, code, judge, function, words"):
        grade("", "", grader="word")


def test_a_method_is_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(METHODS, "mine", run(example("an entry of METHODS"))["METHOD"])
    make_checkpoint(tmp_path / "model", max_position_embeddings=4096)
    (tmp_path / "c.yaml").write_text("method: mine\nmodel: {path: model}\ndata: {path: 'builtin:arithmetic'}\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.objective.name == "gspo_token" and config.shaping.rho == 1.5 and not config.rollout.dynamic_sampling
    settle(config, CPU)


@pytest.mark.soak
def test_a_launcher_is_a_script(tmp_path: Path) -> None:
    script, folder = tmp_path / "launcher.py", tmp_path / "run"
    script.write_text(example("launchers/torchrun.py"))
    shown = re.search(r"python launchers/torchrun\.py (\S+) RUN_DIR 2 ((?:.|\\\n)*?)\n\n", DOCS)
    assert shown is not None
    short = ["--set", "trainer.steps=1", "--set", "trainer.prompts_per_step=4"]
    options = [*shown[2].replace("\\\n", " ").split(), *short]
    words = [sys.executable, str(script), shown[1], str(folder), "2", *options]
    ended = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=150)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    (row,) = (folder / "metrics.jsonl").read_text().splitlines()
    assert json.loads(row)["step"] == 0
