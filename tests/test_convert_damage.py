"""`a3po convert` on damaged input and taken destinations, cut short and with large models.

What cannot be converted is refused by name, in one message, with nothing written; memory is bounded by buckets.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from a3po_megatron.model.cut import hf_tensors
from a3po_megatron.model.read import read_facts
from tests.test_convert import (
    INDEX,
    ROOT,
    SINGLE,
    Ended,
    Tensors,
    assert_digests,
    assert_same_bits,
    convert,
    converted,
    copy_hf,
    edit_config,
    make_unequal,
    partial,
    read_tensors,
    start,
    stored,
)

NAME = "model.layers.1.mlp.up_proj.weight"  # (80, 48)
EXPERT = "model.layers.2.mlp.experts.3.down_proj.weight"
SHARD = "model-2.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_unequal(tmp_path_factory.mktemp("source") / "qwen3", "qwen3")


@pytest.fixture(scope="module")
def megatron(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("megatron") / "sound"
    converted("import", source, folder)
    return folder


def assert_one_message(ended: Ended, *named: str) -> None:
    assert ended.code == 2, ended
    assert ended.err.startswith("error: "), ended
    assert ended.err.count("error: ") == 1, ended
    assert "Traceback" not in ended.err
    for words in named:
        assert words in ended.err, ended


def assert_refused(destination: Path, command: str, origin: Path, *named: str, workers: int = 1) -> None:
    """Refused in one message with these words, and nothing is new beside the destination."""
    before = {*destination.parent.iterdir()}
    assert_one_message(convert(command, origin, destination, "--workers", workers), *named)
    assert not destination.exists()
    assert not partial(destination).exists()
    assert {*destination.parent.iterdir()} == before


def assert_hf_refused(folder: Path, *named: str) -> None:
    """By import as by verify, even where the layout would be sound."""
    assert_refused(folder.parent / "destination", "import", folder, *named)
    assert_one_message(convert("verify", folder, "--pipeline", 2), *named)


def test_the_input_that_all_cases_spoil_is_sound(source: Path, megatron: Path, tmp_path: Path) -> None:
    folder = copy_hf(source, tmp_path / "folder", 3)
    assert (folder / SHARD).exists()
    converted("import", folder, tmp_path / "megatron")
    converted("export", megatron, tmp_path / "back")
    assert convert("verify", folder, "--pipeline", 2).code == 0


# --- HF folders ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [0, 5, 2000, -1])
def test_a_truncated_shard_is_named(source: Path, tmp_path: Path, left: int) -> None:
    file = copy_hf(source, tmp_path / "many", 3) / SHARD
    file.write_bytes(file.read_bytes()[:left])
    assert_hf_refused(file.parent, str(file))
    single = copy_hf(source, tmp_path / "one") / SINGLE
    single.write_bytes(single.read_bytes()[:left])
    assert_hf_refused(single.parent, str(single))


@pytest.mark.parametrize(
    "spoil",
    [lambda data: data + b"\0", lambda data: b"\xff" * 8 + data[8:], lambda data: data[:8] + b"}" + data[9:]],
    ids=["longer than its header says", "length of its header", "header"],
)
def test_a_shard_whose_header_is_wrong_is_named(source: Path, tmp_path: Path, spoil: Callable[[bytes], bytes]) -> None:
    file = copy_hf(source, tmp_path / "folder", 3) / SHARD
    file.write_bytes(spoil(file.read_bytes()))
    assert_hf_refused(file.parent, str(file))


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: {n: v for n, v in t.items() if n != NAME}, [NAME]),
        (lambda t: {n: v for n, v in t.items() if n != "model.embed_tokens.weight"}, ["model.embed_tokens.weight"]),
        (lambda t: t | {"model.layers.3.mlp.up_proj.weight": t[NAME] + 0}, ["model.layers.3.mlp.up_proj.weight"]),
        (lambda t: t | {"model.layers.1.self_attn.q_proj.bias": torch.ones(192)}, ["self_attn.q_proj.bias"]),
        (lambda t: t | {NAME: t[NAME][:-1].clone()}, [NAME, "(79, 48)", "(80, 48)"]),
        (lambda t: t | {NAME: t[NAME].t().contiguous()}, [NAME, "(48, 80)"]),
        (lambda t: t | {NAME: t[NAME].reshape(-1)}, [NAME, "(3840,)"]),
        (lambda t: t | {NAME: t[NAME].to(torch.int8)}, [NAME, "I8"]),
    ],
    ids=["missing", "no embedding", "extra layer", "extra bias", "too few rows", "transposed", "flat", "whole numbers"],
)
def test_a_missing_extra_or_misshapen_tensor_is_named(
    source: Path, tmp_path: Path, shards: int, change: Callable[[Tensors], Tensors], named: list[str]
) -> None:
    folder = copy_hf(source, tmp_path / "folder", shards, change)
    assert_hf_refused(folder, str(folder), *named)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, -1])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", NAME])
def test_a_value_that_is_not_finite_is_named_with_its_tensor_and_file(
    source: Path, tmp_path: Path, name: str, position: int, value: float
) -> None:
    def damage(tensors: Tensors) -> Tensors:
        tensors[name].view(-1)[position] = value
        return tensors

    folder = copy_hf(source, tmp_path / "folder", 3, damage)
    file = json.loads((folder / INDEX).read_text())["weight_map"][name]
    assert_hf_refused(folder, name, str(folder / file))


def test_a_worker_that_finds_a_bad_value_in_an_expert_ends_the_whole_import(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> Tensors:
        tensors[EXPERT][-1, -1] = torch.nan
        return tensors

    folder = copy_hf(make_unequal(tmp_path / "sound", "qwen3_moe"), tmp_path / "folder", 3, damage)
    assert_refused(tmp_path / "destination", "import", folder, EXPERT, workers=2)


def test_an_index_that_is_none_or_names_a_missing_file_or_the_wrong_one_is_refused(
    source: Path, tmp_path: Path
) -> None:
    folder = copy_hf(source, tmp_path / "folder", 3)
    index = folder / INDEX
    sound = json.loads(index.read_text())
    for text in ("{", "[]", '{"metadata": {}}', '{"weight_map": []}'):
        index.write_text(text)
        assert_hf_refused(folder, str(index))
    other = "model-1.safetensors" if sound["weight_map"][NAME] != "model-1.safetensors" else SHARD
    index.write_text(json.dumps({"weight_map": sound["weight_map"] | {NAME: other}}))
    assert_hf_refused(folder, NAME, other)
    index.write_text(json.dumps(sound))
    (folder / SHARD).unlink()
    assert_hf_refused(folder, SHARD, str(index))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 4, "layer_types": None}, "model.layers.3."),
        ({"num_hidden_layers": 2, "layer_types": None}, "model.layers.2."),
        ({"hidden_size": 40}, ".weight"),
        ({"vocab_size": 66}, "model.embed_tokens.weight"),
        ({"num_attention_heads": 8}, "_proj.weight"),
        ({"num_key_value_heads": 3}, "_proj.weight"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"head_dim": 16}, ".weight"),
        ({"intermediate_size": 79}, "_proj.weight"),
        ({"tie_word_embeddings": False}, "lm_head.weight"),
        ({"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}, "head_dim"),
        ({"num_hidden_layers": 4}, "layer_types has 3 entries, num_hidden_layers is 4"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "_norm.weight"),
        ({"architectures": ["LlamaForCausalLM"]}, "model_type"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"architectures": None}, "architecture"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}}, "linear"),
    ],
)
def test_a_config_that_contradicts_the_tensors_or_is_of_an_unknown_model_is_refused_by_what_differs(
    source: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    folder = copy_hf(source, tmp_path / "folder")
    edit_config(folder, lambda config: config | changes)
    assert_hf_refused(folder, str(folder), named)


def test_a_folder_without_readable_configs_or_weights_is_named(source: Path, tmp_path: Path) -> None:
    assert_hf_refused(tmp_path / "none", str(tmp_path / "none"))
    for name in ("config.json", "generation_config.json"):
        folder = copy_hf(source, tmp_path / f"bad-{name}")
        (folder / name).write_text("{")
        assert_hf_refused(folder, str(folder / name))
    folder = copy_hf(source, tmp_path / "no-config")
    (folder / "config.json").unlink()
    assert_hf_refused(folder, str(folder / "config.json"))
    folder = copy_hf(source, tmp_path / "no-weights")
    (folder / SINGLE).unlink()
    assert_hf_refused(folder, str(folder), SINGLE)


def test_the_program_itself_ends_with_2_and_one_line_on_stderr(source: Path, tmp_path: Path) -> None:
    file = copy_hf(source, tmp_path / "folder", 3) / SHARD
    file.write_bytes(file.read_bytes()[:-1])
    process = start("import", file.parent, tmp_path / "destination")
    out, err = process.communicate(timeout=60)
    assert_one_message(Ended(process.returncode, out, err), str(file))
    assert list(tmp_path.iterdir()) == [file.parent]


# --- torch_dist folders -------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("left", [0, 100, 0.5, -1])
def test_a_truncated_weight_file_of_a_checkpoint_is_named(megatron: Path, tmp_path: Path, left: float) -> None:
    folder = shutil.copytree(megatron, tmp_path / "folder")
    file = weight_files(folder)[-1]
    data = file.read_bytes()
    file.write_bytes(data[: int(left * len(data)) if left == 0.5 else int(left)])
    assert_refused(tmp_path / "destination", "export", folder, file.name)


def test_a_deleted_weight_file_of_a_checkpoint_is_named(megatron: Path, tmp_path: Path) -> None:
    for number, sound in enumerate(weight_files(megatron)):
        folder = shutil.copytree(megatron, tmp_path / str(number))
        (folder / sound.name).unlink()
        assert_refused(tmp_path / "destination", "export", folder, sound.name)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
def test_a_flipped_bit_anywhere_in_a_weight_file_is_found_and_the_file_named(
    megatron: Path, tmp_path: Path, place: float
) -> None:
    folder = shutil.copytree(megatron, tmp_path / "folder")
    for file in weight_files(folder):
        sound = file.read_bytes()
        data = bytearray(sound)
        data[int(place * (len(data) - 1))] ^= 1
        file.write_bytes(data)
        assert_refused(tmp_path / "destination", "export", folder, file.name)
        file.write_bytes(sound)
    converted("export", folder, tmp_path / "destination")


@pytest.mark.parametrize("name", [".metadata", "hf/config.json"])
def test_a_checkpoint_without_its_metadata_or_config_is_refused_by_the_files_name(
    megatron: Path, tmp_path: Path, name: str
) -> None:
    folder = shutil.copytree(megatron, tmp_path / "folder")
    (folder / name).write_bytes(b"")
    assert_refused(tmp_path / "destination", "export", folder, str(folder / name))
    (folder / name).unlink()
    assert_refused(tmp_path / "destination", "export", folder, str(folder / name))
    shutil.rmtree(folder / "hf")
    assert_refused(tmp_path / "destination", "export", folder, str(folder))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"num_hidden_layers": 4, "layer_types": None}, "decoder.layers."),
        ({"num_hidden_layers": 2, "layer_types": None}, "decoder.layers."),
        ({"vocab_size": 66}, "embedding.word_embeddings.weight"),
        ({"intermediate_size": 160}, "decoder.layers.mlp."),
        ({"tie_word_embeddings": False}, "output_layer.weight"),
        ({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}, "_layernorm.weight"),
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
    ],
)
def test_a_config_that_contradicts_the_checkpoint_is_refused_by_the_tensor(
    megatron: Path, tmp_path: Path, changes: dict[str, object], named: str
) -> None:
    folder = shutil.copytree(megatron, tmp_path / "folder")
    edit_config(folder / "hf", lambda config: config | changes)
    assert_refused(tmp_path / "destination", "export", folder, named)


def test_a_folder_that_is_no_checkpoint_is_named(source: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for folder in (tmp_path / "none", tmp_path / "empty", source):
        assert_refused(tmp_path / "destination", "export", folder, str(folder))


# --- destinations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_destination_with_something_in_it_is_refused_and_left_alone(
    source: Path, megatron: Path, tmp_path: Path, command: str
) -> None:
    origin = source if command == "import" else megatron
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for destination in (folder, tmp_path / "file"):
        assert_one_message(convert(command, origin, destination, "--workers", 1), str(destination))
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "mine.txt", "file"}
    assert (folder / "mine.txt").read_text() == (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("command", ["import", "export"])
def test_an_empty_destination_and_what_a_killed_conversion_left_beside_it_are_replaced(
    source: Path, megatron: Path, tmp_path: Path, command: str
) -> None:
    destination = tmp_path / "destination"
    destination.mkdir()
    left = partial(destination)
    (left / "hf").mkdir(parents=True)
    tensors = load_file(source / SINGLE)
    save_file({name: torch.zeros_like(value) for name, value in tensors.items()}, left / "model-1.safetensors")
    (left / "__9_9.distcp").write_bytes(b"left")
    (left / "hf" / "tokenizer_left.json").write_text("{}")
    (left / "digests.json").write_text("{")
    converted(command, source if command == "import" else megatron, destination)
    assert list(tmp_path.iterdir()) == [destination]
    names = {path.name for path in destination.rglob("*")}
    assert not names & {"model-1.safetensors", "__9_9.distcp", "tokenizer_left.json"}
    if command == "export":
        assert_same_bits(read_tensors(destination), tensors)
    else:
        assert_same_bits(stored(destination), stored(megatron))


# --- memory and interruption --------------------------------------------------------------------------------------

BUCKET = 8 << 20
SERVANT = """
import sys
from a3po_megatron import cli
for line in sys.stdin:
    sys.argv = ["a3po", "convert", *line.rstrip("\\n").split("\\t")]
    try:
        cli.main()
    except SystemExit as ended:
        print(f"ended {ended.code or 0}", flush=True)
