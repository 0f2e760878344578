"""A checkpoint of a run: what it holds, and whether it is whole.

    manifest.json   everything else in its folder, with size and digest, and the run's state
    *.distcp …      Megatron's sharded state: weights and optimizer
    rank-R.json     the random streams of a rank
    surplus.rank-R  groups carried over into the step (frames, run/journal.py)
    hf/             what makes the weights a model: configuration, tokenizer

`step` counts steps done, which is the number of the next. The manifest is the last file of a checkpoint to be written,
and holds a digest of itself. A checkpoint is whole if every file that it names is as it was written, and there is no
other. Nothing goes by a file's time: clocks jump.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from blake3 import blake3

from ..config import ARITHMETIC, Settings, lasting
from ..errors import RequestError
from ..files.hashed import Written, digest_of
from ..files.run_folder import MANIFEST, step_of
from ..files.side_files import side_files
from ..files.sources import files_of, paths_of

FORMAT = 4  # of a run's checkpoints, and of what says which run a folder holds: 4 has the share of groups that count
LEFT_BY_NFS = ".nfs"  # a removed file that some process had open


class Stateful(Protocol):
    """Something that must survive a restart. Its state is JSON, and the same on all ranks."""

    def state(self) -> dict[str, Any]: ...

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Manifest:
    step: int
    weight_version: int
    ranks: int
    config: dict[str, Any]  # every option of the run that saved
    inputs: dict[str, str]  # files that the run reads, by role, and their digests
    state: dict[str, dict[str, Any]]  # of everything registered in the run's inventory
    metrics_bytes: int  # of metrics.jsonl, written and on the disk
    files: dict[str, Written]

    def save(self, folder: Path) -> None:
        body = asdict(self) | {"format": FORMAT, "algorithm": "blake3"}
        body["files"] = {name: {"bytes": f.bytes, "blake3": f.blake3} for name, f in sorted(self.files.items())}
        (folder / MANIFEST).write_text(json.dumps({"manifest_blake3": _digest(body)} | body, indent=1) + "\n")


def _digest(body: dict[str, Any]) -> str:
    return blake3(json.dumps(body, sort_keys=True).encode()).hexdigest()


class Torn(RequestError):
    """A checkpoint that is not as it was written: cut off, damaged, incomplete. An older one may be whole."""


def read_manifest(folder: Path) -> Manifest:
    """Raises Torn where it is missing, cut off or altered, and RequestError for another version's format or a disk that
    does not give it."""
    path = folder / MANIFEST
    try:
        body = json.loads(path.read_bytes())
        stored, form = body.pop("manifest_blake3"), body["format"]
    except FileNotFoundError as error:
        raise Torn(f"{path}: the file is missing") from error
    except OSError as error:
        raise _unreadable(path, error) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Torn(f"{path}: not a readable manifest: {error!r}") from error
    if _digest(body) != stored:
        raise Torn(f"{path}: it is not as it was written")
    if form != FORMAT:
        raise other_format(path, form)
    files = {name: Written(name, entry["bytes"], entry["blake3"]) for name, entry in body.pop("files").items()}
    return Manifest(**{k: v for k, v in body.items() if k not in ("format", "algorithm")}, files=files)


def other_format(path: Path, form: int) -> RequestError:
    return RequestError(
        f"{path}: its format is {form}, this version reads {FORMAT}: go on with the version that wrote it "
        "(provenance.json), or choose another --run-dir"
    )


def _unreadable(path: Path, error: OSError) -> RequestError:
    """Of a disk that fails now, which says nothing of what is on it."""
    return RequestError(f"{path}: cannot read it: {error.strerror}; when the disk is well, the same command goes on")


def check_saved(folder: Path) -> None:
    """Raises Torn for a checkpoint without its last file: it was never finished, or is being removed."""
    if not (folder / MANIFEST).is_file():
        raise Torn(f"{folder / MANIFEST}: the file is missing")


def check_whole(folder: Path) -> Manifest:
    """Returns the manifest of a checkpoint whose every byte is as it was written. Raises Torn naming what is not, and
    RequestError as `read_manifest`."""
    manifest = read_manifest(folder)
    if manifest.step != step_of(folder):
        raise Torn(f"{folder / MANIFEST}: it is of step {manifest.step}: the folder was copied or renamed")
    paths = (path for path in folder.rglob("*") if not path.is_dir() and not path.name.startswith(LEFT_BY_NFS))
    there = {str(path.relative_to(folder)) for path in paths} - {MANIFEST}
    if missing := sorted(manifest.files.keys() - there):
        raise Torn(f"{folder / missing[0]}: the file is missing")
    if extra := sorted(there - manifest.files.keys()):
        raise Torn(f"{folder / extra[0]}: the checkpoint's manifest does not know this file")
    for name, written in manifest.files.items():
        try:
            size = (folder / name).stat().st_size
            if size != written.bytes:
                raise Torn(f"{folder / name}: it has {size} bytes, {written.bytes} were written")
            if digest_of(folder / name).blake3 != written.blake3:
                raise Torn(f"{folder / name}: its bytes are not those that were written: it is damaged")
        except OSError as error:
            raise _unreadable(folder / name, error) from error
    return manifest


def inputs_of(settings: Settings) -> dict[str, str]:
    """Digests of the files that a run reads besides the weights: prompts, and what makes text of tokens; and of those,
    where it reads them again at every start."""
    model = Path(settings.model.path)
    files = {name: model / name for name in (side_files(model) if model.is_dir() else ())}
    if settings.data.path != ARITHMETIC:
        read = [file for source in paths_of(settings.data.path) for file in files_of(source) if file.is_file()]
        files |= {"data": read[0]} if len(read) == 1 else {f"data/{n}": file for n, file in enumerate(read)}
    if settings.data.template_file:
        files["template"] = Path(settings.data.template_file)
    digests = {name: digest_of(path).blake3 if path.stat().st_size else "" for name, path in files.items()}
    if settings.regulariser.kl:
        from ..files.safetensors import sampled_digest  # with torch, which a submission does not wait for

        digests["weights (the reference of regulariser.kl)"] = sampled_digest(model)
    return digests


def identity(settings: Settings) -> str:
    """A digest of all that makes a run the one that it is: the options that must not change, and its inputs."""
    return _digest({"options": lasting(settings.model_dump(mode="json")), "inputs": inputs_of(settings)})[:32]
