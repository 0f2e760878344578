"""`a3po convert`: the torch_dist folder holds Megatron's own layout, and everything comes back bit for bit."""

from __future__ import annotations

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from a3po_megatron import cli
from a3po_megatron.convert import convert as convert_module
from a3po_megatron.model import cut
from a3po_megatron.model.cut import LearnerRank, Piece, pieces
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import layout_of
from a3po_megatron.model.read import read_facts
from tests.harness.ranks import CaseRanks, run_ranks
from tests.harness.tiny_models import KINDS, hf_model, hf_tensors_of, make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Three query heads to a KV head, and layers, heads and KV heads all differ.
UNEQUAL = {"num_attention_heads": 6, "num_key_value_heads": 2, "num_hidden_layers": 3}
Tensors = dict[str, Tensor]


# --- helpers, also of test_convert_damage.py ----------------------------------------------------------------------


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


def convert(*words: object) -> Ended:
    """`a3po convert …` in this process, as `main` ends it."""
    out, err, before = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["a3po", "convert", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as caught:
            cli.main()
    finally:
        sys.argv = before
    code = caught.value.code
    assert code is None or isinstance(code, int), code
    return Ended(code or 0, out.getvalue(), err.getvalue())


def converted(*words: object) -> Ended:
    """A conversion that must succeed, in one process unless the words say otherwise."""
    ended = convert(*words) if "--workers" in words else convert(*words, "--workers", 1)
    assert ended.code == 0, ended
    return ended


def start(*words: object) -> subprocess.Popen[str]:
    """`python -m a3po_megatron convert …` as a process of its own."""
    command = [sys.executable, "-m", "a3po_megatron", "convert", *map(str, words)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def partial(destination: Path) -> Path:
    return destination.parent / f".{destination.name}.partial"


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of an HF folder; the index and the files must agree."""
    if not (folder / INDEX).exists():
        return load_file(folder / SINGLE)
    where: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
    found: Tensors = {}
    for file in sorted(set(where.values())):
        held = load_file(folder / file)
        assert held.keys() == {name for name, place in where.items() if place == file}, file
        found |= held
    return found


def copy_hf(
    source: Path, folder: Path, shards: int = 1, change: Callable[[Tensors], Tensors] = lambda tensors: tensors
) -> Path:
    """An HF folder again with all its side files, its tensors changed, in one file or over several with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != INDEX:
            shutil.copy(path, folder)
    tensors = change(read_tensors(source))
    if shards == 1:
        save_file(tensors, folder / SINGLE, {"format": "pt"})
        return folder
    where = {name: f"model-{number % shards + 1}.safetensors" for number, name in enumerate(sorted(tensors))}
    for file in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == file}, folder / file, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


def edit_config(folder: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Changes config.json, which comes out in a form that no program would write again by itself."""
    config = change(json.loads((folder / "config.json").read_text()))
    (folder / "config.json").write_text("\n" + json.dumps(config, indent=3) + " \n\n")
    return config


def assert_same_bits(found: Tensors, wanted: Tensors) -> None:
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        # Bytes, so that 0.0 and -0.0 differ.
        assert torch.equal(found[name].contiguous().view(torch.uint8), value.contiguous().view(torch.uint8)), name


def there_and_back(source: Path, folder: Path, *options: object) -> Path:
    converted("import", source, folder / "megatron")
    converted("export", folder / "megatron", folder / "back", *options)
    return folder / "back"


def make_unequal(folder: Path, kind: str, seed: int = 0, **changes: object) -> Path:
    width = {"hidden_size": 96} if kind == "qwen2" else {}  # which has no head_dim of its own
    return make_checkpoint(folder, kind, seed, **UNEQUAL | width | changes)


def with_dtype(source: Path, folder: Path, dtype: str) -> Path:
    """The checkpoint in another dtype, as its config says too."""
    copy_hf(source, folder, 1, lambda tensors: {name: value.to(DTYPES[dtype]) for name, value in tensors.items()})
    edit_config(folder, lambda config: config | {"dtype": dtype})
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """(kind, dtype) → a checkpoint with unequal head counts, an odd vocabulary and filled biases."""
    folder = tmp_path_factory.mktemp("sources")
    found = {}
    for kind in KINDS:
        found[kind, "float32"] = make_unequal(folder / kind, kind)
        found[kind, "bfloat16"] = with_dtype(found[kind, "float32"], folder / f"{kind}-bf16", "bfloat16")
    return found


# --- HF → Megatron → HF -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_comes_back_bit_for_bit_and_every_side_file_byte_for_byte(
    sources: dict[tuple[str, str], Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    source = copy_hf(sources[kind, dtype], tmp_path / "source", 3 if dtype == "bfloat16" else 1)
    edit_config(source, lambda config: config)
    back = there_and_back(source, tmp_path)
    tensors = read_tensors(source)
    assert {value.dtype for value in tensors.values()} == {DTYPES[dtype]}
    assert_same_bits(read_tensors(back), tensors)
    beside = {path.name for path in source.iterdir() if path.suffix != ".safetensors" and path.name != INDEX}
    assert {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"} <= beside
    for name in beside:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name
        assert (tmp_path / "megatron" / "hf" / name).read_bytes() == (source / name).read_bytes(), name
    assert {path.name for path in back.iterdir()} == {*beside, SINGLE, "digests.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"source", "megatron", "back"}


def test_every_file_that_a_tokenizer_may_consist_of_is_kept(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = copy_hf(sources["qwen2", "float32"], tmp_path / "source")
    names = ["vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "chat_template.jinja"]
    for name in [*names, "tokenizer.model"]:
        (source / name).write_bytes(f"{{}} \r\n {name} ".encode())
    back = there_and_back(source, tmp_path)
    for name in [*names, "tokenizer.model"]:
        assert (back / name).read_bytes() == (source / name).read_bytes(), name


def test_a_folder_without_tokenizer_files_or_generation_config_converts_with_a_warning(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = copy_hf(sources["qwen3", "float32"], tmp_path / "source")
    assert "tokenizer" not in converted("import", source, tmp_path / "with-tokenizer").err
    for path in [*source.glob("tokenizer*"), source / "generation_config.json"]:
        path.unlink()
    ended = converted("import", source, tmp_path / "megatron")
    assert "warning" in ended.err.lower() and "tokenizer" in ended.err
    converted("export", tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source))
    assert {path.name for path in (tmp_path / "back").iterdir()} == {"config.json", SINGLE, "digests.json"}


def older_form(config: dict[str, Any]) -> dict[str, Any]:
    """The same config as transformers 4 writes it."""
    older = {name: value for name, value in config.items() if name not in ("rope_parameters", "dtype")}
    rope = dict(config["rope_parameters"])
    older |= {"rope_theta": rope.pop("rope_theta"), "torch_dtype": config["dtype"], "transformers_version": "4.51.0"}
    return older | {"rope_scaling": None if rope["rope_type"] == "default" else rope}


@pytest.mark.parametrize("older", [False, True], ids=["rope_parameters", "rope_theta and rope_scaling"])
@pytest.mark.parametrize("kind", ["qwen3", "llama31"])
def test_the_config_keeps_the_form_of_its_rope_and_all_its_fields(
    sources: dict[tuple[str, str], Path], tmp_path: Path, kind: str, older: bool
) -> None:
    source = copy_hf(sources[kind, "float32"], tmp_path / "source")
    config = edit_config(source, lambda config: (older_form(config) if older else config) | {"custom": [1.0, "é"]})
    assert ("rope_theta" in config, "rope_parameters" in config) == (older, not older)
    back = there_and_back(source, tmp_path)
    assert (back / "config.json").read_bytes() == (source / "config.json").read_bytes()
    converted("export", tmp_path / "megatron", tmp_path / "bf16", "--dtype", "bfloat16")
    field = "torch_dtype" if older else "dtype"
    assert json.loads((tmp_path / "bf16" / "config.json").read_text()) == config | {field: "bfloat16"}
    assert read_facts(back) == read_facts(tmp_path / "bf16") == read_facts(source)


@pytest.mark.parametrize("stored", DTYPES)
@pytest.mark.parametrize("asked", DTYPES)
def test_export_casts_as_torch_does_and_leaves_the_config_alone_where_nothing_changes(
    sources: dict[tuple[str, str], Path], tmp_path: Path, stored: str, asked: str
) -> None:
    source = sources["qwen3_moe", stored]
    back = there_and_back(source, tmp_path, "--dtype", asked)
    assert_same_bits(read_tensors(back), {n: t.to(DTYPES[asked]) for n, t in read_tensors(source).items()})
    before, after = ((folder / "config.json").read_bytes() for folder in (source, back))
    assert json.loads(after) == json.loads(before) | {"dtype": asked}
    assert stored != asked or after == before


def test_a_tensor_stored_in_another_dtype_is_kept_or_refused_by_name_but_never_cast(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    name = "model.norm.weight"
    source = copy_hf(sources["qwen3", "bfloat16"], tmp_path / "source", 1, lambda t: t | {name: t[name].float() + 1e-6})
    ended = convert("import", source, tmp_path / "megatron", "--workers", 1)
    if ended.code:
        assert ended.code == 2 and name in ended.err
        return
    converted("export", tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "llama", "qwen3_moe"])
def test_tied_and_untied_models_convert_in_one_process_without_influence_on_each_other(
    tmp_path: Path, kind: str
) -> None:
    for number, tied in enumerate((True, False, True)):
        folder = tmp_path / str(number)
        source = make_unequal(folder / "source", kind, seed=number, tie_word_embeddings=tied)
        tensors = read_tensors(source)
        assert ("lm_head.weight" in tensors) == (not tied)
        assert_same_bits(read_tensors(there_and_back(source, folder)), tensors)


def test_the_output_layer_that_a_tied_checkpoint_stores_again_is_not_needed(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    head = "lm_head.weight"
    again = copy_hf(
        sources["qwen3", "float32"], tmp_path / "source", 3, lambda t: t | {head: t["model.embed_tokens.weight"] + 0}
    )
    found, wanted = read_tensors(there_and_back(again, tmp_path)), read_tensors(again)
    assert torch.equal(found.pop(head, wanted[head]), wanted[head])
    assert_same_bits(found, {name: value for name, value in wanted.items() if name != head})
    assert "output_layer.weight" not in stored(tmp_path / "megatron")


def test_what_is_exported_in_shards_loads_in_transformers_and_no_file_is_larger_than_asked(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source, limit = sources["qwen3_moe", "float32"], 60_000
    tensors = read_tensors(source)
    assert max(value.nbytes for value in tensors.values()) < limit
    back = there_and_back(source, tmp_path, "--shard-bytes", limit)
    files = sorted(path.name for path in back.glob("*.safetensors"))
    assert len(files) >= sum(value.nbytes for value in tensors.values()) / limit > 3
    assert files == [f"model-{k + 1:05}-of-{len(files):05}.safetensors" for k in range(len(files))]
    for file in files:
        assert sum(value.nbytes for value in load_file(back / file).values()) <= limit, file
    index = json.loads((back / INDEX).read_text())
    assert set(index["weight_map"].values()) == set(files)
    assert index["metadata"]["total_size"] == sum(value.nbytes for value in tensors.values())
    assert_same_bits(read_tensors(back), tensors)
    assert_same_bits(hf_tensors_of(hf_model(back, torch.float32).state_dict()), tensors)


def test_a_tensor_larger_than_the_shard_asked_for_has_a_file_of_its_own(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = sources["llama", "float32"]
    back = there_and_back(source, tmp_path, "--shard-bytes", 1)
    assert_same_bits(read_tensors(back), read_tensors(source))
    assert len(list(back.glob("*.safetensors"))) == len(read_tensors(source))


def test_neither_workers_nor_buckets_nor_the_size_of_shards_change_a_bit(
    sources: dict[tuple[str, str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of an import are processes; what those of an export would do is done here, since each takes seconds to
    start."""
    source = sources["qwen3_moe", "bfloat16"]
    options = ["--workers", 2, "--bucket-bytes", 4096]
    converted("import", source, tmp_path / "parallel", *options)
    converted("import", source, tmp_path / "plain")
    assert_same_bits(stored(tmp_path / "parallel"), stored(tmp_path / "plain"))
    monkeypatch.setattr(convert_module, "run_jobs", lambda jobs, show: [job(show) for job in jobs])
    converted("export", tmp_path / "plain", tmp_path / "back", *options, "--shard-bytes", 50_000)
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source))
    assert_digests(tmp_path / "parallel", "*.distcp")
    assert_digests(tmp_path / "back", "*.safetensors")


