"""A file in `rollouts/`: every rollout that this rank sampled in a step, one JSON object a line.

All carry tokens and log-probs; those of the first few groups also carry their texts, token by token, for a reader.
What the learner found (old log-probs, entropy, token weights, advantage) is null for rollouts it did not train on, and,
token by token, where it did not train on a token. In a run with process rewards all carry the steps of their verdict,
and `process`: what these add to `advantage`, token by token.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import zstandard

from ..batch import Batch, Group, Rollout
from ..files.replace import replacing, write_whole
from ..files.run_folder import rejected_file, rollout_file


def save_rollouts(
    folder: Path,
    step: int,
    rank: int,
    groups: Iterable[Group],  # sampled by this rank in this step, or carried over and trained on in this step
    accepted: set[int],  # prompt indices trained on in this step
    batch: Batch,
    texts: int,  # how many groups get their texts
    pieces: Callable[[Any], list[str]],
    way_of: Callable[[str], str] | None = None,  # of a task that names ways of answering
) -> Path:
    """Writes the file of one step and rank, whole at once."""
    trained = _trained(batch)
    lines = []
    for number, group in enumerate(groups):
        for rollout in group.rollouts:
            record = _record(rollout, step, group.prompt.index in accepted, trained.get(rollout.name))
            if way_of:
                record["way"] = way_of(rollout.text)
            if batch.process_advantages is not None:
                record.setdefault("process", None)
                record["steps"] = rollout.verdict.steps
            if number < texts:
                record |= {"prompt": group.prompt.text, "answer": group.prompt.answer, "text": rollout.text}
                record["pieces"] = pieces(rollout.tokens)
            lines.append(json.dumps(record))
    path = rollout_file(folder, step, rank)
    write_whole(path, zstandard.compress("".join(f"{line}\n" for line in lines).encode()))
    return path


def save_rejected(folder: Path, step: int, mini_batch: int, rank: int, batch: Batch) -> Path:
    """Everything that went into an update that was not finite, bit for bit, for `torch.load`.

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
                "routes": None if rollout.routes is None else torch.from_numpy(rollout.routes),
                "advantage": batch.advantages[row].clone(),
                **{name: None if v is None else v[tokens].clone() for name, v in per_token.items()},
            }
        )
    folder.mkdir(exist_ok=True)
    path = rejected_file(folder, step, mini_batch, rank)
    with replacing(path) as partial:
        torch.save(entries, partial)
    return path


def _trained(batch: Batch) -> dict[str, dict[str, Any]]:
    """Rollout name → what the learner knows of it."""
    known: dict[str, dict[str, Any]] = {}
    ends = batch.lengths.cumsum(0).tolist()
    for row, rollout in enumerate(batch.rollouts):
        tokens = slice(ends[row] - len(rollout.tokens), ends[row])
        known[rollout.name] = {
            "advantage": float(batch.advantages[row]),
            "old_logprobs": _rounded(batch.old_logprobs, tokens, rollout),
            "entropy": _rounded(batch.entropy, tokens, rollout),
            "weights": _rounded(batch.token_weights, tokens, rollout),
        }
        if batch.process_advantages is not None:
            known[rollout.name]["process"] = _rounded(batch.process_advantages, tokens, rollout)
    return known


def _rounded(values: Any, tokens: slice, rollout: Rollout) -> list[float | None]:
    rounded = [round(value, 7) for value in values[tokens].tolist()]
    if not rollout.untrained:
        return rounded
    return [value if trained else None for value, trained in zip(rounded, rollout.trained(), strict=True)]


def _record(rollout: Rollout, step: int, accepted: bool, trained: dict[str, Any] | None) -> dict[str, Any]:
    return {
        "step": rollout.step,
        "prompt_id": rollout.prompt.id,
        "prompt_index": rollout.prompt.index,
        "sample": rollout.sample,
        "seed": rollout.seed,
        "outcome": rollout.verdict.outcome,
        "reason": rollout.verdict.reason,
        "reward": rollout.reward,
        "accepted": accepted,
        "carried": rollout.step < step,
        "finish": rollout.finish,
        "segments": rollout.segments,
        "tokens": rollout.tokens.tolist(),
        "logprobs": [round(value, 7) for value in rollout.logprobs.tolist()],
        **(trained or {"advantage": None, "old_logprobs": None, "entropy": None, "weights": None}),
    }
