"""The experiments in their order, smallest first. Each part is a process of its own: one that crashes takes none along,
and settings that libraries read when they are imported can differ."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from .runner import Experiment

_TE = ("cuda", "package", "megatron", "te")
_FP8 = (*_TE, "hopper")
_ENGINE = (*_TE, "vllm")
_EXPANDABLE = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
# Gradients that must be equal to the last bit are compared with algorithms that repeat.
_REPEATS = {"NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"}
_POWERS = {"NVTE_FP8_BLOCK_SCALING_FP32_SCALES": "0"}


def _e(
    name: str,
    title: str,
    function: str,
    needs: tuple[str, ...],
    limit: float,
    expected: float,
    decides: str,
    environment: Mapping[str, str] | None = None,
) -> Experiment:
    return Experiment(name, title, function, needs, limit, environment or {}, expected, decides)


_TWO = (*_TE, "two")

EXPERIMENTS = (
    _e("0", "addmm in place, registered memory, storages resized", "basics:basics", ("cuda",), 120, 15,
       "arena and head have what they are built on"),
    _e("1a", "TE in bf16 against a float64 oracle on the CPU", "te:bf16_against_oracle", _TE, 300, 40,
       "TE, cuDNN and packed attention compute what the oracle does"),
    _e("1b", "FP8 recipes against bf16, scales in float32", "te:fp8_against_bf16", _FP8, 300, 60,
       "FP8 errs by its rounding alone; score and update see one forward"),
    _e("1c", "the same, scales of powers of 2", "te:fp8_against_bf16", _FP8, 300, 60,
       "what scales of powers of 2 would cost", _POWERS),
    _e("1d", "FP8 weight caches: stale weights, lost gradients", "traps:cache_traps", _FP8, 300, 60,
       "no stale weight, no lost gradient as the learner is built", _REPEATS),
    _e("1e", "token counts and sizes that FP8 refuses", "alignment:alignment", _FP8, 200, 60,
       "the learner's packs are ones that FP8 takes"),
    _e("1f", "FP8 weight caches: their bytes, the price without", "traps:cache_price", _FP8, 400, 150,
       "doing without copies costs at most a quarter"),
    _e("2a", "the loss's kernels are exact", "head:exact", ("cuda", "triton"), 300, 30,
       "the loss is exact at Qwen3's vocabulary"),
    _e("2b", "their time and memory", "head:speed", ("cuda", "triton"), 300, 100,
       "the loss runs at the bandwidth that the device has"),
    _e("3a", "arena: GB/s, the next step bit for bit", "arena:blocks", ("cuda",), 300, 60,
       "an optimizer leaves and returns bit for bit, and leaves nothing behind"),
    _e("3b", "the same with expandable segments", "arena:blocks", ("cuda",), 300, 60,
       "whether the learner may use expandable segments", _EXPANDABLE),
    _e("3c", "arena of a whole learner on TE", "arena:learner", _TE, 400, 120,
       "a learner leaves and trains on as if it had not", _REPEATS),
    _e("3d", "the same with expandable segments", "arena:learner", _TE, 400, 120,
       "the same of expandable segments", _EXPANDABLE | _REPEATS),
    _e("4a", "vLLM's sleep allocator alone", "sleep:allocator", ("cuda", "vllm"), 200, 25,
       "sleep gives memory back, and graphs outlive it"),
    _e("4b", "the same with expandable segments", "sleep:allocator", ("cuda", "vllm"), 200, 25,
       "the same beside expandable segments", _EXPANDABLE),
    _e("5a", "sleep, wake, reload, receipt; 20 cycles", "engine:cycles", _ENGINE, 600, 180,
       "publish is proven on the engine's own tensors, also after responses that stop"),
    _e("5b", "seeds: order of a batch, a response continued", "engine:seeds", _ENGINE, 400, 120,
       "a request's tokens follow from its seed"),
    _e("5c", "the same, batch-invariant", "engine:seeds_exact", _ENGINE, 400, 140,
       "batch-invariant kernels change no token", {"VLLM_BATCH_INVARIANT": "1"}),
    _e("5d", "mismatch: learner bf16 and FP8, engine bf16", "engine:mismatch", (*_ENGINE, "hopper"), 600, 140,
       "learner and engine agree, by precision"),
    _e("5e", "mismatch: the same, engine fp8_per_block", "engine:mismatch_fp8_engine", (*_ENGINE, "hopper"), 600, 160,
       "FP8 rollouts: codes read back, DeepGEMM loads"),
    _e("5f", "mixture of experts: routes replayed", "routes:routes", _ENGINE, 600, 160,
       "routes are the engine's, also after responses that stop and a sleep"),
    _e("5g", "output layer in float32 against bf16", "logits:heads", _ENGINE, 600, 240,
       "float32 logits are worth their price"),
    _e("5h", "device bytes in use asleep, by what holds them", "asleep:holders", _ENGINE, 600, 200,
       "what the planner must leave to a sleeping engine"),
    _e("5j", "20 publishes: how far the canary is off", "canary:distribution", _ENGINE, 900, 300,
       "the canary's bound raises no false alarm"),
    _e("6", "the demo's loop, end to end", "loop:demo", _ENGINE, 900, 400,
       "the loop learns on a GPU"),
    _e("7", "generation in process against standalone vLLM", "engine:against_standalone", _ENGINE, 600, 200,
       "the engine in process is vLLM as anybody runs it"),
    _e("8", "saved while rollouts run, killed, resumed", "saving:saving", _ENGINE, 600, 180,
       "a killed run goes on bit for bit", _REPEATS),
    _e("9a", "one engine over 2 GPUs", "several:tensor_engine", (*_TWO, "vllm"), 600, 200,
       "rollout.tensor 2: start, sleep, reload, equal tokens on both ranks"),
    _e("9b", "two engines beside each other", "several:two_engines", (*_TWO, "vllm"), 600, 200,
       "2 × 1: start, sleep, reload, equal tokens of both engines"),
    _e("9c", "one engine over 2 GPUs, each rank sees one", "several:tensor_engine_bound", (*_TWO, "vllm"), 600, 200,
       "--gpus-per-task: an engine over ranks that see one device each"),
    _e("10a", "the learner's layouts in bf16 against one GPU", "layouts:bf16", _TWO, 600, 240,
       "tensor, sequence, context, pipeline and expert parallel compute one GPU's gradient", _REPEATS),
    _e("10b", "the same in fp8-blockwise", "layouts:blockwise", (*_TWO, "hopper"), 600, 240,
       "the same in FP8, gathers included", _REPEATS),
    _e("11", "two nodes through Slurm: gloo, store, NCCL", "nodes:reach", ("nodes", "megatron"), 400, 60,
       "nodes reach each other, and NCCL by the fast network"),
)  # fmt: skip


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
    return word in (experiment.id, experiment.id.rstrip("abcdefghij"))