def assert_digests(folder: Path, pattern: str) -> None:
    wanted = {}
    # What says where the weights lie is hashed as well.
    index = [INDEX] if (folder / INDEX).exists() else []
    names = [".metadata", "metadata.json", "common.pt"] if pattern == "*.distcp" else index
    for path in [*folder.glob(pattern), *(folder / name for name in names)]:
        wanted[path.name] = {"bytes": path.stat().st_size, "blake3": blake3(path.read_bytes()).hexdigest()}
    assert wanted
    assert json.loads((folder / "digests.json").read_text()) == {"algorithm": "blake3", "files": wanted}


def test_the_digests_are_those_of_the_files_on_disk(sources: dict[tuple[str, str], Path], tmp_path: Path) -> None:
    back = there_and_back(sources["qwen2", "float32"], tmp_path)
    assert_digests(tmp_path / "megatron", "*.distcp")
    assert_digests(back, "*.safetensors")


# --- what the torch_dist folder holds -----------------------------------------------------------------------------


def stored(folder: Path) -> Tensors:
    """All tensors of a torch_dist folder, by torch's own reader; every element must lie in exactly one chunk."""
    metadata = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    found: Tensors = {}
    for key, entry in metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            assert sum(chunk.sizes.numel() for chunk in entry.chunks) == entry.size.numel(), key
            # Whatever the chunks leave out stays NaN, which no checkpoint holds.
            found[key] = torch.full(entry.size, torch.nan, dtype=entry.properties.dtype)
    dcp.load(found, checkpoint_id=folder, no_dist=True)
    return found


