"""What can be wrong with a request is found here, before any rank starts: options, layout, device, against the model's
config.json. Imports no torch; the files that a run reads are launch/check_files.py's.
"""

from __future__ import annotations

from ..config import (
    AlertsOptions,
    ClipCov,
    Config,
    CosineSchedule,
    KlCov,
    LpReg,
    MaxRl,
    NoCorrection,
    NoProcess,
    NoShaping,
    SequenceObjective,
    Settings,
    ShapingOptions,
    Signed,
    VespoOptions,
)
from ..errors import RequestError
from ..model.cut import kv_heads_of_rank
from ..model.facts import ModelFacts
from ..model.layout import check_layout, layout_of
from ..model.precision import check_hardware, check_precision, is_fp8
from ..model.read import read_facts
from ..model.rope import Yarn
from ..preflight.cache import cache_bytes_of_a_token
from ..preflight.gpus import Gpu, planned_gpu
from ..preflight.on_cpu import sized_on_cpu
from ..ranks.backend import Backend, select_backend
from ..ranks.topology import topology_of
from ..telemetry.wandb_run import check_wandb
from .check_learner import check_deep_ep, check_switches
from .hardware import find_hardware


def settle(config: Config, backend: Backend, ranks: int | None = None, gpu: Gpu | None = None) -> Settings:
    """What a run does that is asked for so, on such devices. `ranks`: how many there will be; None: as few as it needs.
    `gpu`: whose memory is planned with; None: as `planned_gpu` says, on GPUs.

    Raises RequestError with one clear message if such a run cannot work; whether it fits is `check_memory`'s to say.
    """
    facts = read_facts(config.model.path)
    if backend.device == "cuda":
        from ..preflight.sizes import Sized  # for which a run on CPUs does not wait

        gpu, reasons = gpu or planned_gpu(config), dict[str, str]()
        if config.parallel.layout == "auto":
            from ..preflight.layouts import with_layout

            config, reasons = with_layout(config, facts, backend, ranks, gpu)
        _check_as_given(config, facts, ranks)
        settings = Sized(config, facts, backend, ranks, gpu).settings
        settings = settings.because(reasons | settings.reasons)
    else:
        if config.parallel.layout == "auto":
            raise RequestError("parallel.layout: auto plans GPUs' memory, and this run is on CPUs: give the layout")
        _check_as_given(config, facts, ranks)
        settings = sized_on_cpu(config, facts, backend, ranks)
    _check_options(settings)
    _check_alerts(settings)
    _check_objective(settings)
    _check_process(settings)
    _check_advantage(settings)
    _check_restraint(settings)
    _check_profile(settings, backend)
    check_wandb(settings.telemetry)
    _check_layout(settings, facts)
    _check_device(settings, facts, backend)
    check_switches(settings, facts, backend)
    return settings


def check_machine(config: Config) -> Backend:
    """What this machine trains on. Raises RequestError where its GPU, torch or Transformer Engine cannot do what is
    asked for."""
    if config.cluster.device != "cpu":
        auto = config.parallel.layout == "auto"  # over the GPUs that there are
        ranks = 1 if auto else topology_of(config.parallel, config.rollout.tensor).world
        check_hardware(config.learner.precision, find_hardware(), ranks)
        check_deep_ep(config.learner.expert_dispatcher)
    return select_backend(config.cluster.device)


def _check_device(settings: Settings, facts: ModelFacts, backend: Backend) -> None:
    """What depends on what the ranks compute with."""
    if settings.model.dtype not in backend.dtypes:
        raise RequestError(
            f"model.dtype: {settings.model.dtype} is none that a GPU's attention over packed sequences takes: "
            f"{', '.join(backend.dtypes)}"
        )
    mini_batches = settings.trainer.mini_batches
    check_precision(settings.learner, settings.model, settings.parallel, facts, mini_batches)
    if is_fp8(settings.learner.precision) and not backend.fp8:
        raise RequestError(f"learner.precision: {settings.learner.precision} needs a GPU, and this run is on CPUs")
    _check_quantization(settings, facts, backend)
    if settings.rollout.routing_replay and not backend.returns_routes:
        raise RequestError(
            f"rollout.routing_replay: true: vLLM cannot say which experts it chose on this device ({backend.device})"
        )
    if settings.rollout.batch_invariant and backend.device == "cpu":
        raise RequestError("rollout.batch_invariant has no effect on a CPU, where a rollout never depends on its batch")
    if backend.head_dims is not None and facts.head_dim not in backend.head_dims:
        raise RequestError(
            f"{settings.model.path}: head_dim {facts.head_dim} is none that vLLM's CPU attention takes: "
            f"{', '.join(map(str, backend.head_dims))}"
        )
    if facts.experts is not None and facts.hidden % backend.experts_multiple:
        raise RequestError(
            f"{settings.model.path}: hidden_size {facts.hidden} is no multiple of {backend.experts_multiple}, as "
            "vLLM's experts need it on a CPU"
        )