"""


def held(process: psutil.Process) -> int:
    """Bytes that are no file's: anonymous and shared memory. Mapped weight files do not count."""
    with contextlib.suppress(OSError, psutil.Error):
        status = Path(f"/proc/{process.pid}/status").read_text()
        return sum(int(kib) * 1024 for kib in re.findall(r"^Rss(?:Anon|Shmem):\s+(\d+) kB", status, re.MULTILINE))
    return 0


class Servant:
    """One process that converts again and again, so that what its imports hold is the same each time."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVANT], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )

    def peak(self, *words: object) -> int:
        """The most that the process and its children held together during one conversion."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("\t".join(map(str, words)).encode() + b"\n")
        self.process.stdin.flush()
        me, most, polls = psutil.Process(self.process.pid), 0, 0
        children: list[psutil.Process] = []
        deadline, said = time.monotonic() + 100, b""
        while time.monotonic() < deadline:
            children = me.children(recursive=True) if polls % 20 == 0 else children
            most, polls = max(most, sum(held(process) for process in [me, *children])), polls + 1
            if select.select([self.process.stdout], [], [], 0.001)[0]:
                said += os.read(self.process.stdout.fileno(), 1 << 16)
                if ended := re.search(rb"^ended (\d+)\n", said, re.MULTILINE):
                    assert ended[1] == b"0", said
                    return most
                assert self.process.poll() is None, said
        raise AssertionError(f"{words}: not done in time: {said!r}")