def literal(facts: ModelFacts, hf: Tensors) -> Tensors:
    """What Megatron-Core 0.16.1 stores by default, said literally: one tensor per kind, layers stacked first."""

    def stacked(name: str) -> Tensor:
        return torch.stack([hf[f"model.layers.{layer}.{name}"] for layer in range(facts.layers)])

    def qkv(kind: str) -> Tensor:
        layers = []
        for layer in range(facts.layers):
            q, k, v = (hf[f"model.layers.{layer}.self_attn.{name}_proj.{kind}"] for name in "qkv")
            rows = []
            for group in range(facts.kv_heads):
                heads, size = facts.heads // facts.kv_heads, facts.head_dim
                rows += [q[(group * heads + head) * size :][:size] for head in range(heads)]
                rows += [k[group * size :][:size], v[group * size :][:size]]
            layers.append(torch.cat(rows))
        return torch.stack(layers)

    def fc1(name: str) -> Tensor:
        return torch.cat([stacked(f"{name}.gate_proj.weight"), stacked(f"{name}.up_proj.weight")], dim=1)

    attention, mlp = "decoder.layers.self_attention.", "decoder.layers.mlp."
    found = {
        "embedding.word_embeddings.weight": hf["model.embed_tokens.weight"],
        f"{attention}linear_qkv.layer_norm_weight": stacked("input_layernorm.weight"),
        f"{attention}linear_qkv.weight": qkv("weight"),
        f"{attention}linear_proj.weight": stacked("self_attn.o_proj.weight"),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if facts.qkv_bias:
        found[f"{attention}linear_qkv.bias"] = qkv("bias")
    if facts.qk_norm:
        found[f"{attention}q_layernorm.weight"] = stacked("self_attn.q_norm.weight")
        found[f"{attention}k_layernorm.weight"] = stacked("self_attn.k_norm.weight")
    if not facts.tied:
        found["output_layer.weight"] = hf["lm_head.weight"]
    # The local spec writes this name for experts too, the Transformer Engine spec only for dense models.
    found[f"{mlp}linear_fc1.layer_norm_weight"] = stacked("post_attention_layernorm.weight")
    if facts.experts is None:
        found |= {f"{mlp}linear_fc1.weight": fc1("mlp"), f"{mlp}linear_fc2.weight": stacked("mlp.down_proj.weight")}
    else:
        names = [f"mlp.experts.{expert}" for expert in range(facts.experts.count)]
        found[f"{mlp}router.weight"] = stacked("mlp.gate.weight")
        found[f"{mlp}experts.experts.linear_fc1.weight"] = torch.stack([fc1(name) for name in names], dim=1)
        down = torch.stack([stacked(f"{name}.down_proj.weight") for name in names], dim=1)
        found[f"{mlp}experts.experts.linear_fc2.weight"] = down
    return found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_the_checkpoint_holds_megatrons_layout_said_literally(
    sources: dict[tuple[str, str], Path], tmp_path: Path, kind: str, dtype: str
) -> None:
    source = sources[kind, dtype]
    converted("import", source, tmp_path / "megatron")
    found, facts = stored(tmp_path / "megatron"), read_facts(source)
    # Megatron's two specs name the norm before experts differently; a checkpoint may hold either name, or both.
    ours, te = "decoder.layers.mlp.linear_fc1.layer_norm_weight", "decoder.layers.pre_mlp_layernorm.weight"
    if facts.experts is not None and te in found:
        norm = found.pop(te)
        assert torch.equal(found.setdefault(ours, norm), norm)
    assert_same_bits(found, literal(facts, read_tensors(source)))
    assert json.loads((tmp_path / "megatron" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


# (kind, layout of two ranks). Tensor parallelism pads the vocabulary of 67, which the checkpoint does not.
MEGATRON_READS: list[tuple[str, dict[str, Any]]] = [
    *(("qwen3", {"tensor": 2}), ("qwen3", {"pipeline": 2}), ("qwen2", {"tensor": 2})),
    *(("qwen3_moe", {"data": 2, "expert": 2}), ("qwen3_moe", {"tensor": 2})),
]


def megatron_reads(ranks: CaseRanks) -> list[str]:
    """The parameters that Megatron's own loader fills otherwise than our loader does from the HF folder."""
    from megatron.core import dist_checkpointing

    from a3po_megatron.config import MegatronOptions, ModelSettings, ParallelOptions
    from a3po_megatron.model.build import build_model, transformer_config
    from a3po_megatron.weights.load import load_shards

    wrong = []
    for kind, parallel in MEGATRON_READS:
        options, hf = ParallelOptions(**parallel), ranks.folder / kind
        cluster, facts = ranks.arrange(**parallel), read_facts(hf)
        layout = layout_of(options)
        settings = transformer_config(facts, options, ModelSettings(path=str(hf), dtype="float32"), MegatronOptions())
        (model,) = build_model(facts, layout, settings)
        place = layout.place(cluster.coordinates.pipeline, cluster.within)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(7.0)
        loaded = dist_checkpointing.load(model.sharded_state_dict(), str(ranks.folder / f"{kind}-megatron"))
        model.load_state_dict(loaded)
        wanted = {(0, name): torch.nn.Parameter(torch.zeros_like(value)) for name, value in model.named_parameters()}
        load_shards(hf, facts, pieces(facts, layout, place), wanted)
        for name, value in model.named_parameters():
            if not torch.equal(value, wanted[0, name]):
                wrong.append(f"{kind} {parallel}: {name}")
    return wrong


def a_router_with_a_bias(ranks: CaseRanks) -> str:
    """What is said of a model whose routers have a bias, which Megatron keeps in a buffer."""
    from a3po_megatron.config import MegatronOptions, ModelSettings, ParallelOptions
    from a3po_megatron.errors import RequestError
    from a3po_megatron.model.build import build_model, transformer_config

    options, hf = ParallelOptions(data=2), ranks.folder / "qwen3_moe"
    facts = read_facts(hf)
    ranks.arrange(data=2)
    settings = transformer_config(facts, options, ModelSettings(path=str(hf), dtype="float32"), MegatronOptions())
    settings.moe_router_enable_expert_bias, settings.moe_router_score_function = True, "sigmoid"
    try:
        build_model(facts, layout_of(options), settings)
    except RequestError as error:
        return str(error)
    return "built"


def test_megatrons_own_loader_fills_its_models_from_the_checkpoint_at_any_layout_and_refuses_what_it_would_lose(
    tmp_path: Path,
) -> None:
    for kind in {kind for kind, _ in MEGATRON_READS}:
        converted("import", make_checkpoint(tmp_path / kind, kind), tmp_path / f"{kind}-megatron")
    found = run_ranks(2, megatron_reads, a_router_with_a_bias, folder=tmp_path, timeout=120)
    assert found["megatron_reads"] == [[], []]
    for said in found["a_router_with_a_bias"]:
        assert "the buffer decoder.layers.0.mlp.router.expert_bias (" in said


# --- verify -------------------------------------------------------------------------------------------------------

# Sizes that 4 divides; 7 layers, which are even over no number of stages, and enough for 3 × 2 of them.
DEEP = {"num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 7}
STAGES = [(1, 1), (2, 1), (2, 2), (3, 1), (3, 2)]  # pipeline, virtual
TWINS = {"llama31": "llama", "qwen3_moe_raw": "qwen3_moe"}  # the same tensors: a smaller grid does


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("deep")
    return {kind: make_checkpoint(folder / kind, kind, **DEEP) for kind in KINDS}


def layouts(kind: str) -> Iterator[list[object]]:
    """The options of the full grid that this kind has."""
    for tensor in (1, 2, 4):
        for pipeline, virtual in STAGES if kind not in TWINS else [(1, 1), (3, 2)]:
            plain: list[object] = ["--tensor", tensor, "--pipeline", pipeline, "--virtual", virtual]
            yield plain
            if not kind.startswith("qwen3_moe"):
                continue
            yield [*plain, "--expert", 2, "--expert-tensor", 1]
            if (pipeline, virtual) == (2, 1):
                yield [*plain, "--expert", 2]
                yield [*plain, "--expert", 4, "--expert-tensor", 1]
                yield [*plain, "--expert", 1, "--expert-tensor", 2]
                yield [*plain, "--expert", 4, "--expert-tensor", 4]


# Families differ in their tables alone, which the local scheme proves: of the other one, dense and experts.
GRID = [(kind, scheme) for kind in KINDS for scheme in ("local", "te")]
IMPLIED = [pair for pair in GRID if pair[1] == "te" and pair[0] not in ("qwen3", "qwen3_moe")]


@pytest.mark.parametrize(
    ("kind", "scheme"), [pytest.param(*pair, marks=[pytest.mark.soak] * (pair in IMPLIED)) for pair in GRID]
)
def test_verify_proves_the_whole_grid_of_layouts(deep: dict[str, Path], kind: str, scheme: str) -> None:
    wrong = []
    for options in layouts(kind):
        ended = convert("verify", deep[kind], *options, "--scheme", scheme)
        if ended.code or not ended.out.strip():
            wrong.append((options, ended))
    assert not wrong, wrong[0]


def test_verify_says_where_the_bytes_go_and_writes_nothing(
    sources: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    source = copy_hf(sources["qwen2", "bfloat16"], tmp_path / "source", 3)
    before = {path: path.read_bytes() for path in source.iterdir()}
    ended = convert("verify", source, "--tensor", 2, "--pipeline", 2)
    assert ended.code == 0, ended
    assert "error" not in ended.err.lower()
    # A row for each of the four ranks.
    assert len([line for line in ended.out.splitlines() if re.search(r"\d", line)]) >= 4, ended.out
    assert {path: path.read_bytes() for path in source.iterdir()} == before
    assert list(tmp_path.iterdir()) == [source]


def lost(piece: Piece) -> list[Piece]:
    return []


def shifted(piece: Piece) -> list[Piece]:
    """The last rows in place of the first."""
    values = {name: getattr(piece, name) for name in Piece.__dataclass_fields__ if name != "numel"}
    return [Piece(**values | {"start": piece.shape[0] - piece.length if piece.start == 0 else 0})]


def twice(piece: Piece) -> list[Piece]:
    return [piece, piece]


@pytest.mark.parametrize("fault", [lost, shifted, twice])
def test_verify_does_not_pass_a_map_that_loses_moves_or_doubles_a_slice(
    deep: dict[str, Path], monkeypatch: pytest.MonkeyPatch, fault: Callable[[Piece], list[Piece]]
) -> None:
    sound = cut._cut_block

    def spoiled(*arguments: Any) -> Iterator[Piece]:
        for piece in sound(*arguments):
            of_learner = type(arguments[1]) is LearnerRank and piece.start == 0
            damaged = of_learner and piece.tensor == "model.layers.5.self_attn.k_proj.weight"
            yield from fault(piece) if damaged else [piece]

    options = ("verify", deep["qwen3"], "--tensor", 2, "--pipeline", 2)
    assert convert(*options).code == 0
    monkeypatch.setattr(cut, "_cut_block", spoiled)
    try:
        ended = convert(*options)
    except Exception:  # a map that is wrong is a bug: a traceback is a fair answer
        return
    assert ended.code != 0, ended


@pytest.mark.parametrize(
    ("kind", "options", "named"),
    [
        ("qwen3", ["--tensor", 3], r"tensor\W+3"),
        ("qwen3", ["--tensor", 8], r"tensor\W+8"),
        ("qwen3", ["--pipeline", 8], r"pipeline\b.*8"),
        ("qwen3", ["--pipeline", 4, "--virtual", 2], r"virtual\b.*8"),
        ("qwen3", ["--virtual", 2], r"virtual\W+2"),
        ("qwen3", ["--expert", 2], r"expert\W+2"),
        ("qwen3", ["--expert-tensor", 2], r"expert.tensor"),
        ("qwen3_moe", ["--expert", 3], r"expert\W+3"),
        ("qwen3_moe", ["--expert-tensor", 5], r"expert.tensor\W+5"),
        ("qwen3_moe", ["--expert", 8], r"expert\W+8"),
        ("qwen3", ["--scheme", "other"], "scheme"),
        ("qwen3", ["--tensor", 0], "tensor"),
    ],
)
def test_verify_refuses_a_layout_that_the_model_does_not_fit_and_names_the_option(
    deep: dict[str, Path], kind: str, options: list[object], named: str
) -> None:
    assert convert("verify", deep[kind]).code == 0
    ended = convert("verify", deep[kind], *options)
    assert ended.code == 2, ended
    assert re.search(named, ended.err), ended
    assert "Traceback" not in ended.err
