"""Our engine's steps on vLLM's real AsyncScheduler, which takes a GPU in a real run (tests/test_engine_steps.py).

vLLM's LLMEngine, EngineCore with its queue of batches, and AsyncScheduler are real; the model is not run: a made-up
executor answers every request with the tokens that it is told, and is a step behind as on a device.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future
from typing import Any
from unittest import mock

import numpy as np
import torch

from a3po_megatron.config import RolloutOptions
from a3po_megatron.model.read import read_facts
from a3po_megatron.rollout import vllm_engine
from a3po_megatron.rollout.engine import Request
from a3po_megatron.rollout.vllm_engine import VllmEngine
from tests.distributed.cases_learner import settings
from tests.harness.ranks import CaseRanks

STOP, OTHER = 2, 5
KEPT: list[Any] = []  # so that nobody ends it


class Executor:
    """Answers request n with OTHER until its `length` tokens are full, then with STOP."""

    def __init__(self, length: int) -> None:
        self.length, self.said = length, dict[str, int]()
        self.scheduled: list[Any] = []

    def execute_model(self, scheduled: Any, non_block: bool = False) -> Future[Any]:
        from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT

        self.scheduled.append(scheduled)
        future: Future[Any] = Future()
        future.set_result(None if scheduled.total_num_scheduled_tokens else EMPTY_MODEL_RUNNER_OUTPUT)
        return future

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Future[Any]:
        from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput

        names = list(self.scheduled[-1].num_scheduled_tokens)
        tokens = []
        for name in names:
            self.said[name] = self.said.get(name, 0) + 1
            tokens.append(STOP if self.said[name] >= self.length else OTHER)
        columns = np.array(tokens)[:, None]
        logprobs = LogprobsLists(columns, np.full(columns.shape, -0.5, np.float32), np.zeros(len(names), np.int64))
        future: Future[Any] = Future()
        future.set_result(
            ModelRunnerOutput(
                req_ids=names,
                req_id_to_index={name: i for i, name in enumerate(names)},
                sampled_token_ids=[[token] for token in tokens],
                logprobs=logprobs,
            )
        )
        return future


def drained(ranks: CaseRanks) -> dict[str, Any]:
    """What is left in flight with our drain."""
    return _left(ranks)


def before(ranks: CaseRanks) -> dict[str, Any]:
    """Where requests alone are dropped: what a step is without the mend."""

    def drop(engine: Any) -> None:
        engine.abort_request(list(engine.output_processor.request_states), internal=True)

    with mock.patch.object(vllm_engine, "drop_requests", drop):
        return _left(ranks)


def _left(ranks: CaseRanks) -> dict[str, Any]:
    """The engine cannot be ended, as its executor is none: this process is (`own` of run_ranks)."""
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler

    options = RolloutOptions(max_prompt_tokens=16, max_tokens=16, kv_cache_bytes=1 << 22)
    folder, backend = ranks.folder / "m", ranks.arrange().backend
    engine = VllmEngine(folder, read_facts(folder), [STOP], options, torch.float32, backend)
    client: Any = engine._llm.llm_engine.engine_core
    core = client.engine_core
    given = core.scheduler
    core.scheduler = AsyncScheduler(
        vllm_config=given.vllm_config,
        kv_cache_config=given.kv_cache_config,
        structured_output_manager=given.structured_output_manager,
        block_size=given.block_size,
        include_finished_set=False,
    )
    core.batch_queue_size, core.batch_queue = 2, deque(maxlen=2)
    KEPT.append((engine, core.model_executor))
    core.step_fn, core.model_executor = core.step_with_batch_queue, Executor(length=3)
    rounds = []
    for _ in range(2):
        done = [one for step in engine.sample([Request((3, 4), seed) for seed in range(3)]) for one in step]
        rounds.append([[completion.finish, len(completion.tokens)] for _, completion in done])
    in_flight = sum(entry[1].total_num_scheduled_tokens for entry in core.batch_queue)
    return {"rounds": rounds, "in_flight": in_flight, "requests": core.scheduler.has_requests()}


def blocks(ranks: CaseRanks) -> dict[str, int]:
    """How many blocks the engine's cache has, and how many are planned."""
    from a3po_megatron.preflight.cache import cache_blocks

    options = {"max_prompt_tokens": 16, "max_tokens": 16, "kv_cache_bytes": 5_000_000}
    folder = ranks.folder / "m"
    planned = settings(folder, 1, 1, rollout=options)
    facts, backend = read_facts(folder), ranks.arrange().backend
    engine = VllmEngine(folder, facts, [STOP], planned.rollout, torch.float32, backend)
    real = engine._llm.llm_engine.vllm_config.cache_config.num_gpu_blocks
    return {"real": real, "predicted": cache_blocks(facts, planned)}