@dataclass(frozen=True)
class Large:
    hf: Path
    megatron: Path
    peaks: dict[str, int]


def make_large(folder: Path) -> Path:
    """201 MB without a tokenizer: 24 layers of 5 MB; embedding and output layer are 5 buckets each."""
    folder.mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "num_hidden_layers": 24,
        "hidden_size": 256,
        "intermediate_size": 1408,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "vocab_size": 40_001,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 256,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
    }
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    shapes = hf_tensors(read_facts(folder))
    files = [f"model-0000{k}-of-00003.safetensors" for k in (1, 2, 3)]
    where = {name: files[number * 3 // len(shapes)] for number, name in enumerate(shapes)}
    for file in files:
        save_file({n: torch.rand(shape) for n, shape in shapes.items() if where[n] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": where}))
    assert sum(path.stat().st_size for path in folder.glob("*.safetensors")) > 24 * BUCKET
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Large]:
    """A large checkpoint imported and exported, and what was held at most, after the same for a tiny one."""
    folder = tmp_path_factory.mktemp("large")
    models = {"tiny": make_unequal(folder / "tiny", "llama"), "large": make_large(folder / "large")}
    options = ("--workers", 1, "--bucket-bytes", BUCKET)
    servant, peaks = Servant(), {}
    try:
        for name, hf in models.items():
            megatron, back = folder / f"{name}-megatron", folder / f"{name}-back"
            peaks[f"{name} import"] = servant.peak("import", hf, megatron, *options)
            peaks[f"{name} export"] = servant.peak("export", megatron, back, *options)
            assert_same_bits(read_tensors(back), read_tensors(hf))
            shutil.rmtree(back)
    finally:
        servant.process.kill()
        servant.process.communicate()
    yield Large(models["large"], folder / "large-megatron", peaks)
    shutil.rmtree(folder)


@pytest.mark.parametrize("direction", ["import", "export"])
def test_memory_is_bounded_by_buckets_and_not_by_the_model(large: Large, direction: str) -> None:
    baseline = max(peak for name, peak in large.peaks.items() if name.startswith("tiny"))
    # What is read, what is laid out, what is written, its digest's and the writer's own copies: under 6 buckets where
    # the model has 24. Holding the embedding alone twice would be 10.
    assert large.peaks[f"large {direction}"] - baseline < 6 * BUCKET, large.peaks


def wait_for_bytes(folder: Path, process: subprocess.Popen[str]) -> None:
    """Until a megabyte is in one of the files of `folder`."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        assert process.poll() is None, f"ended before it could be interrupted: {process.communicate()}"
        with contextlib.suppress(FileNotFoundError):
            if any(path.stat().st_size > (1 << 20) for path in folder.rglob("*")):
                return
        time.sleep(0.001)
    raise AssertionError(f"nothing came to {folder}: {sorted(folder.parent.iterdir())}")


@pytest.mark.parametrize(
    ("how", "workers"),
    [
        pytest.param(signal.SIGKILL, 1, id="killed"),
        # whose processes end with it; tests/test_convert_hostile.py has them end at TERM
        pytest.param(signal.SIGKILL, 2, id="killed, with workers", marks=pytest.mark.soak),
        # tests/test_convert_hostile.py ends one by TERM
        pytest.param(signal.SIGINT, 1, id="interrupted from the keyboard", marks=pytest.mark.soak),
    ],
)
def test_an_export_that_is_cut_short_leaves_no_folder_and_the_next_one_is_whole(
    large: Large, tmp_path: Path, how: signal.Signals, workers: int
) -> None:
    destination = tmp_path / "back"
    options = ("export", large.megatron, destination, "--shard-bytes", 20_000_000, "--bucket-bytes", 1 << 20)
    process = start(*options, "--workers", workers)
    try:
        wait_for_bytes(partial(destination), process)
        process.send_signal(how)
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode != 0, err
    assert not destination.exists()
    converted(*options)
    assert_same_bits(read_tensors(destination), read_tensors(large.hf))
    assert_digests(destination, "*.safetensors")
    assert list(tmp_path.iterdir()) == [destination]
    shutil.rmtree(destination)
