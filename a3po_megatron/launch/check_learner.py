"""The learner's throughput switches, held against the device and against one another."""

from __future__ import annotations

import importlib.util

from ..config import AdamOptions, ForkTokens, LpReg, NoCorrection, Settings, ShapingOptions
from ..errors import RequestError
from ..model.facts import ModelFacts
from ..ranks.backend import Backend


def check_switches(settings: Settings, facts: ModelFacts, backend: Backend) -> None:
    """Raises RequestError for a switch that this device, model or layout cannot have, or that would do nothing."""
    _check_overlap(settings)
    _check_optimizer(settings, backend)
    _check_experts(settings, facts, backend)
    if settings.learner.fused_rope and backend.spec != "te":
        raise RequestError("learner.fused_rope is a kernel of Transformer Engine's: it needs a GPU")
    if settings.learner.old_logprobs == "rollout":
        _check_unscored(settings)


def check_deep_ep(dispatcher: str) -> None:
    """Raises RequestError where this machine lacks what the dispatcher is made of."""
    if dispatcher == "flex" and importlib.util.find_spec("deep_ep") is None:
        raise RequestError(
            "learner.expert_dispatcher: flex needs the package deep_ep (github.com/deepseek-ai/DeepEP), which is not "
            "installed; alltoall needs nothing"
        )


def _check_overlap(settings: Settings) -> None:
    learner, parallel = settings.learner, settings.parallel
    if learner.overlap_grad_reduce and parallel.data * parallel.context == 1:
        raise RequestError(
            "learner.overlap_grad_reduce has no effect at parallel.data × parallel.context = 1: there is nobody to "
            "reduce gradients with"
        )
    if not learner.overlap_param_gather:
        return
    if not settings.optimizer.distributed:
        raise RequestError(
            "learner.overlap_param_gather needs optimizer.distributed: true: else every rank updates all weights, and "
            "none are gathered"
        )
    if not learner.overlap_grad_reduce:
        raise RequestError("learner.overlap_param_gather needs learner.overlap_grad_reduce: true, as Megatron has it")
    if settings.trainer.mini_batches == 1:
        raise RequestError(
            "learner.overlap_param_gather has no effect with one mini-batch a step (trainer.mini_batches): no forward "
            "follows an update before the weights are published"
        )


def _check_optimizer(settings: Settings, backend: Backend) -> None:
    optimizer = settings.optimizer
    if not isinstance(optimizer, AdamOptions):
        return
    for option, given in (
        ("moment_dtype: bfloat16", optimizer.moment_dtype != "float32"),
        ("on_host: true", optimizer.on_host),
    ):
        if given and backend.device == "cpu":
            raise RequestError(f"optimizer.{option} saves a GPU's memory, and this run is on CPUs: remove it")
        if given and not optimizer.distributed:
            raise RequestError(f"optimizer.{option} needs optimizer.distributed: true")
    if optimizer.on_host and optimizer.moment_dtype != "float32":
        raise RequestError(
            "optimizer.moment_dtype: bfloat16 does not go with optimizer.on_host: true, where moments are float32: "
            "remove one of the two"
        )


def _check_experts(settings: Settings, facts: ModelFacts, backend: Backend) -> None:
    if settings.learner.expert_dispatcher != "flex":
        return
    option = "learner.expert_dispatcher: flex"
    if facts.experts is None:
        raise RequestError(f"{option}, but the model has no experts")
    if backend.device == "cpu":
        raise RequestError(f"{option} needs a GPU: DeepEP's kernels run there alone")
    if settings.parallel.expert * settings.parallel.expert_tensor == 1:
        raise RequestError(
            f"{option} needs parallel.expert or parallel.expert_tensor above 1: tokens travel nowhere otherwise"
        )


def _check_unscored(settings: Settings) -> None:
    """What needs the learner's own log-probs or entropies of a batch, where it does not compute them."""
    option, shaping, rollout = "learner.old_logprobs: rollout", settings.shaping, settings.rollout
    if not isinstance(settings.correction, NoCorrection):
        raise RequestError(
            f"{option} has the objective clip against the engine's log-probs, so that there is nothing to correct: set "
            f"correction.name: none (it is {settings.correction.name})"
        )
    if rollout.top_p < 1 or rollout.top_k > 0:
        cut = "top_p" if rollout.top_p < 1 else "top_k"
        raise RequestError(
            f"{option} needs rollout.{cut} off: the engine's log-probs are of what it may sample, the learner's of all"
        )
    if isinstance(shaping, ShapingOptions) and not shaping.rho == shaping.rho_negative == 1:
        if shaping.metric == "entropy":
            raise RequestError(f"{option} leaves no entropies to shape by: set shaping.metric: probability")
        if shaping.source != "rollout":
            raise RequestError(f"{option} leaves the engine's log-probs to shape by: set shaping.source: rollout")
    if isinstance(shaping, ForkTokens | LpReg):
        needs = "entropies" if isinstance(shaping, ForkTokens) else "a pass of its own"
        raise RequestError(f"{option} does not go with shaping.name: {shaping.name}, which needs {needs}")
    if settings.regulariser.kl or settings.regulariser.entropy_target:
        name = "kl" if settings.regulariser.kl else "entropy_target"
        raise RequestError(f"{option} does not go with regulariser.{name}, which needs the learner's pass over a batch")
    if unseen := {"mismatch", "entropy_collapse"} & set(settings.alerts.stop):
        raise RequestError(f"{option} leaves nothing for the alert {min(unseen)} (alerts.stop) to look at")
