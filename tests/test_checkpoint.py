"""What a run saves: bit for bit its weights, whatever the layout; others can load what was exported."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.distributed import cases_checkpoint as cases
from tests.harness.ranks import Case, run_ranks
from tests.harness.tiny_models import KINDS, make_checkpoint
from tests.test_convert import DTYPES, assert_same_bits, convert, converted, read_tensors


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for kind in KINDS:
        # Sizes that vLLM's CPU kernels take: for experts, and a head of 32 where it follows from the hidden size.
        sizes = {"qwen3_moe": {"hidden_size": 128, "moe_intermediate_size": 64}, "qwen2": {"hidden_size": 256}}
        wide = sizes.get(kind.removesuffix("_raw"), {})
        make_checkpoint(folder / kind, kind, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4, **wide)
    return folder


@pytest.mark.parametrize(
    ("case", "saved"),
    [
        (cases.saved_and_read_again, cases.SAVED),
        pytest.param(cases.implied_saved_and_read_again, cases.IMPLIED, marks=pytest.mark.soak),
    ],
    ids=["chosen", "implied"],
)
@pytest.mark.parametrize("world", cases.SAVED)
def test_what_a_run_saves_at_one_layout_is_read_at_another_and_exports_bit_for_bit(
    world: int, case: Case, saved: dict[int, dict[str, Any]], models: Path, tmp_path: Path
) -> None:
    for kind in KINDS:
        (tmp_path / kind).symlink_to(models / kind)
    for wrong in run_ranks(world, case, folder=tmp_path)[case.__name__]:
        assert wrong == {name: [] for name in saved[world]}
    for name, (kind, dtype, _) in saved[world].items():
        run, source = tmp_path / name, models / kind
        wanted = {n: t.to(DTYPES[dtype]) for n, t in read_tensors(source).items()}
        (run / "config.yaml").write_text("")  # what the launcher leaves in a run folder
        converted("export", run, tmp_path / f"{name}-exported")
        for exported in (tmp_path / f"{name}-exported", run / "hf" / "step-000001"):
            assert_same_bits(read_tensors(exported), wanted)
            config, theirs = (json.loads((folder / "config.json").read_text()) for folder in (exported, source))
            assert config.get("dtype", config.get("torch_dtype")) == dtype
            assert config | {"dtype": None} == theirs | {"dtype": None}
            for other in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
                assert (exported / other).read_bytes() == (source / other).read_bytes()


def test_a_run_that_saved_nothing_or_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("")
    ended = convert("export", tmp_path, tmp_path / "out")
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert "has not saved any weights" in ended.err
    torn = tmp_path / "checkpoints" / "step-000007"  # without its manifest
    torn.mkdir(parents=True)
    assert "has not saved any weights" in convert("export", tmp_path, tmp_path / "out").err
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("vllm") is None, reason="without vLLM")
def test_an_exported_folder_continues_prompts_alike_in_vllm_and_in_transformers(models: Path, tmp_path: Path) -> None:
    for kind in ("qwen3_moe", "qwen3", "qwen2", "llama31"):
        converted("import", models / kind, tmp_path / f"{kind}-megatron")
    (found,) = run_ranks(1, cases.greedy_tokens, folder=tmp_path)["greedy_tokens"]
    for kind, tokens in found.items():
        assert tokens["vllm"] == tokens["transformers"], kind
        assert len({tuple(line) for line in tokens["vllm"]}) == 3, kind
