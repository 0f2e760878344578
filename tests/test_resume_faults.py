"""What goes wrong around a resume: damaged checkpoints, full and read-only disks, clocks, other configurations.

In every case either one clear message and exit code 2, or a fall-back to the last whole checkpoint that ends bit for
bit as an undisturbed run: never a resume from something else. What the launcher does before any rank exists is tested
in this process, on copies of one stopped run; of each kind of fault one goes all the way, to the end of the run.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from a3po_megatron.config import load_resolved
from a3po_megatron.launch.folder import make_folder
from a3po_megatron.run.manifest import check_whole
from tests.harness import interrupted_runs as tools
from tests.harness.interrupted_runs import LAYOUTS, STEPS, Ended, Interrupt

TP2 = LAYOUTS["tp2"]
HOUR = 3600.0


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tools.uninterrupted("tp2", tmp_path_factory)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was asked to stop in step 3, with two whole checkpoints. Not to be written to: copy it.

    tests/test_resume.py shows that it ends as an undisturbed one.
    """
    point = Interrupt("rollout", 3, "SIGUSR1", "rank", rank=1)
    folder = tools.stopped("tp2", point, tmp_path_factory, tools.interrupted_here)
    assert len(list((folder / "checkpoints").glob("step-*"))) >= 2
    return folder


def assert_refused(ended: Ended, *words: str) -> None:
    """One line that says what is wrong, exit code 2."""
    assert (ended.code, ended.err.count("\n")) == (2, 1), ended.all
    assert ended.err.startswith("error: ")
    for word in words:
        assert word in ended.err, ended.err


def assert_refused_or_right(ended: tools.Ended, words: str, folder: Path, whole: Path) -> None:
    """Either will do; a wrong resume will not."""
    if ended.code == 2:
        assert_refused(ended, words)
    else:
        assert ended.code == 0, ended.all
        tools.assert_same_run(folder, whole)


def assert_fell_back(folder: Path, damaged: Path, whole: Path) -> None:
    """Resumes the run: it must not use the damaged checkpoint but the one before, and must say so."""
    ended = tools.trained_here(folder, *TP2)
    assert damaged.name in ended.out + ended.err, f"a word about {damaged.name} is missing\n{ended.all}"
    assert tools.steps_shown(ended)[0] <= int(damaged.name.removeprefix("step-")), ended.all
    tools.assert_same_run(folder, whole)


