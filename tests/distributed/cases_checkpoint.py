"""Weights of real learners, saved by Megatron and read again at other layouts (tests/test_checkpoint.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from a3po_megatron.config import Config, Settings
from a3po_megatron.convert.convert import ExportOptions, export_checkpoint
from a3po_megatron.learner.learner import Learner
from a3po_megatron.parts import build
from a3po_megatron.reward.math import grade
from a3po_megatron.rollout.vllm_engine import VllmEngine
from a3po_megatron.run.stop import Interrupt
from tests.distributed.cases_circle import InProcess
from tests.harness.ranks import CaseRanks
from tests.harness.tiny_models import hf_model, resolved

# World size → name → (model, dtype, layout): a covering choice, every family and every kind of parallelism.
SAVED: dict[int, dict[str, tuple[str, str, dict[str, Any]]]] = {
    2: {
        "qwen2_pp2": ("qwen2", "bfloat16", {"pipeline": 2}),
        "llama31_pp2_vp2": ("llama31", "float32", {"pipeline": 2, "virtual": 2}),
        "moe_ep2": ("qwen3_moe", "float32", {"data": 2, "expert": 2}),
    },
    4: {
        "qwen3_tp2_pp2": ("qwen3", "bfloat16", {"tensor": 2, "pipeline": 2}),
        "moe_tp2_ep2_sp": ("qwen3_moe_raw", "float32", {"tensor": 2, "data": 2, "expert": 2, "sequence": True}),
    },
}
# What these imply, and `make soak` runs.
IMPLIED: dict[int, dict[str, tuple[str, str, dict[str, Any]]]] = {
    2: {"qwen3_tp2_sp": ("qwen3", "float32", {"tensor": 2, "sequence": True})},
    4: {
        "llama_tp2_cp2": ("llama", "float32", {"tensor": 2, "context": 2}),
        "moe_pp2_ep2": ("qwen3_moe", "bfloat16", {"pipeline": 2, "data": 2, "expert": 2}),
    },
}
# Where what one layout saved is read again.
READ: dict[str, dict[str, Any]] = {
    "qwen3_tp2_sp": {"pipeline": 2},
    "qwen2_pp2": {"tensor": 2},
    "llama31_pp2_vp2": {"data": 2},
    "moe_ep2": {"tensor": 2, "sequence": True},
    "qwen3_tp2_pp2": {"pipeline": 2, "data": 2},
    "llama_tp2_cp2": {"pipeline": 4},
    "moe_tp2_ep2_sp": {"pipeline": 2, "data": 2},
    "moe_pp2_ep2": {"data": 4, "expert": 4},
}


def _settings(folder: Path, dtype: str, parallel: dict[str, Any]) -> Settings:
    config = Config.model_validate(
        {
            "model": {"path": str(folder), "dtype": dtype},
            "data": {"path": "builtin:arithmetic", "template": "raw"},
            "parallel": parallel,
            "publish": {"canary_prompts": 0, "bucket_bytes": 4096},
            "checkpoint": {"export_hf_every": 1},
            "trainer": {"steps": 1, "prompts_per_step": 1, "mini_batches": 1},
        }
    )
    return resolved(config)


class NoEngine(VllmEngine):
    """In the place of an engine that nobody asks for anything."""

    def __init__(self, *_: Any) -> None:
        pass


def saved_and_read_again(ranks: CaseRanks) -> dict[str, list[str]]:
    return _saved_and_read_again(ranks, SAVED[ranks.world])


def implied_saved_and_read_again(ranks: CaseRanks) -> dict[str, list[str]]:
    return _saved_and_read_again(ranks, IMPLIED[ranks.world])


def _saved_and_read_again(ranks: CaseRanks, chosen: dict[str, tuple[str, str, dict[str, Any]]]) -> dict[str, list[str]]:
    """Saves as a run does; returns the parameters that another layout's learner then reads otherwise than from HF."""
    wrong: dict[str, list[str]] = {}
    for name, (kind, dtype, parallel) in chosen.items():
        config = _settings(ranks.folder / kind, dtype, parallel)
        cluster = ranks.arrange(**config.parallel.model_dump())
        folder = ranks.folder / name
        os.makedirs(folder, exist_ok=True)
        made = build(folder, config, cluster, InProcess(grade), interrupt=Interrupt(), engine_of=NoEngine)
        made.checkpoints.step(0)

        config = _settings(ranks.folder / kind, dtype, READ[name])
        learner = Learner(ranks.arrange(**config.parallel.model_dump()), made.facts, config)
        wanted = {key: value.detach().clone() for key, value in learner.parameters().items()}
        with torch.no_grad():
            for value in learner.parameters().values():
                value.fill_(7.0)
        # By Megatron's own loader, weights alone.
        state = {name: part for name, part in learner.sharded_state().items() if name != "optimizer"}
        loaded = dist_checkpointing.load(state, str(folder / "checkpoints" / "step-000001"))
        for number, chunk in enumerate(learner.chunks):
            chunk.module.load_state_dict(loaded["model" if len(learner.chunks) == 1 else f"model{number}"])
        found = learner.parameters()
        wrong[name] = [f"{chunk} {key}" for (chunk, key), v in wanted.items() if not torch.equal(v, found[chunk, key])]
    return wrong


def greedy_tokens(ranks: CaseRanks) -> dict[str, dict[str, list[list[int]]]]:
    """What vLLM and transformers continue prompts with, each by itself, from an exported folder."""
    from vllm import LLM, SamplingParams

    from a3po_megatron.compat.vllm import keep_process_group

    keep_process_group()
    prompts = [[5, 6, 7, 8], [9, 20, 33], [40, 41, 42, 43, 44, 45]]
    found: dict[str, dict[str, list[list[int]]]] = {}
    for kind in ("qwen3_moe", "qwen3", "qwen2", "llama31"):
        exported = ranks.folder / f"{kind}-exported"
        export_checkpoint(
            ranks.folder / f"{kind}-megatron",
            exported,
            ExportOptions(bucket_bytes=4096, shard_bytes=100_000),
            lambda _: lambda _: None,
        )
        llm = LLM(
            model=str(exported),
            dtype="float32",
            enforce_eager=True,
            skip_tokenizer_init=True,
            enable_chunked_prefill=False,
            max_num_batched_tokens=512,
            max_model_len=64,
            kv_cache_memory_bytes=32 << 20,
            distributed_executor_backend="external_launcher",
            seed=0,
        )
        sampling = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True, detokenize=False)
        inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
        engine = [list(out.outputs[0].token_ids) for out in llm.generate(inputs, sampling, use_tqdm=False)]
        model: Any = hf_model(exported, torch.float32)
        theirs = []
        for prompt in prompts:
            tokens = torch.tensor([prompt])
            with torch.no_grad():
                for _ in range(24):
                    step = model(tokens).logits[0, -1].argmax()
                    tokens = torch.cat([tokens, step.view(1, 1)], dim=1)
            theirs.append(tokens[0, len(prompt) :].tolist())
        found[kind] = {"vllm": engine, "transformers": theirs}
        del llm
    assert dist.is_initialized()
    return found