def _check_as_given(config: Config, facts: ModelFacts, ranks: int | None) -> None:
    """As the options were given: what follows from them would say of an option what nobody asked for."""
    parallel, trainer = config.parallel, config.trainer
    topology = topology_of(parallel, config.rollout.tensor, ranks)
    if config.rollout.data not in (None, topology.engines):
        raise RequestError(
            f"rollout.data = {config.rollout.data}, but {topology.world} ranks hold {topology.engines} engines"
        )
    check_layout(facts, layout_of(parallel))
    tensor = config.rollout.tensor
    if facts.heads % tensor:
        raise RequestError(f"rollout.tensor = {tensor} does not divide the model's num_attention_heads = {facts.heads}")
    _engine_kv_heads(config, facts)
    _check_engine_experts(config, facts)
    if parallel.expert == 1 and parallel.expert_tensor not in (None, parallel.tensor):
        # Megatron then counts experts among the rest, of which tensor neighbours hold parts, not copies.
        raise RequestError(
            f"parallel.expert_tensor = {parallel.expert_tensor} beside parallel.tensor = {parallel.tensor} needs "
            "parallel.expert > 1: without it Megatron does not add up what copies of an expert learned, and they drift "
            "apart"
        )
    option = "mini_batch_prompts" if trainer.mini_batch_prompts else "mini_batches"
    if (count := getattr(trainer, option)) > trainer.prompts_per_step:
        raise RequestError(
            f"trainer.{option} = {count} is more than trainer.prompts_per_step = {trainer.prompts_per_step}: a "
            "mini-batch holds at least one group"
        )


def _check_options(settings: Settings) -> None:
    schedule = settings.lr_schedule
    if schedule.warmup_steps >= settings.trainer.steps:
        raise RequestError(
            f"lr_schedule.warmup_steps = {schedule.warmup_steps} must be below trainer.steps = {settings.trainer.steps}"
        )
    if isinstance(schedule, CosineSchedule) and schedule.min_lr > settings.optimizer.lr:
        raise RequestError(
            f"lr_schedule.min_lr = {schedule.min_lr:g} is above optimizer.lr = {settings.optimizer.lr:g}"
        )
    if settings.reward.correct <= settings.reward.wrong:
        raise RequestError(
            f"reward.correct = {settings.reward.correct:g} must be above reward.wrong = {settings.reward.wrong:g}"
        )
    if settings.reward.overlong_tokens > settings.rollout.max_tokens:
        raise RequestError(
            f"reward.overlong_tokens = {settings.reward.overlong_tokens} is more than rollout.max_tokens = "
            f"{settings.rollout.max_tokens}"
        )


def _check_alerts(settings: Settings) -> None:
    """An alert that could not come in such a run, where somebody counts on it."""
    alerts, usual, steps = settings.alerts, AlertsOptions(), settings.trainer.steps
    if alerts.window > steps and (alerts.stop or alerts.window != usual.window):
        raise RequestError(
            f"alerts.window = {alerts.window} is more than trainer.steps = {steps}: no alert could come in so few steps"
        )
    if alerts.hacking_fall not in (0, usual.hacking_fall) and not settings.evaluation.every_steps:
        raise RequestError(
            f"alerts.hacking_fall = {alerts.hacking_fall:g} has no effect, because evaluation.every_steps is 0 "
            "(off): a run that does not evaluate itself has no benchmark on which it could fall"
        )
    unshaped = isinstance(settings.shaping, NoShaping)
    if unshaped and ("inert_shaping" in alerts.stop or alerts.inert_rate not in (0, usual.inert_rate)):
        option = "alerts.stop: inert_shaping" if "inert_shaping" in alerts.stop else "alerts.inert_rate"
        raise RequestError(f"{option} has no effect, because shaping.name is none")


