"""Which checkpoint a run goes on from: the newest whole one, or a clear refusal."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from a3po_megatron.config import Config, Settings, resolve, unlike
from a3po_megatron.errors import RequestError
from a3po_megatron.files.hashed import Written, digest_of
from a3po_megatron.files.run_folder import step_folders
from a3po_megatron.ranks.backend import CPU, CUDA, Backend
from a3po_megatron.run import manifest
from a3po_megatron.run.folder import name_latest, newest_whole, prune, put_aside
from a3po_megatron.run.manifest import MANIFEST, Manifest, check_saved, check_whole, read_manifest


def settings_of(options: dict[str, Any], backend: Backend = CPU) -> Settings:
    return resolve(Config.model_validate(options), SimpleNamespace(layers=2), backend)


def checkpoint(checkpoints: Path, step: int) -> Path:
    folder = checkpoints / f"step-{step:06d}"
    (folder / "hf").mkdir(parents=True)
    (folder / "__0_0.distcp").write_bytes(bytes(range(256)))
    (folder / "hf" / "config.json").write_text("{}")
    names = ["__0_0.distcp", "hf/config.json"]
    files = {name: Written(name, digest_of(folder / name).bytes, digest_of(folder / name).blake3) for name in names}
    Manifest(step, step + 1, 2, {"name": "x"}, {"data": "abc"}, {"prompts": {"position": 3}}, 77, files).save(folder)
    return folder


def test_a_manifest_comes_back_as_it_was_written(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 4)
    found = check_whole(folder)
    assert (found.step, found.weight_version, found.ranks, found.metrics_bytes) == (4, 5, 2, 77)
    assert found.state == {"prompts": {"position": 3}}
    assert found == read_manifest(folder)


def test_any_flipped_byte_anywhere_in_a_checkpoint_is_found_and_the_file_named(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, 0)
    for path in (folder / MANIFEST, folder / "__0_0.distcp", folder / "hf/config.json"):
        whole = path.read_bytes()
        for place in range(len(whole)):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            if path.name == MANIFEST and whole[place : place + 1].isspace():
                continue  # says nothing
            with pytest.raises(RequestError, match=re.escape(str(path))):
                check_whole(folder)
        path.write_bytes(whole)
    check_whole(folder)


DAMAGE = {
    "missing": (lambda folder: (folder / "__0_0.distcp").unlink(), "__0_0.distcp: the file is missing"),
    "cut off": (lambda folder: (folder / "__0_0.distcp").write_bytes(b"x"), "it has 1 bytes"),
    "extra": (lambda folder: (folder / "hf/more").write_text(""), "does not know this file"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "manifest.json: the file is missing"),
    "torn manifest": (lambda folder: (folder / MANIFEST).write_text('{"step": 8'), "not a readable manifest"),
    "a copy": (lambda folder: _copy(folder), "it is of step 4: the folder was copied or renamed"),
}


def _copy(folder: Path) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.with_name("step-000004"), folder)


def _reformat(folder: Path) -> None:
    from a3po_megatron.run.manifest import _digest

    body = json.loads((folder / MANIFEST).read_text()) | {"format": 99}
    body.pop("manifest_blake3")
    (folder / MANIFEST).write_text(json.dumps({"manifest_blake3": _digest(body)} | body))


@pytest.mark.parametrize("damage", DAMAGE)
def test_the_newest_whole_checkpoint_is_used_the_newer_ones_are_put_aside_and_said_so(
    tmp_path: Path, damage: str
) -> None:
    for step in (4, 6, 8):
        checkpoint(tmp_path, step)
    harm, words = DAMAGE[damage]
    harm(tmp_path / "step-000008")
    folder, wrong = newest_whole(tmp_path)
    assert folder == tmp_path / "step-000006"
    assert len(wrong) == 1
    assert words in wrong[0]
    assert len(step_folders(tmp_path)) == 3  # to look changes nothing
    put_aside(tmp_path, after=6)
    assert [path.name for path in step_folders(tmp_path)] == ["step-000004", "step-000006"]
    assert (tmp_path / "torn-step-000008").is_dir()  # for whoever wants to know what happened
    assert newest_whole(tmp_path) == (folder, [])


@pytest.mark.parametrize("damage", DAMAGE)
def test_who_only_looks_on_skips_a_checkpoint_without_a_manifest_or_with_a_torn_one(
    tmp_path: Path, damage: str
) -> None:
    for step in (4, 6, 8):
        checkpoint(tmp_path, step)
    DAMAGE[damage][0](tmp_path / "step-000008")
    for check, skips in ((check_saved, {"no manifest"}), (read_manifest, {"no manifest", "torn manifest"})):
        found, wrong = newest_whole(tmp_path, check)
        assert (found, len(wrong)) == (tmp_path / f"step-00000{6 if damage in skips else 8}", int(damage in skips))


def test_what_another_version_wrote_or_a_disk_does_not_give_is_refused_and_not_taken_for_torn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (4, 6):
        checkpoint(tmp_path, step)

    def fails(path: Path) -> Written:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "digest_of", fails)
        with pytest.raises(RequestError, match=r"step-000006/.*: cannot read it: Input/output error"):
            newest_whole(tmp_path)
    newest = tmp_path / "step-000006" / MANIFEST
    body = newest.read_bytes()
    newest.unlink()
    newest.mkdir()  # opening it fails, but it is there
    with pytest.raises(RequestError, match=r"manifest.json: cannot read it: Is a directory"):
        newest_whole(tmp_path)
    newest.rmdir()
    newest.write_bytes(body)
    (tmp_path / "step-000006" / ".nfs000012").write_text("removed while it was open")
    assert newest_whole(tmp_path) == (tmp_path / "step-000006", [])
    _reformat(tmp_path / "step-000006")
    with pytest.raises(RequestError, match=r"its format is 99, this version reads \d+: go on with the version"):
        newest_whole(tmp_path)


def test_if_no_checkpoint_is_whole_the_run_is_refused_and_does_not_begin_anew(tmp_path: Path) -> None:
    assert newest_whole(tmp_path) == (None, [])
    for step in (4, 6):
        (checkpoint(tmp_path, step) / MANIFEST).unlink()
    with pytest.raises(RequestError, match="no checkpoint is whole"):
        newest_whole(tmp_path)
    assert len(step_folders(tmp_path)) == 2


def test_steps_are_numbers_however_many_digits_they_have_and_other_folders_are_none(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        checkpoint(tmp_path, step)
    (tmp_path / "step-best").mkdir()
    (tmp_path / "torn-step-best").mkdir()
    assert newest_whole(tmp_path) == (tmp_path / "step-1000000", [])
    prune(tmp_path, keep_last=1, keep_every=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-1000000", "step-best", "torn-step-best"]


def test_what_was_put_aside_stays_until_its_step_is_saved_again(tmp_path: Path) -> None:
    for step in (4, 6, 8):
        checkpoint(tmp_path, step)
    put_aside(tmp_path, after=4)
    prune(tmp_path, keep_last=2, keep_every=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "torn-step-000006", "torn-step-000008"]
    checkpoint(tmp_path, 6)
    prune(tmp_path, keep_last=2, keep_every=None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000004", "step-000006", "torn-step-000008"]


def test_the_last_n_and_every_m_th_checkpoint_are_kept(tmp_path: Path) -> None:
    for step in range(2, 21, 2):
        checkpoint(tmp_path, step)
    prune(tmp_path, keep_last=2, keep_every=8)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [8, 16, 18, 20]
    prune(tmp_path, keep_last=1, keep_every=None)
    assert [int(path.name[5:]) for path in step_folders(tmp_path)] == [20]
    name_latest(tmp_path, "step-000020")
    assert (tmp_path / "latest").read_text() == "step-000020\n"
    shutil.rmtree(tmp_path / "step-000020")


BASE = {"model": {"path": "m"}, "data": {"path": "builtin:arithmetic"}}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"trainer": {"seed": 1}}, "trainer.seed was 0, is 1"),
        ({"model": {"path": "n"}}, "model.path was 'm', is 'n'"),
        ({"shaping": {"rho": 1.5}}, "shaping.rho was 2.0, is 1.5 and shaping.rho_negative was 2.0, is 1.5"),
        ({"rollout": {"max_tokens": 7}}, "objective.constant was 1024, is 7 and rollout.max_tokens was 1024, is 7"),
        ({"rollout": {"engine_args": {"swap_space": 1}}}, "rollout.engine_args was {}, is {'swap_space': 1}"),
        ({"parallel": {"expert": 2}}, "parallel.expert was 1, is 2, and Megatron's optimizer"),
        ({"parallel": {"tensor": 2, "sequence": True}, "checkpoint": {"every_steps": 3}}, None),
        ({"trainer": {"steps": 900}, "parallel": {"data": 2}, "rollout": {"tensor": 2}, "name": "other"}, None),
    ],
)
def test_a_run_goes_on_under_another_configuration_only_where_that_changes_nothing_of_what_it_learns(
    change: dict[str, dict[str, object]], words: str | None
) -> None:
    before = settings_of(BASE).model_dump(mode="json")
    now = settings_of(BASE | change | ({"model": change["model"]} if "model" in change else {}))
    found = unlike(before, now)
    assert found == [] if words is None else words in " and ".join(found), found
    assert len(found) == (0 if words is None else words.count(" was "))


def test_more_steps_are_refused_where_the_learning_rate_depends_on_their_number() -> None:
    cosine = BASE | {"lr_schedule": {"name": "cosine"}}
    before = settings_of(cosine).model_dump(mode="json")
    (found,) = unlike(before, settings_of(cosine | {"trainer": {"steps": 900}}))
    assert found == "trainer.steps was 300, is 900, and the learning rate's schedule ends with it"


def test_a_run_of_before_an_option_existed_goes_on_where_the_option_is_as_it_is_by_default() -> None:
    before = settings_of(BASE).model_dump(mode="json")
    for section, option in (("rollout", "routing_replay"), ("learner", "bf16_layers")):
        del before[section][option]
    assert unlike(before, settings_of(BASE)) == []
    (found,) = unlike(before, settings_of(BASE | {"rollout": {"routing_replay": True}}))
    assert found == "rollout.routing_replay was False, is True"


def test_a_run_does_not_go_on_on_another_device_nor_a_tensorwise_one_in_other_packs() -> None:
    on_cpu = settings_of(BASE).model_dump(mode="json")
    found, precision, dtype = unlike(on_cpu, settings_of(BASE, CUDA))
    assert dtype == "model.dtype was 'float32', is 'bfloat16'"  # which follows from it
    assert precision == "learner.precision was 'fp32', is 'bf16'"
    assert found == "cluster.device was 'cpu', is 'cuda', and the names in a checkpoint follow from it"
    for precision, refused in (("fp8-tensorwise", 1), ("fp8-blockwise", 0)):
        learner = {"learner": {"precision": precision}}
        before = settings_of(BASE | learner).model_dump(mode="json")
        now = settings_of(BASE | {"learner": {"precision": precision, "micro_batch_tokens": 512}})
        assert len(unlike(before, now)) == refused, precision
