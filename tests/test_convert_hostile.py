"""`a3po convert` against what a hostile reader tried: checkpoints that lie, destinations and disks that fail late.

What was accepted and converted wrongly, or ended in a traceback, is refused by name in one line, and nothing is left.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections import namedtuple
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorStorageMetadata

from a3po_megatron.convert import convert as convert_module
from tests.harness.ranks import CaseRanks, run_ranks
from tests.harness.saves_at_once import write_whole
from tests.test_convert import (
    INDEX,
    ROOT,
    SINGLE,
    Ended,
    Tensors,
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
from tests.test_convert_damage import assert_hf_refused, assert_one_message

NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
WORDS = "embedding.word_embeddings.weight"  # (67, 48)
PROJ = "decoder.layers.self_attention.linear_proj.weight"  # (3, 48, 192)
DIGESTS = "digests.json"
Change = Callable[[Tensors], Tensors]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What each command converts. In the Megatron checkpoint the embedding lies in chunks of 21, 21, 21 and 4 rows."""
    folder = tmp_path_factory.mktemp("origins")
    source = make_unequal(folder / "qwen3", "qwen3")
    converted("import", source, folder / "sound", "--bucket-bytes", 4096)
    return {"import": source, "export": folder / "sound"}


@pytest.fixture(scope="module")
def source(origins: dict[str, Path]) -> Path:
    return origins["import"]


@pytest.fixture(scope="module")
def megatron(origins: dict[str, Path]) -> Path:
    return origins["export"]


def nothing_at(destination: Path) -> bool:
    return not os.path.lexists(destination) and not os.path.lexists(partial(destination))


def assert_refused(command: str, origin: Path, *named: str, options: Sequence[object] = ()) -> None:
    """Refused in one line with these words, and nothing is left beside the origin."""
    destination = origin.parent / "refused"
    ended = convert(command, origin, destination, "--workers", 1, *options)
    assert_one_message(ended, *named)
    assert ended.err.count("\n") == 1, ended
    assert nothing_at(destination)


def assert_exported(folder: Path, source: Path, *options: object) -> str:
    """Every bit; returns what was remarked."""
    destination = folder.parent / f"{folder.name}-exported"
    ended = converted("export", folder, destination, *options)
    assert_same_bits(read_tensors(destination), read_tensors(source))
    return ended.err


def holding(name: str, value: torch.Tensor) -> Change:
    return lambda tensors: tensors | {name: value}


def flip(file: Path, place: int) -> None:
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)


def forget(folder: Path, name: str) -> None:
    """Takes a file out of the digests."""
    digests = json.loads((folder / DIGESTS).read_text())
    del digests["files"][name]
    (folder / DIGESTS).write_text(json.dumps(digests))


# --- archives and chunks of a Megatron checkpoint -----------------------------------------------------------------


