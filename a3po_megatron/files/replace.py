"""The one way to put a file or a folder in place: written under a hidden name beside it, then renamed.

    parent/.NAME.partial    while it is being written
    parent/NAME             once it is whole: whoever reads it sees the old one or the new one, and never a part

`synced` where the machine may go down, too: the bytes are on the disk before the name is theirs. A killed writer leaves
its partial file behind, and the next one writes over it. A partial folder is locked while it is being written: one that
is left behind is not, and the next writer throws it away and begins again.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from ..errors import RequestError, RunFailed
from .lock import take

PARTIAL = ".partial"


@contextlib.contextmanager
def replacing(path: Path, synced: bool = False, by: str = "") -> Iterator[Path]:
    """Yields the partial file to write; it becomes `path` when the block ends, and vanishes if the block raises.

    `by`: who writes, where several may write the same file at once.
    """
    partial = _beside(path, by)
    try:
        yield partial
        if synced:
            sync(partial)
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):  # the error that counts is the one that came first
            partial.unlink(missing_ok=True)
        raise


def write_whole(path: Path, content: str | bytes, synced: bool = False, by: str = "") -> None:
    """Writes a file, whole at once; text as UTF-8. The options are those of `replacing`."""
    with replacing(path, synced, by) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def move(path: Path, target: Path) -> None:
    """Gives a file or folder another name beside its own; what had that name is gone."""
    if target.is_dir():
        shutil.rmtree(target)  # a rename replaces a file, but no folder with something in it
    path.rename(target)


def sync(path: Path) -> None:
    """Returns when a file's bytes, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_free(folder: Path, need: int = 0) -> None:
    """Raises RequestError where `folder` cannot become a new folder of `need` bytes."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RequestError(f"{folder}: exists already and is not an empty folder: name another one, or remove it")
        if folder.is_dir() and os.path.ismount(folder):
            raise RequestError(f"{folder}: it is a mount point, which cannot be replaced: name a folder within it")
        parent = next(path for path in folder.resolve().parents if path.is_dir())
        if (free := shutil.disk_usage(parent).free) < need:
            raise RequestError(f"{folder}: {need:,} bytes are to be written, and {free:,} are free there")
    except OSError as error:
        raise RequestError(f"{folder}: cannot make it: {error.strerror}") from error


def partial_of(folder: Path) -> Path:
    """Returns where a folder is while it is being written. Of a link, the place it points to counts."""
    return _beside(folder.resolve())


def partials(folder: Path) -> list[Path]:
    """Lists the partial files and folders in a folder: where nobody is writing, what killed writers left."""
    return sorted(folder.glob(f".*{PARTIAL}"))


def _beside(path: Path, by: str = "") -> Path:
    return path.with_name(f".{path.name}{by and f'.{by}'}{PARTIAL}")


@contextlib.contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yields the partial folder to write into; it becomes `folder` when the block ends, every byte synced, and vanishes
    if the block raises.

    Raises RequestError if `folder` exists and holds anything, cannot be made, or is being written by another process,
    and RunFailed if the disk fails while it is being written.
    """
    folder, partial = folder.resolve(), partial_of(folder)
    holder = _claim(folder, partial)
    try:
        yield partial
        for path in partial.rglob("*"):
            sync(path)
        sync(partial)
        if folder.exists():
            folder.rmdir()  # an empty folder that was there before
        os.rename(partial, folder)
        sync(folder.parent)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise RunFailed(f"{error.filename2 or error.filename or folder}: cannot write it: {error.strerror}") from error
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        os.close(holder)


def _claim(folder: Path, partial: Path) -> int:
    """Makes the partial folder anew and locks it; two that start at once are told apart by a lock on the parent."""
    with contextlib.ExitStack() as stack:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            parent = os.open(folder.parent, os.O_RDONLY)
            stack.callback(os.close, parent)
            take(parent)
            check_free(folder)  # now that nobody else can finish it
            if partial.exists():
                stale = os.open(partial, os.O_RDONLY)
                stack.callback(os.close, stale)
                take(stale, seconds=0)
                shutil.rmtree(partial)
            partial.mkdir()
            holder = os.open(partial, os.O_RDONLY)
            take(holder)
            return holder
        except BlockingIOError as error:
            raise RequestError(f"{partial}: another process is writing this folder") from error
        except OSError as error:
            raise RequestError(f"{folder}: cannot make it: {error.strerror}") from error
