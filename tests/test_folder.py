"""A run folder made ready to go on: what is of later steps goes, what is of earlier ones and what is not ours stays."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from blake3 import blake3

from a3po_megatron.config import Config, Settings, resolve
from a3po_megatron.errors import RequestError
from a3po_megatron.files.hashed import digest_of
from a3po_megatron.launch.folder import make_folder
from a3po_megatron.ranks.backend import CPU
from a3po_megatron.run.folder import name_latest
from a3po_megatron.run.manifest import FORMAT, MANIFEST, Manifest, inputs_of

ROW = '{"step": 0}\n'
SAVED = 4  # steps that the newest checkpoint holds


@pytest.fixture
def config(tmp_path: Path) -> Settings:
    """Of a run with a model folder and a file of prompts; nothing here reads what is in them."""
    model, data = tmp_path / "model", tmp_path / "prompts.jsonl"
    model.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (model / name).write_text("{}")
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    wanted = Config.model_validate({"model": {"path": str(model)}, "data": {"path": str(data)}})
    return resolve(wanted, SimpleNamespace(layers=2), CPU)


@pytest.fixture
def run(tmp_path: Path, config: Settings) -> Path:
    """A run that was killed in step 6, with checkpoints after 2 and 4 steps."""
    folder = tmp_path / "run"
    for step in (2, SAVED):
        save_checkpoint(folder, step, config)
    name_latest(folder / "checkpoints", f"step-{SAVED:06d}")
    (folder / "metrics.jsonl").write_text(ROW * 6)
    return folder


def save_checkpoint(folder: Path, step: int, config: Settings) -> Path:
    target = folder / "checkpoints" / f"step-{step:06d}"
    target.mkdir(parents=True)
    (target / "__0_0.distcp").write_bytes(bytes(256))
    files = {"__0_0.distcp": replace(digest_of(target / "__0_0.distcp"), name="__0_0.distcp")}
    size = len(ROW) * step
    Manifest(step, step + 1, 2, config.model_dump(mode="json"), inputs_of(config), {}, size, files).save(target)
    return target


def save_identity(folder: Path, config: Settings) -> None:
    known = {"format": FORMAT, "config": config.model_dump(mode="json"), "inputs": inputs_of(config)}
    (folder / "identity.json").write_text(json.dumps(known))


def put(folder: Path, *names: str) -> None:
    """Files, or folders with something in them where a name ends with a slash."""
    for name in names:
        path = folder / name / "model.safetensors" if name.endswith("/") else folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")


def goes_on(folder: Path, config: Settings) -> list[str]:
    lock, remarks = make_folder(folder, config, ["a3po", "train"])
    lock.close()
    return remarks


def test_of_a_run_that_goes_on_later_steps_are_cut_off_and_earlier_ones_and_odd_names_stay(
    run: Path, config: Settings
) -> None:
    kept = [
        *(f"rollouts/step-{step:05d}.rank-{rank}.parquet" for step in range(SAVED) for rank in (0, 1)),
        "rejected/step-00003.mini-batch-1.rank-0.pt",
        "hf/step-000002/",
        "hf/step-000004/",
        # not ours
        *("rollouts/notes.txt", "rollouts/step-best", "rollouts/step-9th-try.txt", "rejected/notes.txt"),
        *("hf/step-best/", "hf/notes.txt", "checkpoints/step-best/", "checkpoints/notes.txt", "notes.txt"),
    ]
    gone = [
        *(f"rollouts/step-{step:05d}.rank-{rank}.parquet" for step in (4, 5, 100000) for rank in (0, 1)),
        "rejected/step-00004.mini-batch-0.rank-0.pt",
        "rejected/step-00005.mini-batch-0.rank-1.pt",
        *("hf/step-000006/", "hf/step-1000000/"),
        # half done, of whichever step
        *("rollouts/step-00001.rank-0.jsonl.partial", "rejected/step-00001.mini-batch-0.rank-0.partial"),
        *("hf/.step-000002.partial/", "checkpoints/.step-000006.partial/", "checkpoints/.latest.partial"),
        *("witness/", ".witness.partial/", "logs/node-h1.beat"),
    ]
    put(run, *kept, *gone)
    assert goes_on(run, config) == [f"goes on from step-{SAVED:06d}"]
    assert [name for name in kept if not (run / name).exists()] == []
    assert [name for name in gone if (run / name).exists()] == []
    assert (run / "metrics.jsonl").read_text() == ROW * SAVED
    assert len(list((run / "checkpoints").glob("step-0*"))) == 2
    assert len(json.loads((run / "provenance.json").read_text())) > 1
    goes_on(run, config)  # to be made ready twice changes nothing
    assert [name for name in kept if not (run / name).exists()] == []


def test_of_a_run_without_a_checkpoint_nothing_but_odd_names_is_left(run: Path, config: Settings) -> None:
    for path in (run / "checkpoints").iterdir():
        path.rename(run / f"old-{path.name}")
    gone = ["rollouts/step-00000.rank-0.parquet", "rejected/step-00000.mini-batch-0.rank-0.pt", "hf/step-000002/"]
    save_identity(run, config)
    put(run, *gone, "rollouts/notes.txt", "journal/step-00000.rank-0")
    assert goes_on(run, config) == []
    assert [name for name in gone if (run / name).exists()] == []
    assert (run / "metrics.jsonl").read_text() == ""
    assert (run / "rollouts" / "notes.txt").exists()
    assert (run / "journal" / "step-00000.rank-0").exists()  # a replay begins at step 0, and looks into it


def test_a_run_without_a_checkpoint_is_held_to_what_it_was_started_with_once_it_has_left_anything(
    tmp_path: Path, config: Settings
) -> None:
    folder = tmp_path / "run"
    assert goes_on(folder, config) == []
    model = Path(config.model.path)
    (model / "chat_template.jinja").write_text("{{ messages }}")  # it failed before its first step: all may change
    changed = config.model_copy(update={"trainer": config.trainer.model_copy(update={"seed": 1})})
    assert goes_on(folder, changed) == []
    for left in ("metrics.jsonl", "journal/step-00000.rank-1"):
        put(folder, left)
        with pytest.raises(RequestError, match=r"trainer\.seed was 1, is 0"):
            goes_on(folder, config)
        assert (folder / left).read_text() == "x"
        (model / "chat_template.jinja").write_text(left)
        with pytest.raises(RequestError, match=r"chat_template\.jinja was another file"):
            goes_on(folder, changed)
        (folder / left).unlink()
        assert goes_on(folder, changed) == []
    put(folder, "metrics.jsonl")
    (folder / "identity.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(RequestError, match=r"identity\.json: cannot tell what"):
        goes_on(folder, changed)
    (folder / "identity.json").write_text('{"config": {}, "inputs": {}}')  # as earlier versions wrote it
    with pytest.raises(RequestError, match=r"identity\.json: its format is 1, this version reads 4: go on"):
        goes_on(folder, changed)


def test_a_file_system_without_locks_is_refused_by_name(
    tmp_path: Path, config: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.raises(RequestError, match=r"run: its file system has no locks \(Function not implemented\)"):
        goes_on(tmp_path / "run", config)


def test_where_rows_of_metrics_are_missing_the_run_is_refused_and_nothing_is_cut(run: Path, config: Settings) -> None:
    (run / "metrics.jsonl").write_text(ROW * SAVED)
    goes_on(run, config)  # as many as were recorded will do
    short = ROW * SAVED
    (run / "metrics.jsonl").write_text(short[:-1])
    put(run, "rollouts/step-00005.rank-0.parquet")
    torn = save_checkpoint(run, SAVED + 2, config)
    (torn / MANIFEST).unlink()
    with pytest.raises(RequestError, match=rf"metrics\.jsonl: it has {len(short) - 1} bytes.* {len(short)}: rows are"):
        goes_on(run, config)
    assert (run / "metrics.jsonl").read_text() == short[:-1]
    assert torn.exists()  # not put aside
    assert (run / "rollouts" / "step-00005.rank-0.parquet").exists()


@pytest.mark.parametrize(("name", "role"), [("prompts.jsonl", "data"), ("model/tokenizer.json", "tokenizer.json")])
def test_another_file_under_the_same_path_is_refused_by_its_name_and_nothing_changes(
    name: str, role: str, run: Path, config: Settings, tmp_path: Path
) -> None:
    path = tmp_path / name
    before = path.read_text()
    path.write_text(before.replace("{", "{ "))
    with pytest.raises(RequestError, match=rf"{role} was another file"):
        goes_on(run, config)
    assert (run / "metrics.jsonl").read_text() == ROW * 6
    path.unlink()
    with pytest.raises(RequestError, match=rf"{role} was another file"):
        goes_on(run, config)
    path.write_text(before)
    assert goes_on(run, config) == [f"goes on from step-{SAVED:06d}"]


def test_a_journal_of_an_earlier_version_is_refused_and_nothing_changes(run: Path, config: Config) -> None:
    journal = run / "journal/step-00004.rank-0"
    journal.parent.mkdir()
    text = json.dumps({"kind": "verdicts", "of": "", "verdicts": [], "bytes": 0, "blake3": ""}).encode()
    journal.write_bytes(blake3(text).hexdigest().encode() + b" " + text + b"\n torn")
    put(run, "rollouts/step-00005.rank-0.parquet")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(RequestError, match=r"journal/step-00004\.rank-0: it was written by an earlier version"):
        goes_on(run, config)
    assert {path: path.read_bytes() for path in before} == before


@pytest.mark.parametrize("words", [b"", b"step-0000", b"step-999999\n", b"../checkpoints\n", b"step-000002\n", b"\xff"])
def test_latest_is_put_right_where_it_names_something_else(words: bytes, run: Path, config: Settings) -> None:
    (run / "checkpoints" / "latest").write_bytes(words)
    goes_on(run, config)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{SAVED:06d}\n"


def test_latest_is_written_where_a_kill_came_between_a_checkpoint_and_its_name(run: Path, config: Settings) -> None:
    (run / "checkpoints" / "latest").unlink()
    goes_on(run, config)
    assert (run / "checkpoints" / "latest").read_text() == f"step-{SAVED:06d}\n"


def test_with_a_damaged_newest_checkpoint_the_folder_goes_back_to_the_one_before(run: Path, config: Settings) -> None:
    (run / "checkpoints" / f"step-{SAVED:06d}" / MANIFEST).unlink()
    put(run, "rollouts/step-00001.rank-0.parquet", "rollouts/step-00002.rank-0.parquet", "hf/step-000004/")
    remarks = goes_on(run, config)
    assert len(remarks) == 2
    assert "step-000004/manifest.json: the file is missing" in remarks[0]
    assert remarks[1] == "goes on from step-000002"
    assert (run / "metrics.jsonl").read_text() == ROW * 2
    assert sorted(path.name for path in (run / "rollouts").iterdir()) == ["step-00001.rank-0.parquet"]
    assert not (run / "hf" / "step-000004").exists()
    assert (run / "checkpoints" / "latest").read_text() == "step-000002\n"
    assert (run / "checkpoints" / "torn-step-000004").is_dir()


def test_of_a_run_the_newest_checkpoint_by_number_is_exported(run: Path, config: Settings) -> None:
    from a3po_megatron.convert.convert import newest_checkpoint

    goes_on(run, config)
    for step in (999_999, 1_000_000):
        save_checkpoint(run, step, config)
    newest = run / "checkpoints" / "step-1000000"
    assert newest_checkpoint(run) == newest
    assert newest_checkpoint(newest) == newest
    (newest / MANIFEST).unlink()  # as where a checkpoint is being removed
    assert newest_checkpoint(run) == run / "checkpoints" / "step-999999"
    for path in (run / "checkpoints").glob("step-*"):
        path.rename(run / f"old-{path.name}")
    with pytest.raises(RequestError, match="this run has not saved any weights"):
        newest_checkpoint(run)
