"""One rank that is the whole cluster, small random models, rollouts of them, and the learner on them.

The environment and the patches that Megatron, Transformer Engine and vLLM want before they are imported are there:
runner.py sees to it.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from a3po_megatron.algorithm.objectives.clipped import Clipped
from a3po_megatron.batch import Batch, Prompt, Rollout, Segment
from a3po_megatron.config import ClippedOptions, Config, ParallelOptions, Settings, TisOptions, resolve
from a3po_megatron.files.safetensors import write_file
from a3po_megatron.launch import environment
from a3po_megatron.launch.local import free_port
from a3po_megatron.launch.shell import LOOPBACK
from a3po_megatron.learner.learner import Learner
from a3po_megatron.model.cut import hf_tensors
from a3po_megatron.model.read import read_facts
from a3po_megatron.ranks.backend import CUDA, Backend
from a3po_megatron.ranks.groups import Ranks, arrange
from a3po_megatron.ranks.handoff import Handoff

CLIPPED = Clipped(ClippedOptions(), TisOptions())
# Every size a multiple of 128, so that blocks are whole ones; the vocabulary of none, so that it is padded.
TINY = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_act": "silu",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1003,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 1,
}
# Half a billion parameters: large enough that bytes and seconds are those of matrix products, not of launches.
HALF_BILLION = TINY | {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 32000,
    "max_position_embeddings": 8192,
}

MOE = TINY | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
    "norm_topk_prob": True,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def alone(backend: Backend = CUDA) -> Ranks:
    """This process as the one rank there is."""
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    if Handoff.of().store_fd is None:  # ranks.together has set where to meet
        os.environ.update(LOOPBACK | place | {"MASTER_PORT": str(free_port())})
    return join(backend)


_connected: list[Any] = []  # the store, once there is one, and a layout for each that there has been


def join(backend: Backend, parallel: ParallelOptions | None = None, engine_ranks: int = 1) -> Ranks:
    """This rank (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT) among the others, laid out so; every call after the first
    lays the same ranks out anew. Collective."""
    rank, world, limit = environment.rank(), environment.world(), timedelta(seconds=120)
    if backend.device == "cuda":
        torch.cuda.set_device(backend.local())
    if not _connected:
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        listening = Handoff.of().store_fd if rank == 0 else None
        store = dist.TCPStore(address, port, world, rank == 0, limit, master_listen_fd=listening)
        dist.init_process_group(backend.collectives, store=store, rank=rank, world_size=world, timeout=limit)
        _connected.append(store)
    else:
        from megatron.core import parallel_state

        parallel_state.destroy_model_parallel()
    _connected.append(parallel)
    store = dist.PrefixStore(f"layout-{len(_connected)}", _connected[0])
    return arrange(backend, parallel or ParallelOptions(), engine_ranks, 0, store)


def make_model(sizes: dict[str, Any] = TINY, seed: int = 0, folder: Path | None = None, logits: float = 1.0) -> Path:
    """An HF folder with random weights on bf16's grid, so that every side starts from the same numbers.

    Norms are off 1, and matrices keep the scale of what they multiply; `logits`: the scale of those.
    """
    folder = folder or Path(tempfile.mkdtemp(prefix="model-"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(sizes))
    shapes = hf_tensors(read_facts(folder))
    generator = torch.Generator().manual_seed(seed)

    def values(name: str, shape: Sequence[int]) -> Tensor:
        drawn = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            scale = logits if name == "model.norm.weight" else 1.0
            return (scale * (1 + 0.1 * drawn) if name.endswith("norm.weight") else 0.1 * drawn).bfloat16()
        return (drawn / math.sqrt(shape[1])).bfloat16()

    parts = (values(name, shape) for name, shape in shapes.items())
    write_file(folder, "model.safetensors", shapes, dict.fromkeys(shapes, torch.bfloat16), parts)
    return folder


def config(folder: Path, backend: Backend, **sections: dict[str, Any]) -> Settings:
    """A learner's settings: bf16, and plain SGD steps unless told otherwise."""
    values: dict[str, Any] = {
        "model": {"path": str(folder), "dtype": "bfloat16"},
        "data": {"path": "builtin:arithmetic"},
        "optimizer": {"lr": 1e-2, "weight_decay": 0.0, "clip_grad": 0.0},
        "learner": {"micro_batch_tokens": 512},
        "trainer": {"steps": 100, "mini_batches": 1},
    }
    for section, given in sections.items():
        values[section] = values.get(section, {}) | given
    return resolve(Config.model_validate(values), read_facts(folder), backend)


