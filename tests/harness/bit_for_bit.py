"""The comparison of two finished runs bit for bit: metrics, rollouts, checkpoints; times do not count."""

from __future__ import annotations

import argparse
import io
import json
import pickle
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import torch

from a3po_megatron.files.run_folder import rollout_files
from a3po_megatron.report.read import read_rollouts
from a3po_megatron.run.journal import read_frames

VOLATILE = ("perf/", "startup/", "memory/", "refit/seconds")  # metrics that measure the machine
TIME_STAMPS = ("time",)  # of a rollout
OF_FIRST_GROUPS = ("prompt", "answer", "text", "pieces")  # saved of the first groups that a rank's engine sampled


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics."""
    return [json.loads(line) for line in _lines(folder / "metrics.jsonl")]


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


def assert_same_run(found: Path, wanted: Path, steps: int) -> None:
    """Fails with every difference (of each kind the first few) between two finished runs; times do not count."""
    wrong: list[str] = []
    for compare in (_metrics_differ, _rollouts_differ, _checkpoints_differ):
        differences = list(compare(found, wanted, steps))
        wrong += differences[:8]
        if len(differences) > 8:
            wrong.append(f"… and {len(differences) - 8} more")
    assert not wrong, "\n".join([f"{found} is not {wanted}:", *wrong])


def _metrics_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    rows, others = ([json.loads(line) for line in _lines(folder / "metrics.jsonl")] for folder in (found, wanted))
    for which, name in ((rows, found), (others, wanted)):
        if [row["step"] for row in which] != list(range(steps)):
            yield f"{name}/metrics.jsonl: the steps are {[row['step'] for row in which]}, not 0 to {steps - 1}"
    by_step = {row["step"]: row for row in others}
    for row in rows:
        other = by_step.get(row["step"], {})
        if list(row) != list(other):
            yield f"step {row['step']}: the metrics are named otherwise: {sorted(row.keys() ^ other.keys())}"
        for name in (name for name in row if name in other):
            if not name.startswith(VOLATILE) and _bits(row[name]) != _bits(other[name]):
                yield f"step {row['step']}: metric {name} is {row[name]!r}, not {other[name]!r}"


def _bits(value: Any) -> Any:
    """Numbers as they are written: 0 and 0.0, 0.0 and -0.0 differ."""
    return repr(value)


def _rollouts_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    """Step by step: which rank's engine sampled a prompt, and so whose file has it, is a matter of time."""
    ours, theirs = (rollout_files(folder) for folder in (found, wanted))
    for step in sorted(ours.keys() | theirs.keys()):
        records, others = (_by_name(files.get(step, [])) for files in (ours, theirs))
        for name in sorted(records.keys() ^ others.keys()):
            yield f"rollouts of step {step}: {name} is only in {found if name in records else wanted}"
        for name in sorted(records.keys() & others.keys()):
            record, other, where = records[name], others[name], f"rollouts of step {step}, {name}"
            keys, wanted_keys = ([key for key in each if key not in OF_FIRST_GROUPS] for each in (record, other))
            if keys != wanted_keys:
                yield f"{where}: its keys are {keys}, not {wanted_keys}"
            for key in (key for key in record if key in other):
                if key not in TIME_STAMPS and not (key in OF_FIRST_GROUPS and None in (record[key], other[key])):
                    yield from objects_differ(record[key], other[key], f"{where}: {key}")
    if set(theirs) != set(range(steps)):
        yield f"{wanted}: rollouts of the steps {sorted(theirs)}, not 0 to {steps - 1}"


