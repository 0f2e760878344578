"""What the benches with real ranks share: a model of random weights, and starting the ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from a3po_megatron.config import Settings
from a3po_megatron.launch import environment
from a3po_megatron.launch.shell import LOOPBACK
from a3po_megatron.ranks.topology import topology_of

SIZES = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 1536,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "vocab_size": 32000,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}


def make_model(folder: Path) -> None:
    """Random weights of a size at which bytes count, with a configuration and nothing else."""
    import torch

    from a3po_megatron.files.safetensors import write_file
    from a3po_megatron.model.cut import hf_tensors
    from a3po_megatron.model.read import read_facts

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(SIZES))
    shapes = hf_tensors(read_facts(folder))
    generator = torch.Generator().manual_seed(0)
    parts = (0.02 * torch.randn(shape, generator=generator) for shape in shapes.values())
    write_file(folder, "model.safetensors", shapes, dict.fromkeys(shapes, torch.float32), parts)


def run_bench(
    name: str, script: str, options: argparse.Namespace, more: str, *words: str
) -> tuple[Settings, list[dict[str, Any]]]:
    """A bench's ranks, from a configuration with `more` lines in it; returns it, and what each rank left."""
    from a3po_megatron.config import load_config
    from a3po_megatron.launch.check import settle
    from a3po_megatron.ranks.backend import CPU
    from a3po_megatron.run.folder import save_resolved

    with tempfile.TemporaryDirectory(prefix=f"bench-{name}-") as place:
        folder = Path(place)
        (folder / "logs").mkdir()
        model = options.model or folder / "model"
        if options.model is None:
            make_model(model)
        base = folder / "bench.yaml"
        tensor = [] if any(o.startswith("parallel.") for o in options.overrides) else ["parallel.tensor=2"]
        base.write_text(f"model: {{path: {model}}}\ndata: {{path: builtin:arithmetic}}\n{more}")
        config = settle(load_config(base, [*tensor, *options.overrides]), CPU)
        save_resolved(config, folder / "config.yaml")
        ranks = topology_of(config.parallel, config.rollout.tensor).world
        start_ranks(script, folder, ranks, *words)
        return config, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(ranks)]


def named_layout(config: Settings) -> dict[str, Any]:
    """The learner's layout, without what is as usual."""
    return {name: value for name, value in config.parallel.model_dump().items() if value not in (None, 1, False)}


def start_ranks(script: str, folder: Path, ranks: int, *words: str) -> None:
    """Runs `script --rank-in folder words…` once per rank; ends the program with a failed rank's last lines."""
    from a3po_megatron.launch.local import free_port

    port, running = free_port(), []
    for rank in range(ranks):
        place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
        meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        command = [sys.executable, script, "--rank-in", str(folder), *words]
        with (folder / f"rank-{rank}.log").open("w") as log:
            settings = {**LOOPBACK, **os.environ, **place, **meet}
            die = environment.die_with_parent
            running.append(subprocess.Popen(command, env=settings, stdout=log, stderr=log, preexec_fn=die))
    for rank, process in enumerate(running):
        if process.wait(timeout=900):
            raise SystemExit(f"rank {rank} failed:\n{(folder / f'rank-{rank}.log').read_text()[-2000:]}")
