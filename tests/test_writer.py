"""What a step hands over to be written is written in its order by another thread, and no failure of it goes unheard."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest

from a3po_megatron.errors import RunFailed
from a3po_megatron.files.writer import AtOnce, BesideRun


def test_the_main_thread_goes_on_while_a_disk_hangs_and_all_is_written_in_order_by_one_other_thread(
    tmp_path: Path,
) -> None:
    hangs, writer, threads = threading.Event(), BesideRun(), set()

    def write(number: int) -> None:
        hangs.wait(10)
        threads.add(threading.current_thread())
        with (tmp_path / "file").open("a") as file:
            file.write(f"{number}\n")

    begun = time.monotonic()
    for number in range(100):
        writer.put(tmp_path / "file", lambda number=number: write(number))
    assert time.monotonic() - begun < 5 and not (tmp_path / "file").exists()
    hangs.set()
    writer.drain()
    assert (tmp_path / "file").read_text() == "".join(f"{number}\n" for number in range(100))
    assert len(threads) == 1 and threading.main_thread() not in threads


def test_a_failure_is_raised_with_its_path_at_the_next_put_and_drain_and_nothing_is_written_behind_it(
    tmp_path: Path,
) -> None:
    writer, path = BesideRun(), tmp_path / "nowhere" / "step-00003.rank-0"
    writer.put(path, lambda: path.write_text("a"))
    writer.put(tmp_path / "after", lambda: (tmp_path / "after").write_text("leans on what is missing"))
    for _ in range(2):
        with pytest.raises(RunFailed, match=r"step-00003\.rank-0: cannot write it: No such file"):
            writer.drain()
    with pytest.raises(RunFailed, match="cannot write it"):
        writer.put(tmp_path / "later", lambda: (tmp_path / "later").write_text(""))
    assert list(tmp_path.iterdir()) == []
    for broken in (writer, AtOnce()):
        with pytest.raises(RunFailed, match="cannot write it"):
            broken.put(path, lambda: path.write_text("a"))


def test_an_error_that_nobody_foresaw_is_heard_too() -> None:
    writer = BesideRun()
    writer.put(Path("x/y"), lambda: 1 // 0)
    with pytest.raises(RunFailed, match="x/y: cannot write it: ZeroDivisionError"):
        writer.drain()


def test_a_put_waits_while_too_much_is_waiting() -> None:
    goes_on, writer = threading.Event(), BesideRun(limit=2)
    for _ in range(3):  # one in the thread's hands, two that wait
        writer.put(Path("x"), lambda: goes_on.wait(10))
        time.sleep(0.05)
    fourth = threading.Thread(target=writer.put, args=(Path("x"), lambda: None))
    fourth.start()
    fourth.join(0.3)
    assert fourth.is_alive()
    goes_on.set()
    fourth.join(5)
    assert not fourth.is_alive()
    writer.drain()