def _by_name(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    records = [record for path in files for record in read_rollouts(path)]
    named = {f"prompt {record['prompt_id']} sample {record['sample']}": record for record in records}
    assert len(named) == len(records), f"{files}: a rollout is there twice"
    return named


def _checkpoints_differ(found: Path, wanted: Path, steps: int) -> Iterator[str]:
    name = f"step-{steps:06d}"
    ours, theirs = found / "checkpoints" / name, wanted / "checkpoints" / name
    if missing := [str(path) for path in (ours, theirs) if not path.is_dir()]:
        yield f"no such checkpoint: {', '.join(missing)}"
        return
    chunks, others = read_chunks(ours), read_chunks(theirs)
    for key in sorted(chunks.keys() ^ others.keys()):
        yield f"{name}: {key} is only in {found if key in chunks else wanted}"
    for key in sorted(chunks.keys() & others.keys()):
        yield from objects_differ(chunks[key], others[key], f"{name}: {key}")
    common, other = (torch.load(folder / "common.pt", weights_only=False) for folder in (ours, theirs))
    yield from objects_differ(common, other, f"{name}/common.pt")
    manifest, other = (json.loads((folder / "manifest.json").read_text()) for folder in (ours, theirs))
    for part in ("step", "weight_version", "inputs", "state"):
        yield from objects_differ(manifest[part], other[part], f"{name}/manifest.json: {part}")
    for path in sorted(theirs.glob("rank-*.json")):  # the random streams
        streams, other = (json.loads((folder / path.name).read_text()) for folder in (ours, theirs))
        yield from objects_differ(streams, other, f"{name}/{path.name}")
    ours, theirs = (_carried(folder) for folder in (ours, theirs))
    yield from objects_differ(ours, theirs, f"{name}: groups that are carried over")


def _carried(checkpoint: Path) -> dict[str, bytes]:
    """What each group that is carried over holds, whichever rank answers for it."""
    frames = (frame for path in sorted(checkpoint.glob("surplus.rank-*")) for frame in read_frames(path))
    return {json.dumps(frame.header, sort_keys=True): frame.payload() or b"" for frame in frames}


def read_chunks(checkpoint: Path) -> dict[str, Any]:
    """Everything that a torch_dist checkpoint holds, weights, optimiser state and objects: "key at offsets" → value.

    Chunk by chunk, not tensor by tensor: the runs compared have one layout, and a chunk that one of them lacks shows.
    """
    with (checkpoint / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    found: dict[str, Any] = {}
    for index, place in metadata.storage_data.items():
        where = "" if index.offset is None else f" at {list(index.offset)}"
        with (checkpoint / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            data = io.BytesIO(file.read(place.length))
        value = torch.load(data, map_location="cpu", weights_only=False)
        if isinstance(value, io.BytesIO):  # an object was pickled before it was given to the writer
            value.seek(0)
            value = torch.load(value, map_location="cpu", weights_only=False)
        key = f"{index.fqn}{where}"
        assert key not in found, f"{checkpoint}: {key} is there twice"
        found[key] = value
    return found


def objects_differ(found: Any, wanted: Any, where: str) -> Iterator[str]:
    """Where two values differ, to the bit: NaN equals itself, 0.0 is not -0.0, and 1 is not 1.0."""
    if type(found) is not type(wanted):
        yield f"{where} is {found!r}, not {wanted!r}"
    elif isinstance(found, torch.Tensor | np.ndarray):
        yield from _tensors_differ(torch.as_tensor(found), torch.as_tensor(wanted), where)
    elif isinstance(found, dict):
        for key in sorted(found.keys() ^ wanted.keys(), key=repr):
            yield f"{where}[{key!r}] is only in the {'first' if key in found else 'second'}"
        for key in (key for key in found if key in wanted):
            yield from objects_differ(found[key], wanted[key], f"{where}[{key!r}]")
    elif isinstance(found, list | tuple):
        if len(found) != len(wanted):
            yield f"{where} has {len(found)} entries, not {len(wanted)}"
        for number, (one, other) in enumerate(zip(found, wanted, strict=False)):
            yield from objects_differ(one, other, f"{where}[{number}]")
    elif isinstance(found, argparse.Namespace) or (is_dataclass(found) and not isinstance(found, type)):
        yield from objects_differ(vars(found), vars(wanted), where)
    elif isinstance(found, io.BytesIO):
        yield from objects_differ(found.getvalue(), wanted.getvalue(), where)
    elif isinstance(found, Enum | set | frozenset):
        if found != wanted:
            yield f"{where} is {found!r}, not {wanted!r}"
    elif repr(found) != repr(wanted):
        yield f"{where} is {found!r}, not {wanted!r}"


def _tensors_differ(found: torch.Tensor, wanted: torch.Tensor, where: str) -> Iterator[str]:
    if (found.dtype, found.shape) != (wanted.dtype, wanted.shape):
        yield f"{where} is {found.dtype} {list(found.shape)}, not {wanted.dtype} {list(wanted.shape)}"
        return
    one, other = found.detach().contiguous().reshape(-1), wanted.detach().contiguous().reshape(-1)
    bits = [value.view(torch.uint8).reshape(one.numel(), -1) for value in (one, other)] if one.numel() else [one, other]
    wrong = torch.nonzero((bits[0] != bits[1]).reshape(one.numel(), -1).any(1))[:, 0].tolist() if one.numel() else []
    if wrong:
        first = wrong[0]
        yield (
            f"{where} ({found.dtype} {list(found.shape)}): {len(wrong)} of {one.numel()} elements differ, the first at "
            f"{first}: {one[first].item()!r}, not {other[first].item()!r}"
        )