def tear_the_manifest(checkpoint: Path) -> None:
    manifest = checkpoint / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[: manifest.stat().st_size // 2])


def empty_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").write_bytes(b"")


def delete_the_manifest(checkpoint: Path) -> None:
    (checkpoint / "manifest.json").unlink()


def flip_a_byte_of_a_shard(checkpoint: Path) -> None:
    tools.flip_a_byte(tools.largest_shard(checkpoint))


def flip_a_byte_of_the_index(checkpoint: Path) -> None:
    tools.flip_a_byte(checkpoint / ".metadata")


def flip_a_byte_of_what_is_common(checkpoint: Path) -> None:
    tools.flip_a_byte(checkpoint / "common.pt")


def delete_a_shard(checkpoint: Path) -> None:
    tools.largest_shard(checkpoint).unlink()


def cut_off_a_shard(checkpoint: Path) -> None:
    shard = tools.largest_shard(checkpoint)
    os.truncate(shard, shard.stat().st_size - 1)


DAMAGES = [
    flip_a_byte_of_a_shard,
    tear_the_manifest,
    empty_the_manifest,
    delete_the_manifest,
    flip_a_byte_of_the_index,
    flip_a_byte_of_what_is_common,
    delete_a_shard,
    cut_off_a_shard,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_of_a_damaged_checkpoint_the_one_before_it_is_resumed(
    damage: Callable[[Path], None], stopped: Path, tmp_path: Path
) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    newest = tools.newest_checkpoint(folder)
    assert newest is not None
    *_, before, last = sorted(path.name for path in (folder / "checkpoints").glob("step-*"))
    assert newest.name == last
    damage(newest)
    lock, remarks = make_folder(folder, load_resolved(folder / "config.yaml"), ["a3po", "train"])
    lock.close()
    assert [remark for remark in remarks if "not whole" in remark and newest.name in remark]
    assert f"goes on from {before}" in remarks
    resumed = tools.newest_checkpoint(folder)  # what the ranks read
    assert resumed is not None and resumed.name == before and not newest.exists()
    check_whole(resumed)


def test_a_run_whose_newest_checkpoint_is_damaged_ends_bit_for_bit_from_the_one_before_it(
    stopped: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    newest = tools.newest_checkpoint(folder)
    assert newest is not None
    flip_a_byte_of_a_shard(newest)
    assert_fell_back(folder, newest, whole)


def test_with_every_checkpoint_damaged_the_run_is_refused(stopped: Path, tmp_path: Path) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    newest = tools.newest_checkpoint(folder)
    assert newest is not None
    for checkpoint in (folder / "checkpoints").glob("step-*"):
        flip_a_byte_of_a_shard(checkpoint)
    assert_refused(tools.launched_here(folder, *TP2), newest.name, "no checkpoint is whole")


@pytest.mark.soak
@pytest.mark.parametrize("words", ["", "step-0000", "step-999999\n", "../checkpoints\n"])
def test_a_pointer_to_the_newest_checkpoint_that_is_wrong_does_not_lead_to_a_wrong_resume(
    words: str, stopped: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    (folder / "checkpoints" / "latest").write_text(words)
    ended = tools.launch(folder, *TP2)
    assert_refused_or_right(ended, "latest", folder, whole)


@pytest.mark.soak
def test_a_torn_row_of_metrics_is_written_anew(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    tools.interrupted(folder, Interrupt("rollout", 3, "SIGKILL", "all"), *TP2)
    metrics = folder / "metrics.jsonl"
    os.truncate(metrics, metrics.stat().st_size - 100)  # a machine that lost power: the last row is not whole
    ended = tools.launch(folder, *TP2)
    assert_refused_or_right(ended, "metrics.jsonl", folder, whole)


@pytest.mark.soak
def test_a_clock_that_jumped_back_changes_nothing(stopped: Path, whole: Path, tmp_path: Path) -> None:
    """Everything in the folder seems to come from the future, the oldest files from the furthest."""
    folder = tools.copy_run(stopped, tmp_path / "run")
    paths = sorted(folder.rglob("*"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    for number, path in enumerate([*paths, folder]):
        then = time.time() + HOUR + number
        os.utime(path, (then, then), follow_symlinks=False)
    tools.trained(folder, *TP2)
    tools.assert_same_run(folder, whole)


@pytest.mark.soak
def test_a_clock_that_is_set_back_under_way_changes_nothing(
    stopped: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("A3PO_TEST_CLOCK", str(HOUR))
    folder = tmp_path / "run"
    tools.interrupted(folder, Interrupt("score", 4, "SIGUSR1", "rank"), *TP2, "checkpoint.time_limit_seconds=600")
    tools.trained(folder, *TP2)
    tools.assert_same_run(folder, whole)


@pytest.mark.soak
def test_of_two_runs_on_one_folder_the_second_is_refused_and_the_first_resumes_undisturbed(
    stopped: Path, whole: Path, tmp_path: Path
) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    first = tools.Launched(folder, *TP2)
    try:
        deadline = time.monotonic() + 60
        while not tools.ranks_of(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
        link = tmp_path / "other-name"
        link.symlink_to(folder)
        others = [
            subprocess.Popen(
                tools.command(name, *TP2),
                cwd=tools.ROOT,
                env=tools.environment(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
            for name in (folder, link)
        ]
        for second in others:
            words = second.communicate(timeout=120)[1]
            assert (second.returncode, words.count("\n")) == (2, 1), words
            assert "a run is live in this folder" in words
        assert first.process.poll() is None, "the first run ended before the second was refused: nothing was tested"
    finally:
        ended = first.finish()
    assert ended.code == 0, ended.all
    tools.assert_same_run(folder, whole)


@pytest.mark.parametrize("change", ["trainer.seed=1", "optimizer.lr=1.0e-4", "trainer.rollouts_per_prompt=8"])
def test_another_configuration_is_refused_with_the_name_of_the_option_and_nothing_changes(
    change: str, stopped: Path, tmp_path: Path
) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    before = tools.snapshot(folder)
    assert_refused(tools.launched_here(folder, *TP2, change), change.partition("=")[0])
    assert tools.snapshot(folder) == before


# Disks. Root passes over permissions: only a mount is read-only, or full, for everyone.


def mounted(*words: str) -> bool:
    return subprocess.run(["mount", *words], capture_output=True).returncode == 0


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Nobody can write into the folder within this block; skips the test where that cannot be had."""
    if os.geteuid() != 0:
        folders = [folder, *(path for path in folder.rglob("*") if path.is_dir())]
        modes = {path: path.stat().st_mode for path in [*folders, *folder.rglob("*")]}
        for path in modes:
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            yield
        finally:
            for path in folders:
                path.chmod(0o755)
            for path, mode in modes.items():
                path.chmod(mode)
        return
    if not mounted("--bind", str(folder), str(folder)):
        pytest.skip("root passes over permissions, and this root may not mount")
    try:
        if not mounted("-o", "remount,bind,ro", str(folder)):
            pytest.skip("this root may not mount anything read-only")
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_read_only_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with read_only(folder):
        assert_refused(tools.launched_here(folder, *TP2), str(folder))
    assert not tools.snapshot(folder)


def test_an_interrupted_run_in_a_read_only_folder_is_refused(stopped: Path, tmp_path: Path) -> None:
    folder = tools.copy_run(stopped, tmp_path / "run")
    before = tools.snapshot(folder)
    with read_only(folder):
        assert_refused(tools.launched_here(folder, *TP2), str(folder))
    assert tools.snapshot(folder) == before


@contextlib.contextmanager
def small_disk(place: Path, size: int) -> Iterator[Callable[[int], None]]:
    """A disk of so many bytes; what it gives sets another size. Skips the test where that cannot be had."""
    place.mkdir()
    if os.geteuid() != 0 or not mounted("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(place)):
        pytest.skip("only a root that may mount has a disk that is easily filled")

    def resize(size: int) -> None:
        subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)

    try:
        yield resize
    finally:
        subprocess.run(["umount", str(place)], check=True)


def disk_use(folder: Path) -> int:
    """Bytes on a disk of whole pages."""
    return sum(-(-path.lstat().st_size // 4096) * 4096 for path in folder.rglob("*"))


@pytest.mark.soak
def test_a_disk_that_is_full_at_a_save_ends_the_run_with_a_clear_error_and_the_checkpoint_before_is_resumed(
    whole: Path, tmp_path: Path
) -> None:
    one = disk_use(whole / "checkpoints" / f"step-{STEPS:06d}")
    rest = disk_use(whole) - disk_use(whole / "checkpoints")
    with small_disk(tmp_path / "disk", rest + one + one // 2) as resize:
        folder = tmp_path / "run"  # the launcher's output goes beside it, not onto the full disk
        (tmp_path / "disk" / "run").mkdir()
        folder.symlink_to(tmp_path / "disk" / "run")
        ended = tools.launch(folder, *TP2)  # the first save fits, the second does not
        assert ended.code in (1, 2), ended.all
        assert ended.err.count("\n") == 1, ended.err
        assert "No space left on device" in ended.err
        assert not tools.left_over(folder)
        kept = tools.saved_steps(folder)
        assert kept, "the checkpoint before is gone"

        again = tools.launch(folder, *TP2)  # still full: an error again, and the checkpoint stays
        assert again.code in (1, 2), again.all
        assert again.err.count("\n") == 1, again.err
        assert tools.saved_steps(folder) == kept

        resize(512 << 20)
        tools.trained(folder, *TP2)
        tools.assert_same_run(folder, whole)


@pytest.mark.soak
def test_rollouts_of_an_interrupted_step_that_are_damaged_do_not_lead_to_a_wrong_resume(
    whole: Path, tmp_path: Path
) -> None:
    """The journal is an implementation's own matter, hence only this: whatever is in it, the result is right."""
    folder = tmp_path / "run"
    tools.interrupted(folder, Interrupt("update", 3, "SIGKILL", "all"), *TP2)
    files = [path for path in (folder / "journal").rglob("*") if path.is_file() and path.stat().st_size]
    if not files:
        pytest.skip("nothing is in the journal after a kill in an update")
    for path in files:
        tools.flip_a_byte(path)
    ended = tools.launch(folder, *TP2)
    assert_refused_or_right(ended, "journal", folder, whole)


def test_what_a_run_saved_is_named_by_the_pointer_and_only_the_last_checkpoints_are_kept(whole: Path) -> None:
    found = sorted(path.name for path in (whole / "checkpoints").glob("step-*"))
    assert found == [f"step-{STEPS - 2:06d}", f"step-{STEPS:06d}"]  # checkpoint.keep_last is 2
    newest = tools.newest_checkpoint(whole)
    assert newest is not None and newest.name == found[-1]
    assert json.loads((newest / "manifest.json").read_text())["step"] == STEPS
