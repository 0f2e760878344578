"""`a3po convert` and the forms in which weights come: fused experts, FP8, mixed dtypes; and those that are not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from a3po_megatron.data.tokenizer import Tokenizer
from a3po_megatron.errors import RequestError
from a3po_megatron.model.cut import pieces
from a3po_megatron.model.layout import Layout
from a3po_megatron.model.read import read_facts
from a3po_megatron.weights.load import check_checkpoint, load_shards
from tests.harness.tiny_models import hf_tensors_of
from tests.test_convert import (
    INDEX,
    SINGLE,
    Tensors,
    assert_same_bits,
    convert,
    converted,
    copy_hf,
    edit_config,
    make_unequal,
    read_tensors,
    there_and_back,
    with_dtype,
)
from tests.test_convert_damage import assert_hf_refused, assert_one_message

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 123456\n"
EXPERTS = "model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_unequal(tmp_path_factory.mktemp("source") / "qwen2", "qwen2")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_unequal(tmp_path_factory.mktemp("moe") / "qwen3_moe", "qwen3_moe")


# --- fused experts ------------------------------------------------------------------------------------------------


def fused(source: Path, folder: Path, dtype: torch.dtype = torch.float32, shards: str = "5GB") -> Path:
    """The checkpoint as transformers itself writes what it holds in memory."""
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
    model.save_pretrained(folder, save_original_format=False, max_shard_size=shards)
    for path in source.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    names = read_tensors(folder).keys()
    assert f"{EXPERTS}gate_up_proj" in names and f"{EXPERTS}0.up_proj.weight" not in names
    return folder


@pytest.mark.parametrize(("dtype", "shards"), [(torch.float32, "5GB"), (torch.bfloat16, "40KB")])
def test_fused_experts_are_taken_apart_bit_for_bit_and_exported_as_the_hub_has_them(
    moe: Path, tmp_path: Path, dtype: torch.dtype, shards: str
) -> None:
    folder = fused(moe, tmp_path / "fused", dtype, shards)
    ended = converted("import", folder, tmp_path / "megatron")
    assert "fused" in ended.err and "gate_up_proj" in ended.err
    converted("export", tmp_path / "megatron", tmp_path / "back")
    wanted = {name: value.to(dtype) for name, value in read_tensors(moe).items()}
    assert_same_bits(read_tensors(tmp_path / "back"), wanted)
    assert_same_bits(hf_tensors_of(read_tensors(folder)), wanted)  # transformers' form, by another reader
    assert "every bit survives" in convert("verify", folder, "--expert", 2, "--pipeline", 3).out


def test_training_reads_fused_experts_where_they_lie(moe: Path, tmp_path: Path) -> None:
    folder = fused(moe, tmp_path / "fused")
    facts, layout = read_facts(folder), Layout(tensor=2, expert=2, expert_tensor=1)
    for place in layout.places():
        mine = pieces(facts, layout, place)
        shards = []
        for origin in (moe, folder):
            ends: dict[Any, int] = {}
            for piece in mine:
                ends[piece.key] = max(ends.get(piece.key, 0), piece.offset + piece.length)
            parameters = {
                piece.key: torch.full(
                    [ends[piece.key] if dim == piece.dim else size for dim, size in enumerate(piece.shape)], torch.nan
                )
                for piece in mine
            }
            load_shards(origin, facts, mine, parameters)
            shards.append({str(key): value for key, value in parameters.items()})
        assert_same_bits(shards[1], shards[0])


@pytest.mark.parametrize("sizes", [{}, {"hidden_size": 48, "moe_intermediate_size": 24}, {"moe_intermediate_size": 96}])
def test_fused_experts_the_other_way_round_or_stored_twice_are_refused(tmp_path: Path, sizes: dict[str, int]) -> None:
    """Also at sizes at which one of the two tensors is square."""
    apart = make_unequal(tmp_path / "apart", "qwen3_moe", **{"hidden_size": 96, "moe_intermediate_size": 40} | sizes)
    folder = fused(apart, tmp_path / "fused")

    def turned(tensors: Tensors) -> Tensors:
        return {
            n: t.mT.contiguous() if n.endswith(("gate_up_proj", ".experts.down_proj")) else t
            for n, t in tensors.items()
        }

    assert_hf_refused(copy_hf(folder, tmp_path / "turned", 1, turned), ".mlp.experts.", "transposed")
    one = f"{EXPERTS}2.up_proj.weight"
    twice = copy_hf(folder, tmp_path / "twice", 1, lambda tensors: tensors | {one: read_tensors(apart)[one]})
    assert_hf_refused(twice, one, "fused")
    lost = copy_hf(folder, tmp_path / "lost", 1, lambda t: {n: v for n, v in t.items() if n != f"{EXPERTS}down_proj"})
    assert_hf_refused(lost, f"{EXPERTS}0.down_proj.weight", "lacks")


# --- FP8 ----------------------------------------------------------------------------------------------------------


def quantised(
    value: torch.Tensor, block: tuple[int, int], form: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes, and scales in their form, as DeepSeek's release has them: of every block, the last ones cut short."""
    rows, columns = block
    largest = [
        [float(value[i : i + rows, j : j + columns].abs().max()) for j in range(0, value.shape[1], columns)]
        for i in range(0, value.shape[0], rows)
    ]
    scales = form(torch.tensor(largest) / 448)
    codes = (value / spread(factors(scales), block, value)).clamp(-448, 448)
    return codes.to(torch.float8_e4m3fn), scales


