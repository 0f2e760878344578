"""The independent witness: what it does to its own process while it computes."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch
from transformers import AutoModelForCausalLM

from a3po_megatron.telemetry.clock import CLOCK
from a3po_megatron.telemetry.host import available_bytes
from a3po_megatron.weights import witness
from tests.harness.tiny_models import make_checkpoint

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


GIGABYTE = 10**9


def host(root: Path, groups: str, files: dict[str, int | str], available: int = 100 * GIGABYTE) -> Path:
    """What Linux shows of memory and of this process's control groups."""
    texts = {"proc/meminfo": f"MemFree: 1 kB\nMemAvailable: {available // 1024} kB\n", "proc/self/cgroup": groups}
    for name, value in (texts | files).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n" if isinstance(value, int) else value)
    return root


def test_what_is_left_on_a_host_is_what_the_tightest_of_its_limits_leaves(tmp_path: Path) -> None:
    assert available_bytes(host(tmp_path / "free", "0::/\n", {})) // 10**6 == 100_000
    job = "sys/fs/cgroup/system.slice/slurmstepd.scope/job_7"
    v2 = {
        f"{job}/step_0/memory.max": "max\n",
        f"{job}/step_0/memory.current": 30 * GIGABYTE,
        f"{job}/step_0/memory.stat": "inactive_file 0\n",
        f"{job}/memory.max": 50 * GIGABYTE,
        f"{job}/memory.current": 40 * GIGABYTE,
        f"{job}/memory.stat": f"anon 1\ninactive_file {5 * GIGABYTE}\n",  # a file's pages, which can be dropped
    }
    group = "0::/system.slice/slurmstepd.scope/job_7/step_0\n"
    assert available_bytes(host(tmp_path / "v2", group, v2)) == 15 * GIGABYTE
    step = "sys/fs/cgroup/memory/slurm/job_7"
    v1 = {
        f"{step}/memory.limit_in_bytes": 8 * GIGABYTE,
        f"{step}/memory.usage_in_bytes": 9 * GIGABYTE,
        f"{step}/memory.stat": f"total_inactive_file {3 * GIGABYTE}\n",
        "sys/fs/cgroup/memory/memory.limit_in_bytes": 9223372036854771712,  # none
        "sys/fs/cgroup/memory/memory.usage_in_bytes": 60 * GIGABYTE,
        "sys/fs/cgroup/memory/memory.stat": "total_inactive_file 0\n",
    }
    group = "5:devices:/slurm/job_7\n4:memory:/slurm/job_7\n0::/\n"
    assert available_bytes(host(tmp_path / "v1", group, v1)) == 2 * GIGABYTE
    assert 0 < available_bytes() <= psutil.virtual_memory().total
