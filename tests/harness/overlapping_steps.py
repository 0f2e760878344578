"""In a process of its own: our engine's steps on vLLM's real AsyncScheduler, which takes a GPU in a real run.

vLLM's LLMEngine, EngineCore with its queue of batches, and AsyncScheduler are real; the model is not run: a made-up
executor answers every request with the tokens that it is told, and is a step behind as on a device.

    python -m tests.harness.overlapping_steps FOLDER       prints what is left in flight, as JSON: drained, and before

Both are forked off what has imported vLLM, which takes most of the time.
"""

from __future__ import annotations

import os

from a3po_megatron.launch import environment

environment.prepare()

import json  # noqa: E402
import sys  # noqa: E402
from collections import deque  # noqa: E402
from concurrent.futures import Future  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

from a3po_megatron import compat  # noqa: E402

compat.prepare()

from vllm.v1.core.sched.async_scheduler import AsyncScheduler  # noqa: E402
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, LogprobsLists, ModelRunnerOutput  # noqa: E402

from a3po_megatron.config import RolloutOptions  # noqa: E402
from a3po_megatron.model.read import read_facts  # noqa: E402
from a3po_megatron.ranks.backend import CPU  # noqa: E402
from a3po_megatron.rollout import vllm_engine  # noqa: E402
from a3po_megatron.rollout.engine import Request  # noqa: E402
from a3po_megatron.rollout.vllm_engine import VllmEngine  # noqa: E402
from tools.bringup.rank import alone  # noqa: E402

STOP, OTHER = 2, 5


class Executor:
    """Answers request n with OTHER until its `length` tokens are full, then with STOP."""

    def __init__(self, length: int) -> None:
        self.length, self.said = length, dict[str, int]()
        self.scheduled: list[Any] = []

    def execute_model(self, scheduled: Any, non_block: bool = False) -> Future[Any]:
        self.scheduled.append(scheduled)
        future: Future[Any] = Future()
        future.set_result(None if scheduled.total_num_scheduled_tokens else EMPTY_MODEL_RUNNER_OUTPUT)
        return future

    def sample_tokens(self, grammar: Any, non_block: bool = False) -> Future[Any]:
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


def main(folder: Path, drained: bool) -> None:
    alone(CPU)
    options = RolloutOptions(max_prompt_tokens=16, max_tokens=16, kv_cache_bytes=1 << 22)
    engine = VllmEngine(folder, read_facts(folder), [STOP], options, torch.float32, CPU)
    core = engine._llm.llm_engine.engine_core.engine_core
    given = core.scheduler
    core.scheduler = AsyncScheduler(
        vllm_config=given.vllm_config,
        kv_cache_config=given.kv_cache_config,
        structured_output_manager=given.structured_output_manager,
        block_size=given.block_size,
        include_finished_set=False,
    )
    core.batch_queue_size, core.batch_queue = 2, deque(maxlen=2)
    core.step_fn, core.model_executor = core.step_with_batch_queue, Executor(length=3)
    if not drained:  # requests alone are dropped: what a step is without the mend
        vllm_engine.drop_requests = lambda engine: engine.abort_request(
            list(engine.output_processor.request_states), internal=True
        )
    rounds = []
    for _ in range(2):
        done = [one for step in engine.sample([Request((3, 4), seed) for seed in range(3)]) for one in step]
        rounds.append([[completion.finish, len(completion.tokens)] for _, completion in done])
    in_flight = sum(entry[1].total_num_scheduled_tokens for entry in core.batch_queue)
    print(json.dumps({"rounds": rounds, "in_flight": in_flight, "requests": core.scheduler.has_requests()}), flush=True)
    os._exit(0)  # the executor has no process to shut down


if __name__ == "__main__":
    for drained in (True, False):
        process = os.fork()
        if not process:
            main(Path(sys.argv[1]), drained)
        if os.waitpid(process, 0)[1]:
            sys.exit(1)