def factors(scales: torch.Tensor) -> torch.Tensor:
    return (scales.float() - 127).exp2() if scales.dtype == torch.uint8 else scales.float()


def spread(scales: torch.Tensor, block: tuple[int, int], like: torch.Tensor) -> torch.Tensor:
    """Every element's scale, by its place."""
    i, j = torch.arange(like.shape[0]), torch.arange(like.shape[1])
    return scales[(i // block[0])[:, None], (j // block[1])[None, :]]


def powers(scales: torch.Tensor) -> torch.Tensor:
    return scales.log2().ceil().exp2()


SCALES: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "float32": lambda scales: scales,
    "bfloat16": lambda scales: scales.bfloat16(),
    "ue8m0": lambda scales: powers(scales).to(torch.float8_e8m0fnu),
    "exponents": lambda scales: (scales.log2().ceil() + 127).to(torch.uint8),
}


def fp8_folder(
    source: Path, folder: Path, block: tuple[int, int] | None, scales: str = "float32", **more: Any
) -> tuple[Path, dict[str, tuple[torch.Tensor, torch.Tensor]]]:
    """A release in FP8 of a checkpoint, and its codes and scales; layer 0's o_proj is left as it was."""
    codes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    ending = "_scale_inv" if block or scales != "float32" else "_scale"

    def change(tensors: Tensors) -> Tensors:
        found = {}
        for name, value in tensors.items():
            if not name.endswith("_proj.weight") or "layers.0.self_attn.o_proj" in name:
                found[name] = value
                continue
            code, scale = quantised(value.float(), block or (value.shape[0], value.shape[1]), SCALES[scales])
            codes[name] = code, scale
            found |= {name: code, f"{name}{ending}": scale if block else scale[0, 0].clone()}
            found |= {} if block else {name.replace("weight", "input_scale"): torch.ones(())}
        return found

    copy_hf(source, folder, 3, change)
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": block and list(block)}
    settings |= {"modules_to_not_convert": ["lm_head", "model.layers.0.self_attn.o_proj"], **more}
    edit_config(folder, lambda config: config | {"dtype": "bfloat16", "quantization_config": settings})
    return folder, codes


@pytest.mark.parametrize(
    ("kind", "block", "scales", "divides"),
    [
        ("qwen3_moe", (8, 8), "float32", True),
        ("qwen2", (8, 16), "ue8m0", True),
        ("qwen2", (16, 16), "exponents", True),
        ("qwen2", (16, 64), "bfloat16", False),
        ("qwen3_moe", (128, 128), "float32", False),  # the blocks of the releases: all are cut short here
        ("qwen2", (64, 128), "ue8m0", False),
        ("qwen2", None, "float32", True),
    ],
)
def test_fp8_is_dequantised_as_transformers_does_and_a_block_that_is_cut_short_is_of_the_size_that_is_named(
    tmp_path: Path, kind: str, block: tuple[int, int] | None, scales: str, divides: bool
) -> None:
    source = with_dtype(make_unequal(tmp_path / "float32", kind), tmp_path / "bf16", "bfloat16")
    folder, codes = fp8_folder(source, tmp_path / "fp8", block, scales)
    ended = converted("import", folder, tmp_path / "megatron", "--bucket-bytes", 4096)
    assert f"dequantised {len(codes)} of {len(read_tensors(source))} tensors" in ended.err
    assert "kept as" not in ended.err
    converted("export", tmp_path / "megatron", tmp_path / "back")
    wanted = read_tensors(source)
    for name, (code, scale) in codes.items():
        wanted[name] = (code.float() * spread(factors(scale), block or tuple(code.shape), code)).bfloat16()  # type: ignore[arg-type]
        theirs = Fp8Dequantize(None)
        if divides:
            assert torch.equal(theirs._dequantize_one(code, scale, torch.bfloat16), wanted[name])
    assert_same_bits(read_tensors(tmp_path / "back"), wanted)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == config
    # The rounding of e4m3 is half of 2^-3 of a value, or half of its smallest step.
    for name, value in read_tensors(source).items():
        assert (wanted[name].float() - value.float()).abs().max() <= value.float().abs().max() / 14, name


def test_fp8_is_not_trained_and_where_it_contradicts_itself_it_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    source = with_dtype(source, tmp_path / "bf16", "bfloat16")
    folder, _ = fp8_folder(source, tmp_path / "fp8", (16, 16))
    for attempt in (lambda: read_facts(folder), lambda: check_checkpoint(folder, read_facts(folder))):
        with pytest.raises(RequestError, match="quantised \\(fp8\\).*import, export it first"):
            attempt()
    assert_one_message(convert("verify", folder), "import, export it first")
    name = "model.layers.1.mlp.up_proj.weight"
    scale = f"{name}_scale_inv"
    tensors = read_tensors(folder)
    bad: list[tuple[Callable[[Tensors], Tensors], list[str]]] = [
        (lambda t: {n: v for n, v in t.items() if n != scale}, [name, "without its scale"]),
        (lambda t: t | {scale: t[scale][:-1].clone()}, [scale, "5 × 6", "16 × 16"]),
        (lambda t: t | {scale: t[scale].double()}, [scale, "F64"]),
        (lambda t: t | {name: t[name].float()}, [scale, "not stored as F8_E4M3"]),
        (lambda t: t | {name: t[name].float().to(torch.float8_e5m2)}, [scale]),
        (lambda t: t | {scale: torch.full_like(t[scale], torch.nan)}, [name, "not finite"]),
        (lambda t: {n: v for n, v in read_tensors(source).items()}, ["quantization_config", "F8_E4M3"]),
    ]
    for number, (change, named) in enumerate(bad):
        other = copy_hf(folder, tmp_path / str(number), 1, change)
        assert_one_message(convert("import", other, tmp_path / "destination", "--workers", 1), *named)
        assert not (tmp_path / "destination").exists()
    silent = copy_hf(folder, tmp_path / "silent", 1, lambda t: t | tensors)
    edit_config(silent, lambda config: {n: v for n, v in config.items() if n != "quantization_config"})
    assert_hf_refused(silent, "weight_scale_inv", "FP8", "quantization_config")


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        *(({"quant_method": method, "bits": 4}, method) for method in ("gptq", "awq", "mxfp4", "compressed-tensors")),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"_load_in_4bit": True}, "bitsandbytes"),
        ({"bits": 4}, "without a name"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, "weight_block_size = [128]"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ([1], "quantization_config = [1]"),
    ],
)
def test_what_is_quantised_otherwise_is_refused_by_the_methods_name(
    source: Path, tmp_path: Path, settings: Any, named: str
) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    edit_config(folder, lambda config: config | {"quantization_config": settings})
    assert_hf_refused(folder, "quantization_config", named)