def _check_advantage(settings: Settings) -> None:
    reward = settings.reward
    if isinstance(settings.advantage, MaxRl) and (reward.wrong != 0 or reward.correct <= 0 or reward.overlong_tokens):
        raise RequestError(
            "advantage.name: max_rl divides by the share of correct rollouts: it needs reward.wrong = 0, a positive "
            "reward.correct and no reward.overlong_tokens"
        )
    regulariser = settings.regulariser
    if regulariser.kl and regulariser.place == "reward" and isinstance(settings.advantage, MaxRl | Signed):
        why = "divides by what a group gets" if isinstance(settings.advantage, MaxRl) else "does not look at rewards"
        raise RequestError(
            f"regulariser.place: reward takes off a rollout's reward, and advantage.name: {settings.advantage.name} "
            f"{why}: set regulariser.place: loss"
        )


def _check_restraint(settings: Settings) -> None:
    """Where the choice of tokens that are kept from being learned would be without effect."""
    shaping, trainer = settings.shaping, settings.trainer
    if isinstance(shaping, ClipCov) and shaping.low >= shaping.high:
        raise RequestError(f"shaping.low: {shaping.low:g} must be less than shaping.high: {shaping.high:g}")
    if isinstance(shaping, KlCov) and trainer.updates(trainer.prompts_per_step) == 1:
        raise RequestError(
            "shaping.name: kl_cov draws tokens to the old policy, which a step with one update never leaves: raise "
            "trainer.mini_batches, or take clip_cov"
        )
    if isinstance(shaping, LpReg) and settings.advantage.negative_scale == 0:
        raise RequestError(
            "shaping.name: lp_reg draws tokens of negative advantage, and advantage.negative_scale: 0 leaves none: "
            "remove one of the two"
        )


def _check_profile(settings: Settings, backend: Backend) -> None:
    telemetry, steps = settings.telemetry, settings.trainer.steps
    if late := [step for step in telemetry.profile_steps if step >= steps]:
        raise RequestError(f"telemetry.profile_steps: {late[0]} is none of the run's steps, 0 to {steps - 1}")
    if telemetry.profile_steps and telemetry.profile_kind != "torch" and backend.device == "cpu":
        raise RequestError(
            f"telemetry.profile_kind: {telemetry.profile_kind} looks at a GPU, and this run is on CPUs: take torch"
        )


def _check_objective(settings: Settings) -> None:
    """Which of the sections beside it an objective goes with."""
    objective, correction = settings.objective, settings.correction
    name = f"objective.name: {objective.name}"
    if isinstance(objective, VespoOptions) and not isinstance(correction, NoCorrection):
        raise RequestError(
            f"{name} weighs a rollout by how it was sampled, and correction.name: {correction.name} would do so "
            "again: set correction.name: none (it is tis unless it is given)"
        )
    if not isinstance(objective, SequenceObjective):
        return
    why = "has one ratio and one advantage a response"
    if not _is_unshaped(settings):
        raise RequestError(
            f"{name} {why}, so that A3PO's weights of tokens have no place in it: set shaping.name: none, or "
            "objective.name: gspo_token, whose terms are of tokens"
        )
    if isinstance(settings.shaping, ClipCov | KlCov | LpReg):
        raise RequestError(
            f"{name} {why}, so that shaping.name: {settings.shaping.name}, which chooses tokens, has no place in it: "
            "set shaping.name: none, or objective.name: gspo_token, whose terms are of tokens"
        )
    if not isinstance(settings.process, NoProcess):
        raise RequestError(
            f"{name} {why}, so that process rewards, which are of tokens, have no place in it: set process.name: none, "
            "or objective.name: gspo_token, whose terms are of tokens"
        )


def _is_unshaped(settings: Settings) -> bool:
    shaping = settings.shaping
    return not isinstance(shaping, ShapingOptions) or shaping.rho == shaping.rho_negative == 1


def _check_process(settings: Settings) -> None:
    process, shaping = settings.process, settings.shaping
    if isinstance(process, NoProcess) or process.polarity == "outcome":
        return
    if _is_unshaped(settings):
        shaped = isinstance(shaping, ShapingOptions)
        off = "shaping.rho is 1 (no shaping)" if shaped else f"shaping.name is {shaping.name}"
        raise RequestError(f"process.polarity: tokens has no effect, because {off}: remove it")