def saved(megatron: Path, folder: Path, change: Change) -> Path:
    """The checkpoint with its tensors changed, as torch's own writer saves them; it writes no digests."""
    dcp.save(change(stored(megatron)), storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(megatron / name, folder)
    shutil.copytree(megatron / "hf", folder / "hf")
    return folder


@contextlib.contextmanager
def metadata_of(folder: Path) -> Iterator[Any]:
    """`.metadata`, written again as it is at the end; nothing holds it against a digest any more."""
    metadata = pickle.loads((folder / ".metadata").read_bytes())
    yield metadata
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    (folder / DIGESTS).unlink(missing_ok=True)


@pytest.mark.parametrize("key", [WORDS, PROJ])
def test_an_archive_of_a_transposed_view_is_refused(megatron: Path, tmp_path: Path, key: str) -> None:
    folder = saved(megatron, tmp_path / "folder", lambda t: t | {key: t[key].mT.contiguous().mT})
    assert torch.equal(stored(folder)[key], stored(megatron)[key])  # torch's own reader undoes it
    assert_refused("export", folder, key, "__0_0.distcp", "strides")


def test_an_archive_of_another_dtype_or_shape_than_the_metadata_says_is_refused(megatron: Path, tmp_path: Path) -> None:
    """Of the same number of bytes."""
    folder = saved(megatron, tmp_path / "dtype", lambda t: t | {WORDS: t[WORDS].view(torch.int32)})
    with metadata_of(folder) as metadata:
        metadata.state_dict_metadata[WORDS].properties.dtype = torch.float32
    assert_refused("export", folder, WORDS, "int32")
    folder = saved(megatron, tmp_path / "shape", lambda t: t | {PROJ: t[PROJ].view(3, 192, 48)})
    with metadata_of(folder) as metadata:
        entry = metadata.state_dict_metadata[PROJ]
        entry.size = entry.chunks[0].sizes = torch.Size((3, 48, 192))
    assert_refused("export", folder, PROJ, "(3, 192, 48)", "(3, 48, 192)")


def test_an_archive_whose_tensor_begins_within_its_storage_is_refused(megatron: Path, tmp_path: Path) -> None:
    folder = saved(megatron, tmp_path / "folder", lambda t: t)
    with metadata_of(folder) as metadata:
        begin = metadata.storage_data[MetadataIndex(WORDS, torch.Size((0, 0)))].offset
    file = folder / "__0_0.distcp"
    # The offset follows the storage in the pickle: BINPERSID, BININT1 0.
    flip(file, file.read_bytes().index(b"QK\x00", begin) + 2)
    assert_refused("export", folder, WORDS, file.name)


@pytest.mark.parametrize(("row", "named"), [(60, "overlap"), (None, f"{63 * 48} of {67 * 48}")], ids=["overlap", "gap"])
def test_chunks_that_overlap_or_leave_a_gap_are_refused_even_where_their_sizes_add_up(
    megatron: Path, tmp_path: Path, row: int | None, named: str
) -> None:
    folder = shutil.copytree(megatron, tmp_path / "folder")
    with metadata_of(folder) as metadata:
        chunks, places = metadata.state_dict_metadata[WORDS].chunks, metadata.storage_data
        last = chunks.pop()
        place = places.pop(MetadataIndex(WORDS, torch.Size((63, 0))))
        if row is not None:
            chunks.append(ChunkStorageMetadata(torch.Size((row, 0)), last.sizes))
            places[MetadataIndex(WORDS, chunks[-1].offsets, 3)] = place
    assert_refused("export", folder, WORDS, named)


def test_chunks_beside_each_other_that_overlap_are_refused(megatron: Path, tmp_path: Path) -> None:
    def halves(tensors: Tensors) -> Tensors:
        return tensors | {str(number): half.contiguous() for number, half in enumerate(tensors.pop(WORDS).chunk(2, 1))}

    folder = saved(megatron, tmp_path / "folder", halves)
    with metadata_of(folder) as metadata:
        entries, places = metadata.state_dict_metadata, metadata.storage_data
        chunks = [entries.pop(name).chunks[0] for name in "01"]
        for number, chunk in enumerate(chunks):
            chunk.offsets = torch.Size((0, 20 * number))  # 24 would be right
            (index,) = [index for index in places if index.fqn == str(number)]
            places[MetadataIndex(WORDS, chunk.offsets, number)] = places.pop(index)
        entries[WORDS] = TensorStorageMetadata(entries[PROJ].properties, torch.Size((67, 48)), chunks)
    assert_refused("export", folder, WORDS, "overlap")


def transposed_shard(ranks: CaseRanks) -> list[bool]:
    from megatron.core.dist_checkpointing import ShardedTensor

    from a3po_megatron.files.torch_dist import Box
    from a3po_megatron.files.torch_dist_reader import Reader
    from a3po_megatron.run.store import Saving

    ranks.arrange()
    wanted = torch.arange(24.0).view(6, 4).t()
    folder = ranks.folder / "saved"
    folder.mkdir()
    write_whole(Saving({"layer": {"w": ShardedTensor.from_rank_offsets("w", wanted)}}, folder))
    found = torch.zeros(4, 6)
    with Reader(folder) as reader:
        reader.read(Box("w", (), 0, 4), found)
    return [wanted.is_contiguous(), torch.equal(found, wanted)]


def test_a_transposed_shard_is_saved_in_the_order_that_export_reads(tmp_path: Path) -> None:
    assert run_ranks(1, transposed_shard, folder=tmp_path, timeout=60) == {"transposed_shard": [[False, True]]}


def layers_apart(tensors: Tensors) -> Tensors:
    together = {key: value for key, value in tensors.items() if ".layers." not in key}
    for key in tensors.keys() - together.keys():
        together |= {
            key.replace("layers.", f"layers.{layer}."): rows for layer, rows in enumerate(tensors[key].clone())
        }
    return together


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (layers_apart, ["decoder.layers.", "singleton_local_shards"]),
        (holding("mtp.x", torch.ones(3)), ["mtp.x"]),
        (holding("decoder.optimizer.x", torch.ones(3)), ["decoder.optimizer.x"]),
        (lambda t: t | {WORDS: (10 * t[WORDS]).to(torch.int8)}, [WORDS, "int8"]),
        (lambda t: t | {PROJ: t[PROJ].to(torch.float8_e4m3fn)}, [PROJ, "float8"]),
        (lambda t: t | {WORDS: t[WORDS][:-2].clone()}, [WORDS, "(65, 48)"]),
    ],
    ids=["layers apart", "mtp", "not an optimizer's", "int8", "float8", "short vocabulary"],
)
def test_a_key_that_is_missing_unknown_or_of_a_dtype_that_is_not_read_is_refused_by_name(
    megatron: Path, tmp_path: Path, change: Change, named: list[str]
) -> None:
    assert_refused("export", saved(megatron, tmp_path / "folder", change), *named)


