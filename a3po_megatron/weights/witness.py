"""An independent witness: the learner against transformers, on an export of its weights.

Loading, publish, export and receipt share one map of tensors: a fault in it would be invisible to all of them. Here the
learner's log-probs are compared with those of another implementation that loads what was exported by its own code.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

Scored = Mapping[tuple[tuple[int, ...], tuple[int, ...]], Tensor]  # (prompt, response) → the learner's log-probs


@torch.no_grad()
def largest_difference(folder: Path, scored: Scored, dtype: torch.dtype) -> float:
    """The largest |log-prob difference| between the learner and transformers, over all response tokens; NaN stays."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True).eval()
    worst = torch.zeros(())
    for (prompt, response), ours in scored.items():
        tokens = torch.tensor([[*prompt, *response]])
        logits = model(tokens).logits[0, len(prompt) - 1 : -1].float()
        theirs = torch.log_softmax(logits, dim=-1).gather(1, tokens[0, len(prompt) :, None])[:, 0]
        worst = torch.maximum(worst, (ours.cpu() - theirs).abs().max())
    return float(worst)
