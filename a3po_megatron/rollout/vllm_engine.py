"""vLLM in the learner's own process, with the weights that the learner publishes.

The engine starts with random weights (`load_format="dummy"`): whatever a publish fails to bring shows at once, instead
of being equal by chance because both sides read the same files.

Where the device's memory is shared with the learner the engine is built first, on an empty device, and falls asleep:

    asleep → wake → weights → load → forget → awake: samples → sleep → asleep

At level 2 it keeps neither weights nor cache, and whatever was computed from weights at loading is garbage after a wake
until a reload has written it anew: hence the reload of whole layers, the receipt and the canary after every one.
"""

from __future__ import annotations

import copy
import dataclasses
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from ..compat.vllm import (
    ask_for_tiles,
    drop_expert_kernels,
    drop_requests,
    keep_process_group,
    map_experts,
    name_shared_memory,
    process_state_kept,
)
from ..config import RolloutOptions
from ..config.passed import check_passed
from ..errors import RequestError, RunFailed
from ..model.cut import EngineRank, Piece, cut, engine_tensors, tensors
from ..model.facts import ModelFacts
from ..model.families.dense import EMBEDDING, HEAD, HF_LAYER
from ..model.families.moe import ROUTER
from ..model.rope import vllm_parameters
from ..ranks.backend import Backend
from ..ranks.handoff import Handoff
from .engine import Completion, Request, Sampling, in_order, local_experts

# What the package decides besides the arguments it sets: `rollout.engine_args` must not.
OWNED = {
    *("tokenizer", "quantization", "expert_placement_strategy", "pipeline_parallel_size", "data_parallel_size"),
    *("enable_sleep_mode", "weight_transfer_config", "worker_cls", "hf_overrides", "gpu_memory_utilization"),
    *("async_scheduling", "moe_backend", "quantization_config"),
    *("enable_return_routed_experts", "aux_output_config"),
    *("compilation_config", "kernel_config", "disable_custom_all_reduce"),
}


