"""The experiments in their order, smallest first. Each part is a process of its own: one that crashes takes none along,
and settings that libraries read when they are imported can differ."""

from __future__ import annotations

from collections.abc import Iterable

from .runner import Experiment

_TE = ("cuda", "package", "megatron", "te")
_FP8 = (*_TE, "hopper")
_ENGINE = (*_TE, "vllm")
_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
# Gradients that must be equal to the last bit are compared with algorithms that repeat.
_REPEATS = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
_POWERS = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}

EXPERIMENTS = (
    Experiment("1a", "TE in bf16 against a float64 oracle on the CPU", "te:bf16_against_oracle", _TE, 300),
    Experiment("1b", "FP8 recipes against bf16, scales in float32", "te:fp8_against_bf16", _FP8, 300),
    Experiment("1c", "the same, scales of powers of 2", "te:fp8_against_bf16", _FP8, 300, _POWERS),
    Experiment("1d", "FP8 weight caches: stale weights, lost gradients", "traps:cache_traps", _FP8, 300, _REPEATS),
    Experiment("1e", "token counts and sizes that FP8 refuses", "alignment:alignment", _FP8, 200),
    Experiment("1f", "FP8 weight caches: their bytes, the price without", "traps:cache_price", _FP8, 400),
    Experiment("2a", "the loss's kernels are exact", "head:exact", ("cuda", "triton"), 300),
    Experiment("2b", "their time and memory", "head:speed", ("cuda", "triton"), 300),
    Experiment("3a", "arena: GB/s, the next step bit for bit", "arena:blocks", ("cuda",), 300),
    Experiment("3b", "the same with expandable segments", "arena:blocks", ("cuda",), 300, _EXPANDABLE),
    Experiment("3c", "arena of a whole learner on TE", "arena:learner", _TE, 400, _REPEATS),
    Experiment("3d", "the same with expandable segments", "arena:learner", _TE, 400, _EXPANDABLE | _REPEATS),
    Experiment("4a", "vLLM's sleep allocator alone", "sleep:allocator", ("cuda", "vllm"), 200),
    Experiment("4b", "the same with expandable segments", "sleep:allocator", ("cuda", "vllm"), 200, _EXPANDABLE),
    Experiment("5a", "sleep, wake, reload, receipt; 20 cycles", "engine:cycles", _ENGINE, 600),
    Experiment("5b", "seeds: order of a batch, a response continued", "engine:seeds", _ENGINE, 400),
    Experiment("5c", "the same, batch-invariant", "engine:seeds_exact", _ENGINE, 400, {"VLLM_BATCH_INVARIANT": "1"}),
    Experiment("5d", "mismatch: learner bf16 and FP8, engine bf16", "engine:mismatch", (*_ENGINE, "hopper"), 600),
    Experiment(
        "5e", "mismatch: the same, engine fp8_per_block", "engine:mismatch_fp8_engine", (*_ENGINE, "hopper"), 600
    ),
    Experiment("5f", "mixture of experts: routes replayed", "engine:routes", _ENGINE, 600),
    Experiment("6", "the demo's loop, end to end", "loop:demo", _ENGINE, 900),
    Experiment("7", "generation in process against standalone vLLM", "engine:against_standalone", _ENGINE, 600),
)


def chosen(only: Iterable[str]) -> tuple[Experiment, ...]:
    """By number or part (1, 5b), in their own order; all for none. Raises ValueError for one that does not exist."""
    asked = list(only)
    for word in asked:
        if not any(_named(experiment, word) for experiment in EXPERIMENTS):
            raise ValueError(f"there is no experiment {word}: {' '.join(e.id for e in EXPERIMENTS)}")
    return tuple(e for e in EXPERIMENTS if not asked or any(_named(e, word) for word in asked))


def by_id(name: str) -> Experiment:
    return next(experiment for experiment in EXPERIMENTS if experiment.id == name)


def _named(experiment: Experiment, word: str) -> bool:
    return word in (experiment.id, experiment.id.rstrip("abcdefgh"))
