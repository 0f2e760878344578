"""Loading: every shard is the slice it should be, and a checkpoint that is not whole is refused by tensor and file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from a3po_megatron.errors import RequestError
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.read import read_facts
from a3po_megatron.weights.load import check_checkpoint, load_shards
from tests.harness.tiny_models import VOCAB, make_checkpoint, tensor_pieces
from tests.test_layout import megatron_parameters

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
NAME = "model.layers.1.mlp.up_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("checkpoints")
    return {kind: make_checkpoint(folder / kind, kind) for kind in ("qwen3", "qwen2")}


def copied(
    source: Path, folder: Path, shards: int = 1, change: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Path:
    """The checkpoint again, changed, in one file or over several with an index."""
    tensors = change(load_file(source / SINGLE))
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    if shards == 1:
        save_file(tensors, folder / SINGLE)
        return folder
    where = {name: f"model-{number % shards + 1}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def load(folder: Path, facts: ModelFacts, tensor: int, rank: int, like: Tensors, dtype: torch.dtype) -> Tensors:
    """What load_shards makes of parameters that held something else before."""
    found = {(0, name): torch.nn.Parameter(torch.full(value.shape, 7.0, dtype=dtype)) for name, value in like.items()}
    load_shards(folder, facts, tensor_pieces(facts, tensor, rank), found)
    return {name: value.detach() for (_, name), value in found.items()}


def refusal(folder: Path, facts: ModelFacts) -> str:
    """The message of the check before ranks start; loading must refuse as well."""
    with pytest.raises(RequestError) as caught:
        check_checkpoint(folder, facts)
    with pytest.raises(RequestError):
        load_shards(folder, facts, tensor_pieces(facts, 1, 0), {})
    return str(caught.value)


@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("shards", [1, 3])
def test_every_rank_gets_its_slices_and_zeros_where_the_vocabulary_is_padded(
    checkpoints: dict[str, Path], tmp_path: Path, kind: str, tensor: int, shards: int
) -> None:
    folder = copied(checkpoints[kind], tmp_path, shards)
    facts, hf = read_facts(folder), load_file(checkpoints[kind] / SINGLE)
    for rank in range(tensor):
        wanted = megatron_parameters(facts, tensor, rank, hf)
        found = load(folder, facts, tensor, rank, wanted, torch.float32)
        for name, value in wanted.items():
            assert torch.equal(found[name], value), f"{name} on rank {rank} of {tensor}"
    if tensor == 2:
        last = found["embedding.word_embeddings.weight"]
        assert VOCAB % 2 == 1
        assert torch.equal(last[-1], torch.zeros(facts.hidden))


@pytest.mark.parametrize(("stored", "kept"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_tensors_are_cast_to_the_dtype_of_the_parameters(
    checkpoints: dict[str, Path], tmp_path: Path, stored: torch.dtype, kept: torch.dtype
) -> None:
    folder = copied(checkpoints["qwen3"], tmp_path, 1, lambda tensors: {n: t.to(stored) for n, t in tensors.items()})
    facts = read_facts(folder)
    wanted = megatron_parameters(facts, 1, 0, load_file(checkpoints["qwen3"] / SINGLE))
    for name, value in load(folder, facts, 1, 0, wanted, kept).items():
        assert torch.equal(value, wanted[name].to(stored).to(kept)), name


@pytest.mark.parametrize("shards", [1, 3])
def test_a_tied_checkpoint_may_store_the_output_layer_again(
    checkpoints: dict[str, Path], tmp_path: Path, shards: int
) -> None:
    def with_head(tensors: Tensors) -> Tensors:
        return tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}

    folder = copied(checkpoints["qwen3"], tmp_path, shards, with_head)
    facts = read_facts(folder)
    wanted = megatron_parameters(facts, 1, 0, load_file(checkpoints["qwen3"] / SINGLE))
    found = load(folder, facts, 1, 0, wanted, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())
    assert "output_layer.weight" not in found


def test_old_rotary_buffers_in_a_checkpoint_are_no_weights(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = copied(checkpoints["qwen3"], tmp_path, 1, lambda tensors: tensors | {name: torch.ones(16)})
    assert name not in {piece.tensor for piece in tensor_pieces(read_facts(folder), 1, 0)}
    assert NAME in check_checkpoint(folder, read_facts(folder))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda tensors: {n: t for n, t in tensors.items() if n != NAME}, [f"lacks {NAME}"]),
        (lambda tensors: tensors | {"model.layers.2.mlp.up_proj.weight": tensors[NAME].clone()}, ["model.layers.2"]),
        (lambda tensors: tensors | {NAME: tensors[NAME][:-1].clone()}, [NAME, "(79, 48)", "(80, 48)"]),
        (lambda tensors: tensors | {NAME: tensors[NAME].t().contiguous()}, [NAME, "(48, 80)"]),
        (lambda tensors: tensors | {NAME: tensors[NAME].reshape(-1)}, [NAME, "(3840,)"]),
    ],
    ids=["missing", "extra", "too few rows", "transposed", "flat"],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(
    checkpoints: dict[str, Path], tmp_path: Path, shards: int, change: Callable[[Tensors], Tensors], named: list[str]
) -> None:
    folder = copied(checkpoints["qwen3"], tmp_path, shards, change)
    message = refusal(folder, read_facts(folder))
    assert str(folder) in message
    for words in named:
        assert words in message


def test_an_untied_checkpoint_without_its_output_layer_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(
        checkpoints["qwen2"], tmp_path, 1, lambda tensors: {n: t for n, t in tensors.items() if n != "lm_head.weight"}
    )
    assert "lacks lm_head.weight" in refusal(folder, read_facts(folder))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [NAME, "model.norm.weight", "model.embed_tokens.weight"])
def test_a_value_that_is_not_finite_is_found_by_the_rank_that_reads_it_and_named(
    checkpoints: dict[str, Path], tmp_path: Path, name: str, value: float
) -> None:
    def damage(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[-1] = value
        return tensors

    folder = copied(checkpoints["qwen3"], tmp_path, 3, damage)
    facts = read_facts(folder)
    like = megatron_parameters(facts, 2, 1, load_file(checkpoints["qwen3"] / SINGLE))
    with pytest.raises(RequestError) as caught:
        load(folder, facts, 2, 1, like, torch.float32)  # the last element is the last rank's
    assert name in str(caught.value)
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    assert str(folder / file) in str(caught.value)


@pytest.mark.parametrize("left", [0, 5, 2000, -1])
def test_a_file_that_was_cut_off_is_named(checkpoints: dict[str, Path], tmp_path: Path, left: int) -> None:
    folder = copied(checkpoints["qwen3"], tmp_path, 3)
    file = folder / "model-2.safetensors"
    file.write_bytes(file.read_bytes()[:left])
    assert str(file) in refusal(folder, read_facts(folder))
    single = copied(checkpoints["qwen3"], tmp_path) / SINGLE
    (tmp_path / INDEX).unlink()
    single.write_bytes(single.read_bytes()[:left])
    assert str(single) in refusal(folder, read_facts(folder))


def test_an_index_that_names_a_missing_file_or_is_none_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = copied(checkpoints["qwen3"], tmp_path, 3)
    facts = read_facts(folder)
    (folder / "model-2.safetensors").unlink()
    message = refusal(folder, facts)
    assert "model-2.safetensors" in message
    assert str(folder / INDEX) in message
    for text in ("{", "[]", '{"metadata": {}}'):
        (folder / INDEX).write_text(text)
        assert str(folder / INDEX) in refusal(folder, facts)


def test_a_folder_without_safetensors_is_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    message = refusal(tmp_path, read_facts(checkpoints["qwen3"]))
    assert str(tmp_path) in message
    assert SINGLE in message


def test_a_parameter_that_the_map_does_not_fill_is_an_error(checkpoints: dict[str, Path]) -> None:
    folder = checkpoints["qwen3"]
    facts = read_facts(folder)
    like = megatron_parameters(facts, 1, 0, load_file(folder / SINGLE))
    with pytest.raises(RuntimeError, match="decoder.extra.weight"):
        load(folder, facts, 1, 0, like | {"decoder.extra.weight": torch.zeros(2, 2)}, torch.float32)
