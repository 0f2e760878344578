"""The paper's models and methods: each configuration holds together, and its methods train a tiny model."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from a3po_megatron.config import Config, load_config
from a3po_megatron.files.run_folder import RunFolder
from a3po_megatron.launch.check import settle
from a3po_megatron.ranks.backend import CPU, CUDA
from tests.harness import interrupted_runs as tools
from tests.harness.ranks import ROOT
from tests.harness.whole_answers import make_model

PUBLISHED = {
    **{"qwen3-8b-base": "Qwen3-8B-Base", "r1-distill-qwen-7b": "DeepSeek-R1-Distill-Qwen-7B"},
    "qwen2.5-math-7b": "Qwen2.5-Math-7B",
}
METHODS = ("a3po", "grpo", "dapo", "fork_tokens", "lp_reg", "w_reinforce")
FAMILIES = {"qwen3-8b-base": "qwen3", "r1-distill-qwen-7b": "qwen2", "qwen2.5-math-7b": "qwen2"}
# All that a tiny run has otherwise: model, data, layout, lengths and counts.
TINY: dict[str, Any] = {
    **{"data.template": "raw", "parallel.tensor": 1, "parallel.sequence": False, "rollout.tensor": 1},
    **{"rollout.max_prompt_tokens": 16, "rollout.max_tokens": 3, "rollout.kv_cache_bytes": 8 << 20},
    **{"trainer.steps": 2, "trainer.prompts_per_step": 4, "trainer.mini_batches": 2, "learner.micro_batch_tokens": 256},
    **{"checkpoint.every_steps": 2, "publish.witness_at_start": False, "telemetry.tensorboard": False},
}


def read(name: str, method: str, model: Path, data: Path, *overrides: str) -> Config:
    words = [f"model.path={model}", f"data.path={data}", f"method={method}", *overrides]
    return load_config(ROOT / f"configs/paper/{name}.yaml", words)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"problem": f"{n} ", "answer": "4", "id": str(n)}) + "\n" for n in range(8)))
    return path


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("method", METHODS)
def test_every_configuration_holds_together_for_the_published_model(
    name: str, method: str, rows: Path, tmp_path: Path
) -> None:
    """On 16 GPUs, with the sizes of its config.json."""
    source = Path(os.environ.get("A3PO_TEST_DATA", ""), f"model_configs/{PUBLISHED[name]}.config.json")
    if not source.is_file():
        pytest.skip("A3PO_TEST_DATA names no folder with the models' configurations")
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(source.read_text())
    settings = settle(read(name, method, model, rows), CUDA, 16)
    assert settings.ranks == 16 and settings.parallel.data == 8 and settings.rollout.data == 8
    assert settings.correction.name == "none" and settings.optimizer.lr == 1e-6
    if method == "a3po":
        assert (settings.shaping.rho, settings.shaping.decay, settings.shaping.fraction) == (2.0, 0.005, 0.2)


@pytest.mark.soak
@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_a_tiny_model_of_the_family(name: str, method: str, rows: Path, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model", FAMILIES[name])
    overrides = [f"{option}={json.dumps(value)}" for option, value in TINY.items()]
    config = read(name, method, model, rows, *overrides)
    assert settle(config, CPU).ranks == 1
    tools.trained_as(tmp_path / "run", config)
    metrics = [json.loads(line) for line in RunFolder(tmp_path / "run").metrics.read_text().splitlines()]
    assert [row["step"] for row in metrics] == [0, 1]
    assert all(math.isfinite(row["policy/grad_norm"]) and row["rollout/kept_groups"] > 0 for row in metrics)