def _check_layout(settings: Settings, facts: ModelFacts) -> None:
    if facts.experts is not None and settings.parallel.tensor > 1 and not settings.parallel.sequence:
        raise RequestError(
            f"parallel.tensor = {settings.parallel.tensor} needs parallel.sequence: true for a mixture of experts: "
            "Megatron trains it no other way"
        )
    if settings.parallel.sequence and settings.parallel.tensor == 1:
        raise RequestError("parallel.sequence has no effect at parallel.tensor = 1: remove it")
    length = settings.rollout.longest
    if length > facts.max_positions:
        yarn = ", or YaRN's factor × original_max_position_embeddings" if isinstance(facts.rope_scaling, Yarn) else ""
        raise RequestError(
            f"rollout.max_prompt_tokens + rollout.max_tokens = {length} is more than the model's context of "
            f"{facts.max_positions} (max_position_embeddings{yarn})"
        )
    if settings.rollout.routing_replay:
        _check_replay(settings, facts)
    check_cache(settings, facts, length)


def check_cache(settings: Settings, facts: ModelFacts, length: int, of: str = "") -> None:
    """Raises RequestError where the engine's cache does not hold one sequence of so many tokens; `of`: whose it is."""
    per_token = cache_bytes_of_a_token(facts, settings)
    if per_token * length > settings.rollout.kv_cache_bytes:
        raise RequestError(
            f"rollout.kv_cache_bytes = {settings.rollout.kv_cache_bytes} does not hold one sequence of {length} "
            f"tokens{of}: that takes {per_token * length} bytes"
        )


def _engine_kv_heads(settings: Config, facts: ModelFacts) -> int:
    """KV heads on each rank of an engine."""
    try:
        return kv_heads_of_rank(facts.kv_heads, settings.rollout.tensor)
    except ValueError as error:
        raise RequestError(
            f"rollout.tensor = {settings.rollout.tensor} neither divides the model's num_key_value_heads = "
            f"{facts.kv_heads}, nor is it a multiple of that"
        ) from error


def _check_quantization(settings: Settings, facts: ModelFacts, backend: Backend) -> None:
    rollout = settings.rollout
    if rollout.quantization == "none":
        return
    if not backend.fp8:
        raise RequestError(f"rollout.quantization: {rollout.quantization} needs a GPU, and this run is on CPUs")
    # VESPO corrects by itself, and takes no correction beside it.
    if isinstance(settings.correction, NoCorrection) and not isinstance(settings.objective, VespoOptions):
        raise RequestError(
            f"rollout.quantization: {rollout.quantization} needs correction.name: tis: uncorrected, learning loses "
            "what the engine's rounding takes"
        )
    ffn = facts.ffn if facts.experts is None else facts.experts.ffn
    cut = rollout.tensor if rollout.expert == 1 else 1
    sizes = {
        "num_attention_heads × head_dim": facts.heads * facts.head_dim // rollout.tensor,
        "num_key_value_heads × head_dim": _engine_kv_heads(settings, facts) * facts.head_dim,
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


def _check_engine_experts(settings: Config, facts: ModelFacts) -> None:
    tensor, expert, experts = settings.rollout.tensor, settings.rollout.expert, facts.experts
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


def _check_replay(settings: Settings, facts: ModelFacts) -> None:
    option = "rollout.routing_replay: true"
    if facts.experts is None:
        raise RequestError(f"{option}, but the model has no experts")
    if facts.experts.count > 256:
        raise RequestError(f"{option} takes at most 256 experts (a byte each): the model has {facts.experts.count}")
    # vllm 0.32.0, distributed/aux_output_connector/worker.py: only the first rank of an engine is given its routes, and
    # every other one's scheduler, which an engine in the learner's processes has too, fails without them.
    if settings.rollout.tensor > 1:
        raise RequestError(
            f"{option} needs rollout.tensor = 1, not {settings.rollout.tensor}: vLLM gives an engine's routes to its "
            "first rank only"
        )
    for name in BEYOND_REPLAY:
        if name in settings.megatron.extra:
            raise RequestError(f"{option} does not go with megatron.extra.{name}: that routing is out of its reach")
