"""The checkpoints in a run folder: which one counts, and which ones go; and the configuration that the folder is for.

    checkpoints/step-000012/        appears whole (files/replace.py); its manifest is its last file (run/manifest.py)
    checkpoints/torn-step-000012/   put aside: not whole, though once it was
    checkpoints/latest              the name of the newest, written after it

Where what lies, and how steps are written in names, stands in files/run_folder.py; here is what reads manifests.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from ..config import Settings, resolved_text
from ..errors import RequestError
from ..files.replace import move, write_whole
from ..files.run_folder import LATEST, MANIFEST, step_folders, step_of, torn_folder, torn_folders
from .manifest import Torn, check_whole


def newest_whole(checkpoints: Path, check: Callable[[Path], object] = check_whole) -> tuple[Path | None, list[str]]:
    """Returns the newest checkpoint that is whole, and what is wrong with those that are newer.

    `check` raises Torn for one that is not: `check_whole` reads every byte, `read_manifest` the manifest alone, and
    `check_saved` looks whether there is one. A run resumes from what the first finds, and puts the newer ones aside;
    the others are for whoever looks on, or reads the rest later and holds it against its digests then.

    None: there never was one. Raises RequestError if there are checkpoints and none is whole, or one cannot be judged.
    """
    wrong: list[str] = []
    for folder in reversed(step_folders(checkpoints)):
        try:
            check(folder)
        except Torn as error:
            wrong.append(str(error))
            continue
        return folder, wrong
    if wrong:
        raise RequestError(
            f"{checkpoints}: no checkpoint is whole, there is none to go on from: {'; '.join(wrong)}. Put a copy of "
            "one in place, or choose another --run-dir"
        )
    return None, []


def put_aside(checkpoints: Path, after: int) -> None:
    """Renames what is newer than a step, and hence not whole: the run will come to those steps again (then `prune`)."""
    for newer in step_folders(checkpoints):
        if step_of(newer) > after:
            move(newer, torn_folder(newer))


def name_latest(checkpoints: Path, name: str) -> None:
    """Writes `latest`."""
    write_whole(checkpoints / LATEST, f"{name}\n", synced=True)


def prune(checkpoints: Path, keep_last: int, keep_every: int, best: int | None = None) -> None:
    """Removes all checkpoints but the last few, those whose step is a multiple of `keep_every` (0: none), and that of
    the step `best`; also what was put aside, once its step is saved again or past."""
    saved = step_folders(checkpoints)
    for folder in saved[:-keep_last]:
        if step_of(folder) != best and (not keep_every or step_of(folder) % keep_every):
            (folder / MANIFEST).unlink(missing_ok=True)  # first: half a checkpoint must not look like one
            shutil.rmtree(folder)
    for aside in torn_folders(checkpoints):
        if step_of(aside) <= step_of(saved[-1]):
            shutil.rmtree(aside)


def save_resolved(settings: Settings, path: Path) -> None:
    """Writes every option with its value, for `load_resolved`. Here, since the configuration knows no file of a run."""
    write_whole(path, resolved_text(settings))
