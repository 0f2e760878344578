"""Rollouts on their way from one rank to another: one tensor of bytes.

    8 bytes: length of the header (little endian) | JSON: rollouts, arrays | the arrays' bytes

A prompt travels as its place in the run's order: every rank knows what stands there.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..batch import Prompt, Rollout, Segment, Step, Verdict


def pack(rollouts: Sequence[Rollout], arrays: Mapping[str, np.ndarray] | None = None) -> Tensor:
    """Returns bytes [n] uint8; `arrays`: what else travels with them."""
    routed = [rollout.routes for rollout in rollouts if rollout.routes is not None]  # of every rollout, or of none
    content = {
        "tokens": _joined([rollout.tokens.astype(np.int32) for rollout in rollouts], np.int32),
        "logprobs": _joined([rollout.logprobs for rollout in rollouts], np.float32),
        "routes": _joined([routes.ravel() for routes in routed], routed[0].dtype if routed else np.uint8),
        **(arrays or {}),
    }
    header = {
        "rollouts": [_described(rollout) for rollout in rollouts],
        "arrays": {name: [array.dtype.str, array.shape] for name, array in content.items()},
    }
    text = json.dumps(header).encode()
    head = len(text).to_bytes(8, "little") + text
    parcel = np.empty(len(head) + sum(array.nbytes for array in content.values()), np.uint8)
    parcel[: len(head)] = np.frombuffer(head, np.uint8)
    end = len(head)
    for array in content.values():
        parcel[end : end + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        end += array.nbytes
    return torch.from_numpy(parcel)


def unpack(data: Tensor, prompt_at: Callable[[int], Prompt]) -> tuple[list[Rollout], dict[str, np.ndarray]]:
    """Returns what was packed: rollouts, and the arrays that came with them."""
    raw = data.numpy()
    end = 8 + int.from_bytes(raw[:8].tobytes(), "little")
    header, arrays = json.loads(raw[8:end].tobytes()), {}
    for name, (kind, shape) in header["arrays"].items():
        arrays[name] = np.frombuffer(raw, kind, math.prod(shape), end).reshape(shape).copy()
        end += arrays[name].nbytes
    tokens, logprobs, routes = (arrays.pop(name) for name in ("tokens", "logprobs", "routes"))
    prompts = {index: prompt_at(index) for index in {entry["prompt"] for entry in header["rollouts"]}}
    rollouts, begin, routes_begin = [], 0, 0
    for entry in header["rollouts"]:
        segments = tuple(Segment(*segment) for segment in entry["segments"])
        mine = slice(begin, begin := begin + sum(segment.length for segment in segments))
        outcome, reason, steps = entry["verdict"]
        shape = entry["routes"]
        chosen = slice(routes_begin, routes_begin := routes_begin + (math.prod(shape) if shape else 0))
        rollouts.append(
            Rollout(
                prompt=prompts[entry["prompt"]],
                sample=entry["sample"],
                seed=entry["seed"],
                step=entry["step"],
                tokens=tokens[mine].astype(np.int64),
                logprobs=logprobs[mine],
                finish=entry["finish"],
                text=entry["text"],
                segments=segments,
                verdict=Verdict(outcome, reason, tuple(Step(*step) for step in steps)),
                reward=entry["reward"],
                routes=routes[chosen].reshape(shape) if shape else None,
            )
        )
    return rollouts, arrays


def _described(rollout: Rollout) -> dict[str, Any]:
    verdict = rollout.verdict
    return {
        "prompt": rollout.prompt.index,
        "sample": rollout.sample,
        "seed": rollout.seed,
        "step": rollout.step,
        "finish": rollout.finish,
        "text": rollout.text,
        "segments": rollout.segments,
        "verdict": [verdict.outcome, verdict.reason, verdict.steps],
        "reward": rollout.reward,
        "routes": None if rollout.routes is None else rollout.routes.shape,
    }


def _joined(parts: list[np.ndarray], kind: Any) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, kind)