@pytest.mark.parametrize("ending", [".qweight", ".weight.absmax", ".weight_packed"])
def test_quantised_weights_that_the_config_does_not_tell_of_are_refused_by_their_names(
    source: Path, tmp_path: Path, ending: str
) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    other = name.removesuffix(".weight") + ending
    change: Callable[[Tensors], Tensors] = lambda t: {n: v for n, v in t.items() if n != name} | {other: t[name]}  # noqa: E731
    assert_hf_refused(copy_hf(source, tmp_path / "folder", 1, change), other, "quantised", "quantization_config")


# --- dtypes -------------------------------------------------------------------------------------------------------


def test_tensors_of_several_dtypes_come_back_as_they_are_and_only_those_that_differ_are_remarked(
    source: Path, tmp_path: Path
) -> None:
    def change(tensors: Tensors) -> Tensors:
        return {n: t if n.endswith("norm.weight") else t.bfloat16() for n, t in tensors.items()}

    folder = copy_hf(source, tmp_path / "folder", 2, change)
    edit_config(folder, lambda config: config | {"dtype": "bfloat16"})
    said = converted("import", folder, tmp_path / "megatron").err
    assert said.startswith("warning: ") and said.count("\n") == 1
    assert f"says bfloat16, and 7 of {len(read_tensors(source))} tensors are float32 (model.layers.0.input_" in said
    converted("export", tmp_path / "megatron", tmp_path / "back")
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(folder))
    edit_config(folder, lambda config: config | {"dtype": "float32"})
    assert "says float32, and 32 of" in converted("import", folder, tmp_path / "other").err
    edit_config(folder, lambda config: config | {"dtype": "float16"})
    assert "the weights are bfloat16 and float32" in converted("import", folder, tmp_path / "third").err
    edit_config(folder, lambda config: {name: value for name, value in config.items() if name != "dtype"})
    assert converted("import", folder, tmp_path / "fourth").err == ""