def test_the_state_of_an_optimizer_is_left_out(source: Path, megatron: Path, tmp_path: Path) -> None:
    """And the checkpoint that all cases change is sound as torch's own writer saves it."""
    keys = ("optimizer.state.exp_avg.x", "chained_0.optimizer.state.exp_avg_sq.x")
    assert_exported(saved(megatron, tmp_path / "folder", lambda t: t | {key: torch.ones(3) for key in keys}), source)


def test_padding_that_holds_weights_is_left_out_only_if_asked(source: Path, megatron: Path, tmp_path: Path) -> None:
    words, zeros, late = stored(megatron)[WORDS], torch.zeros(61, 48), torch.zeros(61, 48)
    late[-1, -1] = 1e-30  # not in the first bucket of them
    for rows in (zeros, late):
        folder = saved(megatron, tmp_path / str(rows is late), holding(WORDS, torch.cat([words, rows])))
        if rows is late:
            assert_refused(*("export", folder, WORDS, "128", "67", "--drop-padding"), options=["--bucket-bytes", 4096])
        assert_exported(folder, source, *["--drop-padding"] * (rows is late))


# --- digests, and pickles that name code --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [(".metadata", b"_extra_state"), ("metadata.json", b"1}")]
    + [(name, b"PK") for name in ("common.pt", "__objects.distcp", "__0_0.distcp")],
)
def test_a_flipped_bit_that_only_a_digest_shows_is_found_and_so_is_a_file_without_a_digest(
    source: Path, megatron: Path, tmp_path: Path, name: str, place: bytes
) -> None:
    """At places that no reader of ours looks at."""
    folder = shutil.copytree(megatron, tmp_path / "folder")
    flip(folder / name, (folder / name).read_bytes().index(place))
    assert_refused("export", folder, f"{folder / name}: ", DIGESTS, "damaged")
    forget(folder, name)
    assert_refused("export", folder, f"{folder / name}: ", DIGESTS, "does not know")
    (folder / DIGESTS).unlink()
    remark = assert_exported(folder, source)
    assert remark.startswith("warning: ") and f"{folder} has no {DIGESTS}" in remark


