"""A file in `rollouts/`: every rollout that this rank sampled in a step, one row each, in Parquet (zstd).

All rows carry tokens and log-probs; those of the first few groups also carry their texts, token by token, for a reader,
and stand in a row group of their own: who wants texts reads no others. Numbers are as the run had them, float32 and
int32, not rounded. What the learner found (old log-probs, entropy, token weights, advantage) is null for rollouts it
did not train on, and, token by token, where it did not train on a token. In a run with process rewards there are two
columns more: `steps` of the verdict, and `process`, what these add to `advantage`, token by token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..batch import Batch, Group, Rollout
from ..errors import RunFailed
from ..files.replace import replacing

SEGMENT = pa.struct([("length", pa.int32()), ("weight_version", pa.int32()), ("trained", pa.bool_())])
STEP = pa.struct([("begin", pa.int32()), ("end", pa.int32()), ("score", pa.float64())])
NUMBERS = ("logprobs", "old_logprobs", "entropy", "weights", "process")  # columns of one float32 a token
# Neighbouring floats share sign and exponent: split into their bytes, they pack better.
SPLIT = [f"{name}.list.element" for name in NUMBERS]
TEXTS = ("prompt_id", "outcome", "reason", "finish", "way", "prompt")  # that rows of a group share


def rollout_table(
    step: int,
    groups: Iterable[Group],  # sampled by this rank in this step, or carried over and trained on in this step
    accepted: set[int],  # prompt indices trained on in this step
    batch: Batch,
    texts: int,  # how many groups get their texts
    pieces: Callable[[Any], list[str]],
    way_of: Callable[[str], str] | None = None,  # of a task that names ways of answering
) -> pa.Table:
    """Returns the rows of one step and rank, those with texts first. They are copies: nothing that the run goes on with
    is in them, so that a thread may write them."""
    members = [(number < texts, rollout) for number, group in enumerate(groups) for rollout in group.rollouts]
    rollouts = [rollout for _, rollout in members]
    shown = [rollout if with_text else None for with_text, rollout in members]
    columns: dict[str, Any] = {
        "step": pa.array([r.step for r in rollouts], pa.int32()),
        "prompt_id": _texts(r.prompt.id for r in rollouts),
        "prompt_index": pa.array([r.prompt.index for r in rollouts], pa.int64()),
        "sample": pa.array([r.sample for r in rollouts], pa.int32()),
        "seed": pa.array([r.seed for r in rollouts], pa.uint64()),
        "outcome": _texts(r.verdict.outcome for r in rollouts),
        "reason": _texts(r.verdict.reason for r in rollouts),
        "reward": pa.array([r.reward for r in rollouts], pa.float64()),
        "accepted": pa.array([r.prompt.index in accepted for r in rollouts], pa.bool_()),
        "carried": pa.array([r.step < step for r in rollouts], pa.bool_()),
        "finish": _texts(r.finish for r in rollouts),
        "segments": pa.array([[s._asdict() for s in r.segments] for r in rollouts], pa.list_(SEGMENT)),
        "tokens": _lists([r.tokens for r in rollouts], np.int64).cast(pa.list_(pa.int32())),
        "logprobs": _lists([r.logprobs for r in rollouts], np.float32),
        **_trained(rollouts, batch),
    }
    if way_of:
        columns["way"] = _texts(way_of(r.text) for r in rollouts)
    if batch.process_advantages is not None:
        steps = [[s._asdict() for s in r.verdict.steps] for r in rollouts]
        columns["steps"] = pa.array(steps, pa.list_(STEP))
    columns["prompt"] = _texts(None if r is None else r.prompt.text for r in shown)
    answers = [None if r is None else [_sound(each) for each in _golds(r.prompt.answer)] for r in shown]
    columns["answer"] = pa.array(answers, pa.list_(pa.string()))
    columns["text"] = _texts(None if r is None else r.text for r in shown)
    written = [None if r is None else [_sound(piece) for piece in pieces(r.tokens)] for r in shown]
    columns["pieces"] = pa.array(written, pa.list_(pa.string()))
    return pa.table(columns)


def write_rollouts(path: Path, table: pa.Table) -> None:
    """Writes a file of rollouts, whole at once. Raises RunFailed, naming it, where it cannot be written."""
    with_texts = len(table) - table["pieces"].null_count
    options: dict[str, Any] = {
        "compression": "zstd",
        "use_dictionary": [name for name in TEXTS if name in table.column_names],
        "use_byte_stream_split": [name for name in SPLIT if name.partition(".")[0] in table.column_names],
    }
    try:
        with (
            replacing(path) as partial,
            partial.open("wb") as file,
            pq.ParquetWriter(file, table.schema, **options) as to,
        ):
            for part in (table[:with_texts], table[with_texts:]):
                if len(part):
                    to.write_table(part, row_group_size=len(part))
    except OSError as error:
        raise RunFailed(f"{path}: cannot write it: {error.strerror or error}") from error


def rejected_entries(batch: Batch, mini_batch: int) -> list[dict[str, Any]]:
    """Returns everything that went into an update that was not finite, bit for bit, copied.

    One entry a rollout of the mini-batch: names, tokens, segments, routes, both engines' log-probs, entropy, advantage,
    weights, what steps add to the advantage, what a regulariser goes by (None where there is no such thing).
    """
    import torch

    ends = batch.lengths.cumsum(0).tolist()
    entries = []
    for row in torch.nonzero(batch.mini_batch == mini_batch)[:, 0].tolist():
        rollout, tokens = batch.rollouts[row], slice(ends[row] - len(batch.rollouts[row].tokens), ends[row])
        per_token = {"rollout_logprobs": batch.rollout_logprobs, "old_logprobs": batch.old_logprobs}
        per_token |= {
            "entropy": batch.entropy,
            "token_weights": batch.token_weights,
            "process": batch.process_advantages,
            "reference_logprobs": batch.reference_logprobs,
            "proxy_logprobs": batch.proxy_logprobs,
            "drawn": batch.restrained,
        }
        entries.append(
            {
                "name": rollout.name,
                "prompt": list(rollout.prompt.tokens),
                "tokens": rollout.tokens.tolist(),
                "segments": [tuple(segment) for segment in rollout.segments],
                "routes": None if rollout.routes is None else torch.from_numpy(rollout.routes.copy()),
                "advantage": batch.advantages[row].clone(),
                **{name: None if v is None else v[tokens].clone() for name, v in per_token.items()},
            }
        )
    return entries


def write_rejected(path: Path, entries: list[dict[str, Any]]) -> None:
    """Writes them for `torch.load`, whole at once, in a folder that need not be there."""
    import torch

    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial, partial.open("wb") as file:
        torch.save(entries, file)


def _trained(rollouts: Sequence[Rollout], batch: Batch) -> dict[str, pa.Array]:
    """Columns of what the learner knows of rollouts: null for those that are not in its batch."""
    ends = batch.lengths.cumsum(0).tolist()
    rows = {rollout.name: row for row, rollout in enumerate(batch.rollouts)}
    places = [rows.get(rollout.name) for rollout in rollouts]
    advantages = batch.advantages.tolist()
    columns = {"advantage": pa.array([None if row is None else advantages[row] for row in places], pa.float32())}
    values = {"old_logprobs": batch.old_logprobs, "entropy": batch.entropy, "weights": batch.token_weights}
    if batch.process_advantages is not None:
        values["process"] = batch.process_advantages
    known = [rollout for rollout, row in zip(rollouts, places, strict=True) if row is not None]
    masked = ~np.concatenate([r.trained() for r in known]) if any(r.untrained for r in known) else None
    for name, found in values.items():
        if found is None:
            columns[name] = pa.nulls(len(rollouts), pa.list_(pa.float32()))
            continue
        mine = found.detach().cpu().numpy()
        parts = [
            None if row is None else mine[ends[row] - len(rollout.tokens) : ends[row]]
            for rollout, row in zip(rollouts, places, strict=True)
        ]
        columns[name] = _lists(parts, np.float32, masked)
    return columns


def _lists(parts: Sequence[np.ndarray | None], kind: type, masked: np.ndarray | None = None) -> pa.ListArray:
    """A column of lists, copied; None: a null. `masked`: which numbers of the others are null, end to end."""
    there = [part for part in parts if part is not None]
    values = np.concatenate(there).astype(kind, copy=False) if there else np.empty(0, kind)
    offsets = np.cumsum([0, *(0 if part is None else len(part) for part in parts)], dtype=np.int32)
    absent = pa.array([part is None for part in parts], pa.bool_())
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(values, mask=masked), mask=absent)


def _texts(texts: Iterable[str | None]) -> pa.Array:
    return pa.array([None if text is None else _sound(text) for text in texts], pa.string())


def _sound(text: str) -> str:
    """A text as Parquet takes it: half a surrogate pair, which JSON may hold and UTF-8 not, is written as \\ud800."""
    return text.encode("utf-8", "backslashreplace").decode()


def _golds(answer: str | tuple[str, ...]) -> tuple[str, ...]:
    return (answer,) if isinstance(answer, str) else answer