def make_learner(cluster: Ranks, folder: Path, **sections: dict[str, Any]) -> Learner:
    return Learner(cluster, read_facts(folder), config(folder, cluster.backend, **sections))


def draw_sequences(
    vocab: int, lengths: Sequence[tuple[int, int]], seed: int = 0
) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Random (prompt, response) pairs of these lengths."""
    draw = np.random.default_rng(seed)
    return [
        (tuple(map(int, draw.integers(2, vocab, p))), tuple(map(int, draw.integers(2, vocab, r)))) for p, r in lengths
    ]


# Packed sequences of very different lengths: 1 to 130 response tokens, several to a micro-batch.
LENGTHS = ((5, 23), (17, 1), (64, 130), (3, 67), (31, 31), (1, 9), (90, 115), (12, 50), (7, 77), (40, 2))


def batch_of(
    sequences: Sequence[tuple[Sequence[int], Sequence[int]]],
    old_logprobs: Tensor | None,  # [T]; None: the learner is to score
    advantages: Tensor,  # [B]
    mini_batches: int = 1,
) -> Batch:
    """One rollout a group; the sampler's log-probs are the old ones, so that their correction is 1."""
    lengths = torch.tensor([len(response) for _, response in sequences])
    count, total = len(sequences), int(lengths.sum())
    old = torch.zeros(total) if old_logprobs is None else old_logprobs
    parts = old.split(lengths.tolist())
    rollouts = [
        Rollout(
            prompt=Prompt(f"p{number}", "", "", tuple(prompt), number),
            sample=0,
            seed=0,
            step=0,
            tokens=np.array(response, dtype=np.int64),
            logprobs=parts[number].numpy(),
            finish="length",
            text="",
            segments=(Segment(len(response), 1),),
        )
        for number, (prompt, response) in enumerate(sequences)
    ]
    return Batch(
        rollouts=rollouts,
        group_index=torch.arange(count),
        mini_batch=torch.arange(count) * mini_batches // count,
        mini_batches=mini_batches,
        rewards=torch.zeros(count),
        positive=advantages > 0,
        advantages=advantages,
        lengths=lengths,
        rollout_index=torch.repeat_interleave(torch.arange(count), lengths),
        rollout_logprobs=old,
        old_logprobs=old_logprobs,
        entropy=None if old_logprobs is None else torch.zeros(total),
        token_weights=torch.ones(total),
    )


def as_hf(learner: Learner, values: dict[tuple[int, str], Tensor]) -> dict[str, Tensor]:
    """Per-parameter tensors of a rank that holds the whole model, as HF tensors on the host in float64."""
    whole: dict[str, Tensor] = {}
    for piece in learner.pieces:
        if piece.owner:
            part = values[piece.key].detach().narrow(piece.dim, piece.offset, piece.length)
            target = whole.setdefault(piece.tensor, torch.full(piece.shape, float("nan"), dtype=torch.float64))
            target.narrow(piece.dim, piece.start, piece.length).copy_(part)
    return whole


def gradients(learner: Learner) -> dict[str, Tensor]:
    """What Megatron's buffers hold, as HF tensors."""
    return as_hf(learner, {key: p.main_grad for key, p in learner.parameters().items()})  # type: ignore[attr-defined]