def test_code_that_a_checkpoint_names_is_refused_and_not_run(megatron: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    # The second is the same function, as an attribute of a module that checkpoints do need.
    for module, name in (("os", "mkdir"), ("torch.distributed.checkpoint.filesystem", "os.mkdir")):
        pickled = f"\x80\x04c{module}\n{name}\n(S'{marker}'\ntR.".encode("latin-1")
        pickle.loads(pickled)
        marker.rmdir()  # so it would run
        folder = shutil.copytree(megatron, tmp_path / name)
        (folder / DIGESTS).unlink()
        (folder / ".metadata").write_bytes(pickled)
        assert_refused("export", folder, f"{folder / '.metadata'}: ", name)
        folder = saved(megatron, tmp_path / f"{name}-archive", lambda t: t)
        with metadata_of(folder) as metadata, (folder / "__0_0.distcp").open("r+b") as file:
            place = metadata.storage_data[MetadataIndex(WORDS, torch.Size((0, 0)))]
            with zipfile.ZipFile(other := io.BytesIO(), "w") as archive:
                archive.writestr("archive/data.pkl", pickled)
            place.offset, place.length = file.seek(0, os.SEEK_END), file.write(other.getvalue())
        assert_refused("export", folder, WORDS, name)
    assert not marker.exists()


def test_an_hf_folder_is_held_against_the_digests_that_it_has(source: Path, megatron: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    converted("export", megatron, folder, "--shard-bytes", 100_000)
    converted("import", folder, tmp_path / "again")
    file = sorted(folder.glob("*.safetensors"))[-1]
    flip(file, -4)  # the last bit of a mantissa
    assert_refused("import", folder, f"{file}: ", DIGESTS)
    forget(folder, file.name)
    assert_refused("import", folder, f"{file}: ", DIGESTS)


# --- HF folders, and casts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dtype", "value", "asked"),
    [(torch.float64, 1e300, "float32"), (torch.float64, -1e300, "bfloat16"), (torch.float32, 3.4e38, "bfloat16")],
)
def test_a_value_that_a_cast_makes_infinite_is_refused_by_its_tensor(
    source: Path, tmp_path: Path, dtype: torch.dtype, value: float, asked: str
) -> None:
    norm = read_tensors(source)[NORM].to(dtype)
    norm[-1] = value
    folder = copy_hf(source, tmp_path / "hf", 1, holding(NORM, norm))
    converted("import", folder, tmp_path / "megatron")
    assert_refused("export", tmp_path / "megatron", NORM, "not finite", asked, options=["--dtype", asked])
    assert_exported(tmp_path / "megatron", folder)


def test_a_tied_output_layer_that_is_not_the_embedding_is_refused(source: Path, tmp_path: Path) -> None:
    def one_bit(values: torch.Tensor) -> torch.Tensor:
        values.view(torch.int32)[-1, -1] ^= 1
        return values

    other = [one_bit, lambda values: values[:-1].clone(), lambda values: values.mT.contiguous(), torch.Tensor.double]
    for number, head in enumerate([*other, torch.clone]):
        folder = copy_hf(source, tmp_path / str(number), 3, holding(HEAD, head(read_tensors(source)[EMBEDDING])))
        if head is not torch.clone:
            assert_hf_refused(folder, HEAD, "tie_word_embeddings")
    converted("import", folder, tmp_path / "megatron")


def test_a_dtype_that_the_config_denies_and_a_missing_tokenizer_are_remarked(source: Path, tmp_path: Path) -> None:
    assert converted("import", source, tmp_path / "neither").err == ""
    folder = copy_hf(source, tmp_path / "dtype")
    edit_config(folder, lambda config: config | {"dtype": "bfloat16"})
    remark = converted("import", folder, tmp_path / "megatron").err
    assert remark.startswith("warning: ") and "bfloat16" in remark and "float32" in remark
    folder = copy_hf(source, tmp_path / "template")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    remark = converted("import", folder, tmp_path / "without").err
    assert remark == assert_exported(tmp_path / "without", source).replace("/without/hf ", "/template ")
    assert remark.startswith("warning: ") and "tokenizer" in remark
    assert (tmp_path / "without-exported" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_weights_that_lie_in_a_second_place_too_or_out_of_the_folder_are_refused(source: Path, tmp_path: Path) -> None:
    folder = copy_hf(source, tmp_path / "folder", 3)
    shutil.copy(source / SINGLE, folder)
    assert_hf_refused(folder, SINGLE, INDEX)
    (folder / SINGLE).unlink()
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"][NORM]
    shutil.move(folder / file, tmp_path / file)
    for other in (f"../{file}", str(tmp_path / file)):
        where = {name: other if place == file else place for name, place in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps({"weight_map": where}))
        assert_hf_refused(folder, str(folder / INDEX), "not in this folder")


def test_a_header_whose_sizes_are_no_whole_numbers_is_refused_by_the_file(source: Path, tmp_path: Path) -> None:
    file = copy_hf(source, tmp_path / "folder") / SINGLE
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    for field, change in itertools.product(("shape", "data_offsets"), (float, str, None)):
        header = json.loads(data[8:end])
        values = header[NORM][field]
        header[NORM][field] = [change(value) for value in values] if change else [True, *values]
        text = json.dumps(header).encode()
        file.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
        assert_hf_refused(file.parent, str(file), "header")


def test_only_the_stored_frequencies_of_the_rope_may_be_left_over(source: Path, tmp_path: Path) -> None:
    for number, name in enumerate(("rotary_emb.evil.weight", "rotary_emb.inv_freq.weight", "my_rotary_emb_x")):
        name = f"model.layers.0.self_attn.{name}"
        folder = copy_hf(source, tmp_path / str(number), 1, holding(name, torch.ones(4)))
        assert_hf_refused(folder, name)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    converted("import", copy_hf(source, tmp_path / "old", 1, holding(name, torch.ones(16))), tmp_path / "done")


def test_a_tokenizer_file_that_is_no_file_is_refused_before_anything_is_written(
    source: Path, megatron: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = {"import": copy_hf(source, tmp_path / "hf"), "export": shutil.copytree(megatron, tmp_path / "megatron")}
    monkeypatch.setattr(convert_module, "whole_folder", lambda target: pytest.fail(f"{target} is being written"))
    for command, folder in folders.items():
        (file,) = folder.rglob("tokenizer.json")
        file.unlink()
        file.symlink_to("nowhere")
        assert_refused(command, folder, f"{file}: ")


# --- destinations, disks and workers -------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [True, False], ids=["to an empty folder", "to nothing"])
def test_a_destination_that_is_a_link_stays_one(origins: dict[str, Path], tmp_path: Path, there: bool) -> None:
    for command, origin in origins.items():
        target, link = tmp_path / "disk" / command, tmp_path / f"{command}-link"
        if there:
            target.mkdir(parents=True)
        link.symlink_to(target)
        converted(command, origin, link)
        assert link.is_symlink() and not target.is_symlink()
        assert not partial(link).exists() and not partial(target).exists()
        assert {path.name for path in target.iterdir()} >= {DIGESTS, "hf" if command == "import" else SINGLE}
    assert_same_bits(read_tensors(tmp_path / "disk" / "export"), read_tensors(origins["import"]))


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_destination_that_cannot_be_made_is_refused(origins: dict[str, Path], tmp_path: Path, command: str) -> None:
    (tmp_path / "file").write_text("mine")
    # Of these names, the first is too long itself, the second with what is added while it is written.
    for destination in (tmp_path / ("x" * 300), tmp_path / ("y" * 250), tmp_path / "file" / "below"):
        ended = convert(command, origins[command], destination, "--workers", 1)
        assert_one_message(ended, str(destination))
        assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_destination_that_is_filled_after_the_first_look_is_refused_and_left_alone(
    origins: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    destination = tmp_path / "destination"

    def late(folder: Path, need: int = 0) -> None:
        destination.mkdir(exist_ok=True)
        (destination / "mine.txt").write_text("mine")

    monkeypatch.setattr(convert_module, "check_free", late)
    ended = convert(command, origins[command], destination, "--workers", 1)
    assert_one_message(ended, str(destination))
    assert [path.name for path in tmp_path.rglob("*")] == ["destination", "mine.txt"]


def test_a_disk_that_is_too_small_is_refused(source: Path, megatron: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    need = sum(value.nbytes for value in read_tensors(source).values())
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, need // 2 - 1))
    free = f"{need // 2 - 1:,}"
    assert_refused("import", source, f"{need:,}", free)
    assert_refused("export", megatron, f"{need // 2:,}", free, options=["--dtype", "bfloat16"])


def limited(limit: int, value: int, *words: object) -> Ended:
    """A conversion in a process of its own with a limit of the system."""

    def set_limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(limit, (value, value))

    command = [sys.executable, "-m", "a3po_megatron", "convert", *map(str, words)]
    done = subprocess.run(command, cwd=ROOT, preexec_fn=set_limit, capture_output=True, text=True, timeout=60)
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("limit", "command"),
    [
        pytest.param(200_000, "import", id="in the weights-import"),
        pytest.param(1_000_000, "export", id="in the files beside them-export"),
        pytest.param(200_000, "export", id="in the weights-export", marks=pytest.mark.soak),
        pytest.param(1_000_000, "import", id="in the files beside them-import", marks=pytest.mark.soak),
    ],
)
def test_a_write_that_fails_ends_with_1_and_one_line_and_leaves_nothing(
    origins: dict[str, Path], tmp_path: Path, limit: int, command: str
) -> None:
    folder = shutil.copytree(origins[command], tmp_path / "folder")
    with next(folder.rglob("tokenizer.json")).open("ab") as file:
        file.write(b" " * 3_000_000)
    ended = limited(resource.RLIMIT_FSIZE, limit, command, folder, tmp_path / "new")
    assert ended.code == 1, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert "cannot write" in ended.err and "File too large" in ended.err, ended
    assert list(tmp_path.iterdir()) == [folder]


def test_more_files_than_may_be_open_are_read(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(convert_module, "run_jobs", lambda jobs, show: [job(show) for job in jobs])
    converted("import", source, tmp_path / "megatron", "--workers", 100, "--bucket-bytes", 4096)
    assert len(list((tmp_path / "megatron").glob("__*_0.distcp"))) > 64
    ended = limited(resource.RLIMIT_NOFILE, 64, "export", tmp_path / "megatron", tmp_path / "back")
    assert (ended.code, ended.err) == (0, "")  # no warning of torch's either
    assert_same_bits(read_tensors(tmp_path / "back"), read_tensors(source))


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if any("spawn_main" in word for word in child.cmdline())]


def test_a_killed_worker_ends_the_import(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even the one that was started last, while another one works."""
    (tmp_path / "holding.py").write_text(
        "import pathlib, time\n\ndef hold(*_):\n    pathlib.Path(__file__ + '.held').touch()\n    time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(convert_module, "_write_records", importlib.import_module("holding").hold)

    def kill() -> None:
        while not (tmp_path / "holding.py.held").exists():
            time.sleep(0.02)
        max(workers_of(psutil.Process()), key=psutil.Process.create_time).kill()

    threading.Thread(target=kill, daemon=True).start()
    before = signal.signal(signal.SIGALRM, lambda *_: pytest.fail("it hangs"))
    signal.alarm(40)
    try:
        ended = convert("import", source, tmp_path / "new", "--workers", 2)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert ended.code == 1, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended
    assert "killed" in ended.err and "--workers" in ended.err and "--bucket-bytes" in ended.err
    assert nothing_at(tmp_path / "new")
    assert not workers_of(psutil.Process())


def test_sigterm_ends_a_conversion_and_its_workers_and_leaves_nothing(source: Path, tmp_path: Path) -> None:
    process = start("import", source, tmp_path / "new", "--workers", 2)
    try:
        workers: list[psutil.Process] = []
        while len(workers) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
            with contextlib.suppress(psutil.Error):
                workers = workers_of(psutil.Process(process.pid))
        assert partial(tmp_path / "new").exists()
        process.terminate()
        _, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert (process.returncode, err) == (128 + signal.SIGTERM, "")
    assert nothing_at(tmp_path / "new")
    assert not any(worker.is_running() for worker in workers)