# --- files beside the weights -------------------------------------------------------------------------------------


def test_chat_templates_of_every_name_and_processor_files_survive(source: Path, tmp_path: Path) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    beside = {
        **{"chat_template.jinja": "{{ 1 }}", "additional_chat_templates/tool_use.jinja": "{{ 2 }}"},
        **{
            "additional_chat_templates/rag.jinja": "{{ 3 }}",
            "processor_config.json": "{}",
            "tokenizer.4.0.0.json": "{}",
        },
    }
    (folder / "additional_chat_templates").mkdir()
    for name, text in beside.items():
        (folder / name).write_text(text)
    (folder / "additional_chat_templates" / "notes.txt").write_text("")
    back = there_and_back(folder, tmp_path)
    assert {name: (back / name).read_text() for name in beside} == beside
    assert {path.name for path in (back / "additional_chat_templates").iterdir()} == {"tool_use.jinja", "rag.jinja"}
    tokenizer = Tokenizer(back, 67, (1,), "raw")._tokenizer
    assert tokenizer.chat_template == {"default": "{{ 1 }}", "tool_use": "{{ 2 }}", "rag": "{{ 3 }}"}


# --- folders that are not read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SINGLE, "config.json", "tokenizer.json", "generation_config.json"])
def test_a_git_lfs_pointer_is_called_by_its_name(source: Path, tmp_path: Path, name: str) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    (folder / name).write_text(LFS)
    assert_one_message(
        convert("import", folder, tmp_path / "ckpt"), str(folder / name), "git-lfs pointer", "git lfs pull"
    )
    if name == "tokenizer.json":
        with pytest.raises(RequestError, match="git-lfs pointer"):
            Tokenizer(folder, 67, (1,), "raw")


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("tokenizer.json", {"pre_tokenizer": {"type": "FutureSplit", "x": 1}}),
        ("tokenizer.json", {"model": {"type": "WordLevel", "vocab": [1]}}),
        ("tokenizer.json", {"added_tokens": 5}),
        ("tokenizer_config.json", {"extra_special_tokens": 5, "additional_special_tokens": {"a": []}}),
    ],
)
def test_a_tokenizer_that_cannot_be_read_is_refused_in_one_line_with_its_folder(
    source: Path, tmp_path: Path, file: str, change: dict[str, Any]
) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | change))
    with pytest.raises(RequestError) as caught:
        Tokenizer(folder, 67, (1,), "raw")
    said = str(caught.value)
    assert said.startswith(f"{folder}: the tokenizer cannot be read by ") and "\n" not in said and "newer" in said


