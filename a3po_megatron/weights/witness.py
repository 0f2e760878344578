"""An independent witness: the learner against transformers, on an export of its weights.

Loading, publish, export and receipt share one map of tensors: a fault in it would be invisible to all of them. Here the
learner's log-probs are compared with those of another implementation that loads what was exported by its own code.

It runs on the host, on all cores that this rank may use while the others wait: on one thread a model of 32B would take
longer than a rank may be silent. Each module that has been computed is a sign of life.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.module import register_module_forward_hook

from ..model.cut import tensors
from ..model.facts import ModelFacts
from ..telemetry.clock import CLOCK
from ..telemetry.host import available_bytes
from .transfer import kept_in

WORKSPACE = 1.1  # of what a model takes: activations and logits of a canary

Scored = Mapping[tuple[tuple[int, ...], tuple[int, ...]], Tensor]  # (prompt, response) → the learner's log-probs


def lacks_room(facts: ModelFacts, dtype: torch.dtype) -> str | None:
    """Why this host cannot hold the model once more for transformers; None: it can."""
    needed = sum(tensor.numel * kept_in(tensor, dtype).itemsize for tensor in tensors(facts).values())
    if (left := available_bytes()) >= needed * WORKSPACE:
        return None
    return (
        f"transformers would hold the model in {needed / 1e9:.1f} GB of rank 0's host, which has {left / 1e9:.1f} GB "
        "left (publish.witness_at_start, publish.witness_every)"
    )


@torch.no_grad()
def largest_difference(folder: Path, scored: Scored, dtype: torch.dtype) -> float:
    """The largest |log-prob difference| between the learner and transformers, over all response tokens; NaN stays."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    CLOCK.beat()
    worst = torch.zeros(())
    with _all_cores(), _beating():
        for (prompt, response), ours in scored.items():
            tokens = torch.tensor([[*prompt, *response]])
            logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
            theirs = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
            worst = torch.maximum(worst, (ours.cpu() - theirs).abs().max())
    return float(worst)


@contextlib.contextmanager
def _beating() -> Iterator[None]:
    hook = register_module_forward_hook(lambda *_: CLOCK.beat())
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(max(threads, len(os.sched_getaffinity(0))))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
