"""The independent witness: what it does to its own process while it computes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from a3po_megatron.telemetry.clock import CLOCK
from a3po_megatron.weights import witness
from tests.tiny import make_checkpoint

PROMPT, RESPONSE = (3, 1, 4), (1, 5)


def scored(folder: Path) -> dict[tuple[tuple[int, ...], tuple[int, ...]], torch.Tensor]:
    """What a learner that is right would have said."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = model(torch.tensor([[*PROMPT, *RESPONSE]])).logits[0].log_softmax(-1)
    return {(PROMPT, RESPONSE): torch.stack([logprobs[2, 1], logprobs[3, 5]])}


def test_every_layer_that_the_witness_has_computed_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A watchdog's limit is to pass between layers, not over the whole of a large model."""
    folder = make_checkpoint(tmp_path / "m", "qwen3")
    told = scored(folder)
    beats: list[str] = []
    monkeypatch.setattr(CLOCK, "beat", lambda: beats.append("beat"))
    assert witness.largest_difference(folder, told, torch.float32) < 1e-5
    layers = AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers
    assert len(beats) > 2 * layers  # of a layer at least attention and MLP
    beats.clear()
    torch.nn.Linear(2, 2)(torch.zeros(2))
    assert not beats  # nobody else's modules


def test_the_witness_takes_all_cores_that_the_rank_may_use_and_gives_them_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path / "m", "qwen3")
    told = scored(folder)
    before, asked = torch.get_num_threads(), []
    set_num_threads = torch.set_num_threads
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(before + 3)))
    monkeypatch.setattr(torch, "set_num_threads", lambda count: (asked.append(count), set_num_threads(count))[1])
    witness.largest_difference(folder, told, torch.float32)
    assert asked == [before + 3, before]
    assert torch.get_num_threads() == before
