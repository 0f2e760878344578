"""Everything that can be wrong with a request is found here, before any rank starts."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .. import compat
from ..config import Config
from ..data.prompts import Prompts
from ..data.tokens import Tokens
from ..errors import RequestError
from ..model.cut import kv_heads_of_rank
from ..model.facts import ModelFacts
from ..model.layout import check_layout, layout_of
from ..model.precision import check_hardware, check_precision, is_fp8
from ..model.read import read_facts
from ..model.rope import Yarn
from ..ranks.backend import Backend, select_backend
from ..ranks.topology import topology_of
from ..rollout.engine import CPU_EXPERT_SIZE, CPU_HEAD_DIMS
from ..weights.load import check_checkpoint
from . import environment
from .hardware import find_hardware


def check_request(config: Config, backend: Backend) -> list[str]:
    """Remarks on the run's data. Raises RequestError with one clear message if this run cannot work on this machine."""
    _check_options(config)
    facts = read_facts(config.model.path)
    check_checkpoint(Path(config.model.path), facts)
    _check_layout(config, facts)
    _check_device(config, facts, backend)
    tokens = Tokens.of(config.data, Path(config.model.path), facts.vocab, facts.eos)
    limit = config.rollout.max_prompt_tokens
    prompts = Prompts(config.data, tokens, config.trainer.seed, limit, check_golds=True)
    _check_extra(config, facts, backend)
    return prompts.remarks


def check_machine(config: Config) -> Backend:
    """What this machine trains on. Raises RequestError where its GPU, torch or Transformer Engine cannot do what is
    asked for."""
    if config.cluster.device != "cpu":
        ranks = topology_of(config.parallel, config.rollout.tensor).world
        check_hardware(config.learner.precision, find_hardware(), ranks)
    return select_backend(config.cluster.device)


def _check_device(config: Config, facts: ModelFacts, backend: Backend) -> None:
    """What depends on what the ranks compute with."""
    if config.model.dtype not in backend.dtypes:
        raise RequestError(
            f"model.dtype: {config.model.dtype} is none that a GPU's attention over packed sequences takes: "
            f"{', '.join(backend.dtypes)}"
        )
    mini_batches = config.trainer.mini_batches
    check_precision(config.learner, config.model, config.parallel, facts, mini_batches)
    if is_fp8(config.learner.precision) and not backend.fp8:
        raise RequestError(f"learner.precision: {config.learner.precision} needs a GPU, and this run is on CPUs")
    _check_quantization(config, facts, backend)
    if config.rollout.routing_replay and not backend.returns_routes:
        raise RequestError(
            f"rollout.routing_replay: true: vLLM cannot say which experts it chose on this device ({backend.device})"
        )
    if backend.device == "cuda":
        return
    if config.rollout.batch_invariant:
        raise RequestError("rollout.batch_invariant has no effect on a CPU, where a rollout never depends on its batch")
    if facts.head_dim not in CPU_HEAD_DIMS:
        raise RequestError(
            f"{config.model.path}: head_dim {facts.head_dim} is none that vLLM's CPU attention takes: "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}"
        )
    if facts.experts is not None and facts.hidden % CPU_EXPERT_SIZE:
        raise RequestError(
            f"{config.model.path}: hidden_size {facts.hidden} is no multiple of {CPU_EXPERT_SIZE}, as vLLM's experts "
            "need it on a CPU"
        )