class VllmEngine:
    """One engine over `rollout.tensor` neighbouring ranks; every method is called by all of them alike."""

    def __init__(
        self,
        folder: Path,
        facts: ModelFacts,
        stops: Sequence[int],  # token ids that end a response
        options: RolloutOptions,
        dtype: torch.dtype,
        backend: Backend,
        length: int | None = None,
    ) -> None:
        """`length`: of the longest sequence, in tokens; None: of the run's rollouts."""
        if (os.environ.get("VLLM_BATCH_INVARIANT", "0") == "1") is not options.batch_invariant:
            raise RequestError(
                f"rollout.batch_invariant is {options.batch_invariant}, but VLLM_BATCH_INVARIANT is "
                f"{os.environ.get('VLLM_BATCH_INVARIANT')} in the ranks' environment: leave it to the option"
            )
        self.dtype, self.weight_version = dtype, 0
        self.receipt_strength = "requantised" if options.quantization != "none" else backend.receipt_strength
        self._facts, self._stops, self._options, self._backend = facts, list(stops), options, backend
        count = facts.experts.count if facts.experts else 0
        experts = local_experts(dist.get_rank(), options.tensor, options.expert, count)
        self._pieces = cut(facts, EngineRank(options.tensor, dist.get_rank() % options.tensor, experts))
        left_out = _left_out(options, facts.layers)
        self._quantised = {t.name for t in tensors(facts).values() if t.linear and t.layer not in left_out}
        # An expert-parallel engine is sent its own experts only, which vLLM takes one by one.
        self.fused_experts = facts.experts is not None and options.expert == 1
        with process_state_kept():  # importing vLLM changes it too
            from vllm import LLM

            keep_process_group()
            name_shared_memory(Handoff.of().started)
            if backend.device == "cpu":
                ask_for_tiles()
                if options.expert > 1:
                    map_experts()
            rope = vllm_parameters(facts.rope_theta, facts.rope_scaling)
            self._llm = LLM(**engine_arguments(folder, options, dtype, backend, facts.layers, rope, length))
        self._state = "awake"
        self.sleep()

    def sample(
        self, requests: Iterable[Request | None], sampling: Sampling | None = None, room: int | None = None
    ) -> Generator[list[tuple[int, Completion]]]:
        options = self._options
        own = Sampling(options.temperature, options.top_p, options.top_k, options.max_tokens)
        return self._complete(requests, sampling or own, room)

    def probe(self, requests: Sequence[Request], max_tokens: int) -> list[Completion]:
        return in_order(self._complete(requests, Sampling(max_tokens=max_tokens)))

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        assert self._state in ("weights", "awake"), f"an engine that is {self._state} has no memory to load into"
        if self._facts.experts is not None and self._backend.device == "cpu":
            self._llm.apply_model(drop_expert_kernels)
        # `reload_weights` is vLLM's layer-wise reload; a raw `load_weights` corrupts weights that were post-processed.
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": self._with_head(stream)})

    def holdings(self) -> tuple[Sequence[Piece], Mapping[tuple[int, str], Tensor]]:
        (parameters,) = self._llm.apply_model(lambda model: dict(model.named_parameters()))
        return self._pieces, engine_tensors(self._facts, parameters)

    def quantised(self, name: str, tensor: Tensor) -> Tensor:
        if self._options.quantization == "none" or name not in self._quantised:
            return tensor
        from vllm.utils.deep_gemm import per_block_cast_to_fp8

        return per_block_cast_to_fp8(tensor, use_ue8m0=False)[0]

    def forget(self) -> None:
        if self._backend.sleeps:
            if not self._llm.wake_up(["kv_cache"]):
                raise RunFailed("vLLM did not wake up: part of its memory is still asleep")
            self._state = "awake"
        if not self._llm.reset_prefix_cache():
            raise RunFailed("vLLM did not drop its prefix cache after a publish: it holds keys of the old weights")

    def sleep(self) -> None:
        if self._backend.sleeps:  # vLLM on a CPU cannot give memory back
            assert self._state == "awake", f"an engine that is {self._state} cannot fall asleep"
            self._llm.sleep(level=2)
            self._state = "asleep"

    def wake(self) -> None:
        if self._backend.sleeps:
            assert self._state == "asleep", f"an engine that is {self._state} cannot wake up"
            self._llm.wake_up(["weights"])
            self._state = "weights"

    def _with_head(self, stream: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """A tied output layer that is a packed copy would stay as it was, silently, without its own tensor."""
        for name, tensor in stream:
            yield name, tensor
            if self._facts.tied and self._backend.packs_head and name == EMBEDDING:
                yield HEAD, tensor

    def _complete(
        self, requests: Iterable[Request | None], how: Sampling, room: int | None = None
    ) -> Generator[list[tuple[int, Completion]]]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        asked = SamplingParams(
            temperature=how.temperature,
            top_p=how.top_p,
            top_k=how.top_k,
            max_tokens=how.max_tokens,
            seed=0,  # in each request's place
            logprobs=0,  # of the sampled token alone
            stop_token_ids=self._stops,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            skip_clone=True,  # every request has its own
        )
        devices = [torch.cuda.current_device()] if self._backend.device == "cuda" else []
        coming, taken, ended = iter(requests), 0, False
        try:
            while True:
                while not ended and (room is None or engine.get_num_unfinished_requests() < room):
                    try:
                        request = next(coming)
                    except StopIteration:
                        ended = True
                        break
                    if request is None:
                        break
                    parameters = copy.copy(asked)  # building it anew takes ten times as long
                    parameters.seed = request.seed
                    engine.add_request(str(taken), {"prompt_token_ids": list(request.prompt)}, parameters)
                    taken += 1
                if not engine.has_unfinished_requests():
                    if ended:
                        return
                    yield []
                    continue
                # vLLM draws for the whole batch before it draws anew for requests with a seed: this process' streams
                # would go on with every engine step, of which a resumed run has fewer.
                with torch.random.fork_rng(devices, device_type="cuda"):
                    outputs = engine.step()
                done: list[Any] = [output for output in outputs if output.finished]
                yield [(int(output.request_id), self._completion(output)) for output in done]
        finally:
            with torch.random.fork_rng(devices, device_type="cuda"):
                drop_requests(engine)

    def _completion(self, request: Any) -> Completion:
        """Of a finished request (vLLM's RequestOutput)."""
        (output,) = request.outputs
        if output.finish_reason not in ("stop", "length"):
            raise RunFailed(f"vLLM ended a response with {output.finish_reason!r}")
        tokens, routes = np.array(output.token_ids, dtype=np.int64), None
        logprobs = [entry[token].logprob for entry, token in zip(output.logprobs, output.token_ids, strict=True)]
        if self._options.routing_replay:
            routes = checked_routes(output.routed_experts, len(request.prompt_token_ids) + len(tokens) - 1, self._facts)
        return Completion(tokens, np.array(logprobs, dtype=np.float32), output.finish_reason, routes)


def _left_out(options: RolloutOptions, layers: int) -> list[int]:
    """The layers that are not quantised although others are."""
    start, end = options.bf16_layers
    return [layer for layer in range(layers) if layer < start or layer >= layers - end]


def engine_arguments(
    folder: Path,
    options: RolloutOptions,
    dtype: torch.dtype,
    backend: Backend,
    layers: int,
    rope: dict[str, Any] | None = None,  # in place of config.json's
    length: int | None = None,  # of the longest sequence; None: of the run's rollouts
) -> dict[str, Any]:
    """What vLLM is built with. Raises RequestError for an entry of `rollout.engine_args` that it does not know, or that
    follows from other options."""
    length = length or options.longest
    ours: dict[str, Any] = {
        "model": str(folder),
        "load_format": "dummy",
        "dtype": str(dtype).removeprefix("torch."),
        "tensor_parallel_size": options.tensor,
        "enable_expert_parallel": options.expert > 1,
        "distributed_executor_backend": "external_launcher",
        "max_model_len": length,
        "max_num_seqs": options.max_sequences,
        "kv_cache_memory_bytes": options.kv_cache_bytes,
        "logprobs_mode": "processed_logprobs",  # of the distribution that is sampled from
        "generation_config": "vllm",  # no sampling defaults from the checkpoint
        "skip_tokenizer_init": True,
        "seed": 0,  # every request brings its own
        **backend.engine_args,
    }
    if options.tensor > 1 and backend.visible() == 1:
        # One device a task (--gpus-per-task, --gpu-bind): vLLM's own all-reduce looks its neighbours up among the
        # visible ones, and ends with KeyError '0->1'. NCCL finds them.
        ours["disable_custom_all_reduce"] = True
    if options.quantization != "none":
        ours["quantization"] = options.quantization
        ours["quantization_config"] = {
            "ignore": [f"*.{ROUTER}", *(f"{HF_LAYER.format(n)}*" for n in _left_out(options, layers))]
        }
    if rope is not None:
        ours["hf_overrides"] = {"rope_parameters": rope}
    if options.routing_replay:
        # Routes of a prompt that is in the prefix cache are taken from there: vLLM returns none without that cache.
        ours |= {"enable_return_routed_experts": True, "enable_prefix_caching": True}
    defaults = {"max_num_batched_tokens": max(length, 8192), "disable_log_stats": True}
    if options.engine_args:
        from vllm.engine.arg_utils import EngineArgs

        fields = [field.name for field in dataclasses.fields(EngineArgs)]
        check_passed("rollout.engine_args", options.engine_args, fields, OWNED | ours.keys(), "vLLM's EngineArgs")
    return {**defaults, **ours, **options.engine_args}


def checked_routes(routes: Any, tokens: int, facts: ModelFacts) -> np.ndarray:
    """What vLLM says of one response's experts [T, L, k], uint8, of more than 256 experts uint16 (vLLM's
    routed_experts_capturer.py); RunFailed if that cannot be what it chose."""
    assert facts.experts is not None
    option, wanted = "rollout.routing_replay", (tokens, facts.layers, facts.experts.per_token)
    if not isinstance(routes, np.ndarray):
        raise RunFailed(f"{option}: vLLM returned no experts for a response: {routes!r}")
    kind = np.dtype(np.uint8 if facts.experts.count <= 256 else np.uint16)
    if routes.shape != wanted or routes.dtype != kind:
        raise RunFailed(
            f"{option}: vLLM returned experts of shape {routes.shape} {routes.dtype}, not {wanted} {kind} (tokens but "
            "the last, layers, experts per token)"
        )
    ordered = np.sort(routes, axis=2)
    if routes.size and int(ordered[..., -1].max()) >= facts.experts.count:
        raise RunFailed(f"{option}: vLLM returned expert {ordered.max()}, of a model with {facts.experts.count}")
    # vLLM's buffer begins as zeros: that is how a layer looks that it did not watch.
    if len(twice := np.argwhere((ordered[..., 1:] == ordered[..., :-1]).any(axis=2))):
        token, layer = twice[0].tolist()
        chosen = routes[token, layer].tolist()
        raise RunFailed(f"{option}: vLLM returned an expert twice, for token {token} in layer {layer}: {chosen}")
    return np.ascontiguousarray(routes)
