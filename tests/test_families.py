"""A family is one table: nothing outside model/families/ knows a tensor's name, and one from outside is enough."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from a3po_megatron.convert.convert import ExportOptions, export_checkpoint, import_checkpoint
from a3po_megatron.model.families.registry import FAMILIES
from tests.distributed import cases_families as cases
from tests.harness.ranks import ROOT, run_ranks

# Names of tensors, or parts of them, in an HF folder, in Megatron and in vLLM.
NAMES = re.compile(
    r"self_attn|self_attention|_proj\b|linear_(qkv|proj|fc)|embed_tokens|lm_head|(?<!tie_)word_embeddings|output_layer\."
    r"|\bmlp\.|\.experts\.|model\.layers|decoder\.layers|layernorm\.(weight|bias)|rotary_emb|w13_|w2_"
)


def strings(path: Path) -> Iterator[tuple[int, str]]:
    """Every string of a file that is no docstring, and the pieces of f-strings."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            yield node.lineno, node.value


def test_no_name_of_a_familys_tensors_stands_outside_its_table() -> None:
    package = ROOT / "a3po_megatron"
    found = [
        f"{path.relative_to(ROOT)}:{line}: {text}"
        for path in sorted(package.rglob("*.py"))
        if path.parent != package / "model/families"
        for line, text in strings(path)
        if NAMES.search(text)
    ]
    assert found == []
    table = {text for path in (package / "model/families").glob("*.py") for _, text in strings(path)}
    assert any(NAMES.search(text) for text in table)  # the pattern does find them


def test_a_familys_buffer_in_a_dtype_of_its_own_is_loaded_published_exported_and_proven(tmp_path: Path) -> None:
    cases.biased_checkpoint(tmp_path / "model")
    for found in run_ranks(2, cases.a_routers_bias, folder=tmp_path)["a_routers_bias"]:
        assert found.keys() == cases.LAYOUTS.keys()
        for name, seen in found.items():
            said = seen.pop("one bit")
            assert f"was sent model.layers.1.{cases.BIAS}, but does not hold it" in said, (name, said)
            assert seen == {
                "published otherwise": [],
                "exported otherwise": [],
                "saved otherwise": [],
                "strength": "engine",
                "bytes": 0,
                "it chooses": True,
            }, name


def test_such_a_buffer_passes_a_megatron_checkpoint_bit_for_bit_and_keeps_its_dtype(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FAMILIES, cases.BIASED.architecture, cases.BIASED)
    source, checkpoint = cases.biased_checkpoint(tmp_path / "model"), tmp_path / "checkpoint"
    import_checkpoint(source, checkpoint, 1, 4096, lambda _: lambda _: None)
    stored = load_file(source / "model.safetensors")
    for dtype in (None, torch.float16):
        target = tmp_path / f"exported-{dtype}"
        export_checkpoint(checkpoint, target, ExportOptions(dtype=dtype), lambda _: lambda _: None)
        back = load_file(target / "model.safetensors")
        assert back.keys() == stored.keys()
        for name, tensor in back.items():
            fixed = name.endswith(cases.BIAS)
            assert torch.equal(tensor, stored[name] if fixed or dtype is None else stored[name].to(dtype)), name
