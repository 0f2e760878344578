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
from ..model.family import Family, read_family
from ..model.layout import check_layout, layout_of
from ..rollout.engine import CPU_EXPERT_SIZE, CPU_HEAD_DIMS
from ..weights.load import check_checkpoint
from . import environment


def check_request(config: Config) -> None:
    """Raises RequestError with one clear message if this run cannot work."""
    _check_options(config)
    family = read_family(config.model.path)
    check_checkpoint(Path(config.model.path), family)
    _check_layout(config, family)
    tokens = Tokens(Path(config.model.path), family.vocab, family.eos, config.data.template)
    Prompts(config.data, tokens, config.trainer.seed, config.rollout.max_prompt_tokens)
    _check_extra(config, family)


def _check_options(config: Config) -> None:
    parallel = config.parallel
    spread = parallel.stage_ranks() // parallel.tensor
    if (copies := parallel.context * parallel.data_ranks()) % spread:
        raise RequestError(
            f"the experts of this layout spread over {spread} ranks beside tensor parallelism, but parallel.context × "
            f"parallel.data = {copies} is no multiple of that"
        )
    ranks = config.parallel.ranks()
    if ranks % config.rollout.tensor:
        raise RequestError(f"rollout.tensor = {config.rollout.tensor} does not divide the {ranks} ranks of the layout")
    engines = ranks // config.rollout.tensor
    if config.rollout.data not in (None, engines):
        raise RequestError(f"rollout.data = {config.rollout.data}, but {ranks} ranks hold {engines} engines")
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


def _check_layout(config: Config, family: Family) -> None:
    check_layout(family, layout_of(config.parallel))
    if family.experts is not None and config.parallel.tensor > 1 and not config.parallel.sequence:
        raise RequestError(
            f"parallel.tensor = {config.parallel.tensor} needs parallel.sequence: true for a mixture of experts: "
            "Megatron trains it no other way"
        )
    if config.parallel.sequence and config.parallel.tensor == 1:
        raise RequestError("parallel.sequence has no effect at parallel.tensor = 1: remove it")
    length = config.rollout.max_prompt_tokens + config.rollout.max_tokens
    if length > family.max_positions:
        raise RequestError(
            f"rollout.max_prompt_tokens + rollout.max_tokens = {length} is more than the model's context of "
            f"{family.max_positions} (max_position_embeddings)"
        )
    _check_engine_experts(config, family)
    if config.rollout.routing_replay:
        _check_replay(config, family)
    if family.head_dim not in CPU_HEAD_DIMS:
        raise RequestError(
            f"{config.model.path}: head_dim {family.head_dim} is none that vLLM's CPU attention takes: "
            f"{', '.join(map(str, CPU_HEAD_DIMS))}"
        )
    for name, size in (("num_attention_heads", family.heads), ("num_key_value_heads", family.kv_heads)):
        if size % config.rollout.tensor:
            raise RequestError(f"rollout.tensor = {config.rollout.tensor} does not divide the model's {name} = {size}")
    itemsize = 2 if config.model.dtype == "bfloat16" else 4
    per_token = 2 * family.layers * family.kv_heads * family.head_dim * itemsize // config.rollout.tensor
    if per_token * length > config.rollout.kv_cache_bytes:
        raise RequestError(
            f"rollout.kv_cache_bytes = {config.rollout.kv_cache_bytes} does not hold one sequence of {length} tokens: "
            f"that takes {per_token * length} bytes"
        )


def _check_engine_experts(config: Config, family: Family) -> None:
    tensor, expert, experts = config.rollout.tensor, config.rollout.expert, family.experts
    if experts is None:
        if expert > 1:
            raise RequestError(f"rollout.expert = {expert}, but the model has no experts")
        return
    if family.hidden % CPU_EXPERT_SIZE:
        raise RequestError(
            f"{config.model.path}: hidden_size {family.hidden} is no multiple of {CPU_EXPERT_SIZE}, as vLLM's experts "
            "need it on a CPU"
        )
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


def _check_replay(config: Config, family: Family) -> None:
    option = "rollout.routing_replay: true"
    if family.experts is None:
        raise RequestError(f"{option}, but the model has no experts")
    if family.experts.count > 256:
        raise RequestError(f"{option} takes at most 256 experts (a byte each): the model has {family.experts.count}")
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
    from ..cluster import select_backend

    backend = select_backend()
    if not backend.returns_routes:
        raise RequestError(f"{option}: vLLM cannot say which experts it chose on this device ({backend.device})")


def _check_extra(config: Config, family: Family) -> None:
    """Pass-through options are held against the libraries' own fields; importing those takes seconds, so only then."""
    if not config.megatron.extra and not config.rollout.engine_args:
        return
    environment.prepare()
    with warnings.catch_warnings():  # what the libraries lack or advise is not about this request
        warnings.simplefilter("ignore")
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        compat.prepare()
        from ..cluster import select_backend
        from ..model.build import DTYPES, transformer_config
        from ..rollout.vllm_engine import engine_arguments

        transformer_config(family, config.parallel, config.model, config.megatron)
        engine_arguments(Path(config.model.path), config.rollout, DTYPES[config.model.dtype], select_backend())