def _check_options(config: Config) -> None:
    topology = topology_of(config.parallel, config.rollout.tensor)
    if config.rollout.data not in (None, topology.engines):
        raise RequestError(
            f"rollout.data = {config.rollout.data}, but {topology.world} ranks hold {topology.engines} engines"
        )
    if config.optimizer.name == "sgd" and config.optimizer.distributed:
        raise RequestError("optimizer.name sgd needs optimizer.distributed: false: the distributed optimizer is Adam's")
    if config.optimizer.warmup_steps >= config.trainer.steps:
        raise RequestError(
            f"optimizer.warmup_steps = {config.optimizer.warmup_steps} must be below trainer.steps = "
            f"{config.trainer.steps}"
        )
    if config.optimizer.min_lr > config.optimizer.lr:
        raise RequestError(
            f"optimizer.min_lr = {config.optimizer.min_lr:g} is above optimizer.lr = {config.optimizer.lr:g}"
        )
    if config.trainer.mini_batches > config.trainer.prompts_per_step:
        raise RequestError(
            f"trainer.mini_batches = {config.trainer.mini_batches} is more than trainer.prompts_per_step = "
            f"{config.trainer.prompts_per_step}: a mini-batch holds at least one group"
        )
    if config.reward.correct <= config.reward.wrong:
        raise RequestError(
            f"reward.correct = {config.reward.correct:g} must be above reward.wrong = {config.reward.wrong:g}"
        )
    if config.reward.overlong_tokens > config.rollout.max_tokens:
        raise RequestError(
            f"reward.overlong_tokens = {config.reward.overlong_tokens} is more than rollout.max_tokens = "
            f"{config.rollout.max_tokens}"
        )


def _check_layout(config: Config, facts: ModelFacts) -> None:
    check_layout(facts, layout_of(config.parallel))
    split = config.parallel.expert_tensor
    if config.parallel.expert == 1 and split not in (None, config.parallel.tensor):
        # Megatron then counts experts among the rest, of which tensor neighbours hold parts, not copies.
        raise RequestError(
            f"parallel.expert_tensor = {split} beside parallel.tensor = {config.parallel.tensor} needs parallel.expert "
            "> 1: without it Megatron does not add up what copies of an expert learned, and they drift apart"
        )
    if facts.experts is not None and config.parallel.tensor > 1 and not config.parallel.sequence:
        raise RequestError(
            f"parallel.tensor = {config.parallel.tensor} needs parallel.sequence: true for a mixture of experts: "
            "Megatron trains it no other way"
        )
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise RequestError("parallel.sequence has no effect at parallel.tensor = 1: remove it")
    length = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    if length > facts.max_positions:
        yarn = ", or YaRN's factor × original_max_position_embeddings" if isinstance(facts.rope_scaling, Yarn) else ""
        raise RequestError(
            f"rollout.max_prompt_tokens + rollout.max_tokens = {length} is more than the model's context of "
            f"{facts.max_positions} (max_position_embeddings{yarn})"
        )
    _check_engine_experts(config, facts)
    if config.rollout.routing_replay:
        _check_replay(config, facts)
    tensor = config.rollout.tensor
    if facts.heads % tensor:
        raise RequestError(f"rollout.tensor = {tensor} does not divide the model's num_attention_heads = {facts.heads}")
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    per_token = 2 * facts.layers * _engine_kv_heads(config, facts) * facts.head_dim * itemsize
    if per_token * length > config.rollout.kv_cache_bytes:
        raise RequestError(
            f"rollout.kv_cache_bytes = {config.rollout.kv_cache_bytes} does not hold one sequence of {length} tokens: "
            f"that takes {per_token * length} bytes"
        )


def _engine_kv_heads(config: Config, facts: ModelFacts) -> int:
    """KV heads on each rank of an engine."""
    try:
        return kv_heads_of_rank(facts.kv_heads, config.rollout.tensor)
    except ValueError as error:
        raise RequestError(
            f"rollout.tensor = {config.rollout.tensor} neither divides the model's num_key_value_heads = "
            f"{facts.kv_heads}, nor is it a multiple of that"
        ) from error