def pointers(folder: Path) -> None:
    (folder / INDEX).write_text(LFS)


def pickles(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model-00001-of-00002.bin")
    (folder / "training_args.bin").write_bytes(b"")


def adapter(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text("{}")
    save_file({"base_model.model.model.layers.0.x.lora_A.weight": torch.ones(1)}, folder / "adapter_model.safetensors")


def below(folder: Path) -> None:
    (folder / "model").mkdir()
    save_file({"x": torch.ones(1)}, folder / "model" / SINGLE)


NOT_READ: list[tuple[Callable[[Path], Any], list[str]]] = [
    (pointers, [INDEX, "git-lfs pointer"]),
    (pickles, ["pytorch_model-00001-of-00002.bin", "pickled", "save_pretrained", "safetensors"]),
    (lambda folder: (folder / "consolidated.00.pth").write_bytes(b""), ["consolidated.00.pth", "pickled"]),
    (adapter, ["adapter_config.json", "merge", "merge_and_unload"]),
    (lambda folder: (folder / "qwen-q4_k_m.gguf").write_bytes(b"GGUF"), ["qwen-q4_k_m.gguf", "GGUF"]),
    (below, ["model/model.safetensors", "below"]),
    (lambda folder: save_file({}, folder / "model-00001-of-00001.safetensors"), ["rename it to model.safetensors"]),
    (lambda folder: [save_file({}, folder / f"model-{n}.safetensors") for n in "12"], ["without an index", "download"]),
    (lambda folder: (folder / "metadata.json").write_text("{}"), ["Megatron checkpoint", "export"]),
    (lambda folder: None, [SINGLE, INDEX, "model.path must hold"]),
]


@pytest.mark.parametrize(("make", "named"), NOT_READ)
def test_a_folder_in_another_form_is_recognised_and_answered_with_what_to_do(
    source: Path, tmp_path: Path, make: Callable[[Path], Any], named: list[str]
) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    (folder / SINGLE).unlink()
    make(folder)
    assert_hf_refused(folder, str(folder), *named)


def test_a_folder_without_its_config_or_with_lost_shards_says_what_is_missing(source: Path, tmp_path: Path) -> None:
    folder = copy_hf(source, tmp_path / "folder", 3)
    for number in (1, 3):
        (folder / f"model-{number}.safetensors").unlink()
    assert_hf_refused(folder, str(folder / INDEX), "model-1.safetensors", "1 more", "download it again")
    (folder / "config.json").unlink()
    assert_hf_refused(folder, str(folder / "config.json"), "weights without it", "download")


@pytest.mark.parametrize(
    ("rename", "named"),
    [
        (lambda name: f"_orig_mod.{name}", ["_orig_mod.", "torch.compile", "n.replace('_orig_mod.', '')"]),
        (lambda name: f"module.{name}", ["module.", "DDP", "n.replace('module.', '')"]),
        (lambda name: name.replace("layers.", "layers._fsdp_wrapped_module."), ["FSDP", "_fsdp_wrapped_module."]),
        (lambda name: name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."), ["activation checkpointing"]),
        (lambda name: f"model.{name}", ["model.model.embed_tokens.weight", "n.removeprefix('model.')"]),
        (lambda name: f"language_model.{name}", ["language_model. in front", "n.removeprefix('language_model.')"]),
        (lambda name: name.removeprefix("model."), ["no model. in front", "'model.' + n"]),
        (lambda name: f"policy.actor.{name}", ["policy.actor. in front"]),
    ],
)
def test_names_in_a_wrapping_are_shown_with_what_they_should_be_and_the_advice_works(
    source: Path, tmp_path: Path, rename: Callable[[str], str], named: list[str]
) -> None:
    folder = copy_hf(source, tmp_path / "folder", 1, lambda t: {rename(n): v for n, v in t.items()})
    assert_hf_refused(folder, *named, "save_pretrained")
    said = convert("verify", folder).err
    if "no model. in front" in said:  # lm_head has none to lose
        return
    exec(said.partition('python -c "')[2].rpartition('"')[0])
    assert_same_bits(load_file(folder / SINGLE), read_tensors(source))