def _check_quantization(config: Config, facts: ModelFacts, backend: Backend) -> None:
    rollout = config.rollout
    if rollout.quantization is None:
        return
    if not backend.fp8:
        raise RequestError(f"rollout.quantization: {rollout.quantization} needs a GPU, and this run is on CPUs")
    if config.correction.tis_cap is None:
        raise RequestError(
            f"rollout.quantization: {rollout.quantization} needs correction.tis_cap: uncorrected, learning loses what "
            "the engine's rounding takes"
        )
    ffn = facts.ffn if facts.experts is None else facts.experts.ffn
    cut = rollout.tensor if rollout.expert == 1 else 1
    sizes = {
        "num_attention_heads × head_dim": facts.heads * facts.head_dim // rollout.tensor,
        "num_key_value_heads × head_dim": _engine_kv_heads(config, facts) * facts.head_dim,
        "intermediate_size" if facts.experts is None else "moe_intermediate_size": ffn // cut,
    }
    for name, size in sizes.items():
        if size % 128:
            raise RequestError(
                f"rollout.quantization: {rollout.quantization} scales blocks of 128 × 128, and the model's {name} on "
                f"an engine's rank is {size}: blocks would lie across tensors, and what the engine holds could not be "
                "proven"
            )
    if sum(rollout.bf16_layers) > facts.layers:
        raise RequestError(f"rollout.bf16_layers = {list(rollout.bf16_layers)}: the model has {facts.layers} layers")


def _check_engine_experts(config: Config, facts: ModelFacts) -> None:
    tensor, expert, experts = config.rollout.tensor, config.rollout.expert, facts.experts
    if experts is None:
        if expert > 1:
            raise RequestError(f"rollout.expert = {expert}, but the model has no experts")
        return
    if expert == 1:
        if experts.ffn % tensor:
            raise RequestError(
                f"rollout.tensor = {tensor} does not divide the model's moe_intermediate_size = {experts.ffn}; "
                f"rollout.expert = {tensor} keeps experts whole"
            )
        return
    if expert != tensor:
        raise RequestError(
            f"rollout.expert = {expert} must be 1 or rollout.tensor = {tensor}: vLLM deals the experts of an engine "
            "over all of its ranks"
        )
    if experts.count % expert:
        raise RequestError(f"rollout.expert = {expert} does not divide the model's num_experts = {experts.count}")


# Where Megatron routes in a fused kernel, or plays a recorded graph.
BEYOND_REPLAY = ("moe_router_fusion", "enable_cuda_graph", "external_cuda_graph", "cuda_graph_impl")


def _check_replay(config: Config, facts: ModelFacts) -> None:
    option = "rollout.routing_replay: true"
    if facts.experts is None:
        raise RequestError(f"{option}, but the model has no experts")
    if facts.experts.count > 256:
        raise RequestError(f"{option} takes at most 256 experts (a byte each): the model has {facts.experts.count}")
    # vllm 0.32.0, distributed/aux_output_connector/worker.py: only the first rank of an engine is given its routes, and
    # every other one's scheduler, which an engine in the learner's processes has too, fails without them.
    if config.rollout.tensor > 1:
        raise RequestError(
            f"{option} needs rollout.tensor = 1, not {config.rollout.tensor}: vLLM gives an engine's routes to its "
            "first rank only"
        )
    for name in BEYOND_REPLAY:
        if name in config.megatron.extra:
            raise RequestError(f"{option} does not go with megatron.extra.{name}: that routing is out of its reach")


def _check_extra(config: Config, facts: ModelFacts, backend: Backend) -> None:
    """Pass-through options are held against the libraries' own fields; importing those takes seconds, so only then."""
    if not config.megatron.extra and not config.rollout.engine_args:
        return
    environment.prepare()
    with warnings.catch_warnings():  # what the libraries lack or advise is not about this request
        warnings.simplefilter("ignore")
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        compat.prepare()
        from ..model.build import DTYPES, transformer_config
        from ..rollout.vllm_engine import engine_arguments

        transformer_config(facts, config.parallel, config.model, config.megatron, config.learner, backend)
        engine_arguments(
            Path(config.model.path), config.rollout, DTYPES[config.model.known_dtype()], backend, facts.layers
        )
