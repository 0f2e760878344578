"""An engine whose own tensors are read back, and one that sleeps (tests/test_readback.py).

vLLM's CPU backend drops a linear layer's weights once it has packed them, and packs an expert's in place. Here it keeps
them too, as CUDA does anyway, so that its real model classes can be read back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from a3po_megatron.config import load_config
from a3po_megatron.errors import PublishError
from a3po_megatron.model.cut import EngineRank, Piece, cut, engine_tensors
from a3po_megatron.model.read import read_facts
from a3po_megatron.parts import Parts
from a3po_megatron.residency import Residency
from a3po_megatron.rollout.engine import Request, Sampling, in_order
from a3po_megatron.rollout.vllm_engine import VllmEngine
from tests.distributed import cases_circle as circle
from tests.distributed.cases_circle import Forgetful
from tests.harness.ranks import CaseRanks
from tests.harness.taking import take
from tests.harness.tiny_models import hf_model, make_checkpoint, resolved

# As in cases_circle: an engine over two ranks, and experts dealt over them, have processes of their own.
NARROW = {
    "qwen3_moe": ["parallel.data=2", "parallel.expert=2"],
    "qwen3": ["parallel.pipeline=2"],
}
NARROW_IMPLIED = {  # `make soak` runs them
    "qwen2": ["parallel.tensor=2"],
    "llama31": ["parallel.data=2"],
}
WIDE = {
    "qwen3_moe": ["parallel.data=2", "rollout.tensor=2"],
    "qwen3": ["parallel.pipeline=2", "rollout.tensor=2"],
    "qwen2": ["parallel.tensor=2", "rollout.tensor=2"],
}
DEALT = {"qwen3_moe": ["parallel.data=2", "parallel.expert=2", "rollout.tensor=2", "rollout.expert=2"]}


@contextlib.contextmanager
def weights_kept() -> Iterator[None]:
    from vllm.model_executor.layers import utils
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUUnquantizedExperts

    pack, pack_experts = utils.dispatch_cpu_unquantized_gemm, CPUUnquantizedExperts.process_weights_after_loading

    def keep(layer: torch.nn.Module, remove_weight: bool) -> None:
        pack(layer, remove_weight=False)

    def keep_experts(self: Any, layer: torch.nn.Module) -> None:
        layer.kept = {name: getattr(layer, name).detach().clone() for name in ("w13_weight", "w2_weight")}
        pack_experts(self, layer)

    utils.dispatch_cpu_unquantized_gemm = keep
    CPUUnquantizedExperts.process_weights_after_loading = keep_experts
    try:
        yield
    finally:
        utils.dispatch_cpu_unquantized_gemm = pack
        CPUUnquantizedExperts.process_weights_after_loading = pack_experts


def _kept(model: torch.nn.Module) -> dict[str, Tensor]:
    """The parameters, experts as they were before they were packed."""
    found = dict(model.named_parameters())
    for prefix, module in model.named_modules():
        found |= {f"{prefix}.{name}": value for name, value in getattr(module, "kept", {}).items()}
    return found


class Readable(Forgetful):
    def holdings(self) -> Any:
        (parameters,) = self._llm.apply_model(_kept)
        return self._pieces, engine_tensors(self._facts, parameters)


# Two KV heads for the four ranks of an engine; "qwen3" of WIDE has one for its two.
FOUR = {"qwen3": ["parallel.pipeline=2", "parallel.data=2", "rollout.tensor=4"]}


def four(ranks: CaseRanks) -> dict[str, Any]:
    return _all(ranks, FOUR)


def narrow(ranks: CaseRanks) -> dict[str, Any]:
    return _all(ranks, NARROW)


def narrow_implied(ranks: CaseRanks) -> dict[str, Any]:
    return _all(ranks, NARROW_IMPLIED)


def wide(ranks: CaseRanks) -> dict[str, Any]:
    return _all(ranks, WIDE)


def dealt(ranks: CaseRanks) -> dict[str, Any]:
    return _all(ranks, DEALT)


def _all(ranks: CaseRanks, kinds: dict[str, list[str]]) -> dict[str, Any]:
    with weights_kept():
        return {kind: _reads_back(ranks, kind, options) for kind, options in kinds.items()}


def _reads_back(ranks: CaseRanks, kind: str, options: list[str]) -> dict[str, str]:
    """What publishes say of a sound engine, and of one that fails in every way that a stream's checksum cannot see."""
    folder = ranks.folder / kind
    if ranks.rank == 0 and not folder.exists():
        sizes = {"hidden_size": 128, "moe_intermediate_size": 64} if kind == "qwen3_moe" else {}
        sizes |= {"num_key_value_heads": 1} if (kind, ranks.world) == ("qwen3", 2) else {}
        sizes |= {"vocab_size": 120} if ranks.world == 4 else {}  # of which the last rank has some
        make_checkpoint(folder, kind, **sizes)
    torch.distributed.barrier()
    # The canary is not to find anything first: what it sees is tests/test_circle.py's subject.
    asked = (f"model.path={folder}", "publish.canary_bound=1e9", "publish.canary_tokens=1")
    made: Any = _parts(Readable, ranks, *options, *asked, "publish.witness_at_start=false")
    engine, learner = made.engine, made.learner
    found: dict[str, str] = {}

    def attempt(name: str) -> None:
        with torch.no_grad():
            for parameter in learner.parameters().values():
                parameter.mul_(1.05)
        try:
            receipt = made.publish()
            found[name] = f"ok, {receipt.strength}"
        except PublishError as error:
            found[name] = str(error)

    made.publish()
    found["not vLLM's slices"] = ", ".join(_other_slices(folder, engine, ranks.rank % engine._options.tensor))
    found["greedy"] = _greedy(folder, engine)
    attempt("sound")
    attempt("sound again")
    load = engine.load
    for name in ("norm.weight", "layers.1.self_attn.o_proj.weight", "layers.1.post_attention_layernorm.weight"):
        # Written over behind vLLM's back, on the engine's last rank.
        def damaged(stream: Iterable[tuple[str, Tensor]], name: str = f"model.{name}") -> None:
            load(stream)
            if ranks.rank == ranks.world - 1:
                weight = engine.holdings()[1][0, name]
                weight.data.view(-1).view(torch.int32)[3] ^= 1  # the last bit of one mantissa

        engine.load = damaged  # type: ignore[method-assign]
        attempt(f"one bit of {name}")
    engine.load = load  # type: ignore[method-assign]
    attempt("sound after that")
    pieces = engine._pieces
    engine._pieces = tuple(_swapped(pieces))
    attempt("gate and up swapped in the engine's map")
    engine._pieces = pieces
    attempt("sound at last")
    lacking = {piece.parameter for piece in pieces} ^ {name for _, name in engine.holdings()[1]}
    found["unmapped"] = ", ".join(sorted(lacking))
    return found


def _other_slices(folder: Path, engine: Readable, rank: int) -> Iterator[str]:
    """Queries, keys and values of the engine that are not the rank's slices of the file, said literally."""
    hf, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    tensor, kv_heads, held = engine._options.tensor, config["num_key_value_heads"], engine.holdings()[1]
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.self_attn."
        for kind in ("weight", "bias") if f"{prefix}q_proj.bias" in hf else ("weight",):
            q, k, v = (hf[f"{prefix}{name}_proj.{kind}"] for name in "qkv")
            heads = range(
                rank * kv_heads // tensor, max((rank + 1) * kv_heads // tensor, rank * kv_heads // tensor + 1)
            )
            own = [torch.cat([part.chunk(kv_heads)[head] for head in heads]) for part in (k, v)]
            if not torch.equal(torch.cat([q.chunk(tensor)[rank], *own]), held[0, f"{prefix}qkv_proj.{kind}"]):
                yield f"{prefix}{kind}"


def _greedy(folder: Path, engine: Readable) -> str:
    """Whether the engine continues a prompt as transformers does, token by token."""
    prompt = [5, 17, 30, 8, 44, 21]
    greedy = Sampling(temperature=0.0, max_tokens=12)
    (batch,) = [done for done in engine._complete([Request(prompt, 0)], greedy) if done]
    tokens = batch[0][1].tokens.tolist()
    wanted = hf_model(folder, torch.float32).generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=12)
    return "equal" if tokens == wanted[0, len(prompt) :].tolist() else f"{tokens}, not {wanted.tolist()}"


def _parts(kind: type[Forgetful], ranks: CaseRanks, *options: str) -> Parts:
    return circle.parts(ranks, 1, 1, *options, engine_of=kind, receipt_strength="engine")


def _swapped(pieces: Iterable[Piece]) -> Iterator[Piece]:
    for piece in pieces:
        half = piece.length if piece.tensor.endswith(("gate_proj.weight", "up_proj.weight")) else 0
        yield dataclasses.replace(piece, offset=half - piece.offset) if half else piece


def keeps_the_process(ranks: CaseRanks) -> list[str]:
    """What is not as it was after a first engine was built in this process (vLLM is not imported before)."""
    import random

    import numpy as np

    def state() -> dict[str, Any]:
        return {
            "variables": {n: os.environ.get(n) for n in ("TORCHINDUCTOR_COMPILE_THREADS", "NCCL_ASYNC_ERROR_HANDLING")},
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state().tolist(),
            "threads": torch.get_num_threads(),
            "setter": torch.set_num_threads,
            "precision": torch.get_float32_matmul_precision(),
        }

    assert "vllm" not in sys.modules
    os.environ["NCCL_ASYNC_ERROR_HANDLING"] = "1"
    os.environ.pop("TORCHINDUCTOR_COMPILE_THREADS", None)
    config = resolved(load_config(circle.EXAMPLE, []))
    cluster, facts = ranks.arrange(), read_facts(config.model.path)
    random.random()
    before = state()
    VllmEngine(Path(config.model.path), facts, [1], config.rollout, torch.float32, cluster.backend)
    after = state()
    return [name for name in before if before[name] != after[name]]


def checks_quantised(ranks: CaseRanks) -> dict[str, Any]:
    """vLLM's own quantiser: what it makes of whole HF tensors and of an engine rank's stacked shards of them."""
    from vllm.utils.deep_gemm import per_block_cast_to_fp8

    from a3po_megatron.model.cut import hf_tensors
    from a3po_megatron.model.read import read_facts
    from a3po_megatron.weights.receipt import shard_checksums, tensor_checksum

    folder = ranks.folder / "quantised"
    sizes = {"hidden_size": 160, "intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8}
    make_checkpoint(folder, "qwen3", **sizes, head_dim=32)
    facts = read_facts(folder)
    generator = torch.Generator().manual_seed(7)
    whole = {n: torch.randn(s, generator=generator).bfloat16() for n, s in hf_tensors(facts).items()}
    names = [name for name in whole if name.endswith("_proj.weight")]
    worst = max(_quantiser_error(whole[name], per_block_cast_to_fp8) for name in names)
    unequal, altered = [], []
    for tensor in (1, 2):
        total = torch.zeros(len(names), dtype=torch.int64)
        changed = total.clone()
        for rank in range(tensor):
            pieces = [p for p in cut(facts, EngineRank(tensor, rank, (0, 0))) if p.tensor in names]
            shards: dict[tuple[int, str], Tensor] = {}
            for piece in pieces:
                part = whole[piece.tensor].narrow(piece.dim, piece.start, piece.length)
                shards[piece.key] = torch.cat([shards[piece.key], part]) if piece.key in shards else part
            codes = {key: per_block_cast_to_fp8(shard, use_ue8m0=False)[0] for key, shard in shards.items()}
            total += shard_checksums(pieces, codes, None, names)
            for value in codes.values():
                value.view(torch.uint8)[1, 1] ^= 1
            changed += shard_checksums(pieces, codes, None, names)
        wanted = [tensor_checksum(per_block_cast_to_fp8(whole[name], use_ue8m0=False)[0]) for name in names]
        unequal += [f"tp {tensor}: {n}" for n, a, b in zip(names, total.tolist(), wanted, strict=True) if a != b]
        altered.append(sum(a != b for a, b in zip(changed.tolist(), wanted, strict=True)))
    return {"worst": worst, "unequal": unequal, "altered": altered}


def _quantiser_error(weight: Tensor, quantise: Any) -> float:
    """Largest difference of codes × scales from the weight, in units of what rounding to e4m3 allows: half a step."""
    codes, scales = quantise(weight, use_ue8m0=False)
    rows, columns = weight.shape
    spread = scales.repeat_interleave(128, 0)[:rows].repeat_interleave(128, 1)[:, :columns]
    exact = weight.double() / spread.double()
    step = torch.exp2(torch.floor(torch.log2(exact.abs().clamp(min=2.0**-6))) - 3)  # three bits of mantissa
    return float(((codes.double() - exact).abs() / step).max())


class Sleepy(Forgetful):
    """An engine whose sleep and waking are only written down (a CPU cannot give memory back), its other calls too."""

    calls: list[str]

    def note_sleep(self) -> None:
        self.calls = []
        self._llm.sleep = lambda level: self.calls.append(f"sleep {level}")
        self._llm.wake_up = self._note_waking
        self._backend = dataclasses.replace(self._backend, sleeps=True)

    def _note_waking(self, tags: list[str]) -> bool:
        self.calls.append(f"wake {' '.join(tags)}")
        return "kv_cache" in tags

    def load(self, stream: Iterable[tuple[str, Tensor]]) -> None:
        self.calls.append("load")
        super().load(stream)

    def holdings(self) -> Any:
        self.calls.append("read back")
        return super().holdings()

    def probe(self, requests: Any, max_tokens: int) -> Any:
        self.calls.append("probe")
        return super().probe(requests, max_tokens)


class NotedArena:
    """A learner's arena that writes down who goes and who comes, with the engine's calls."""

    def __init__(self, arena: Any, calls: list[str]) -> None:
        self._arena, self._calls = arena, calls

    def __getattr__(self, name: str) -> Any:
        def call() -> None:
            self._calls.append(name)
            getattr(self._arena, name)()

        return call


def sleeps(ranks: CaseRanks) -> dict[str, Any]:
    """In which order memory changes hands over two steps, for each of what the learner may take away."""
    found: dict[str, Any] = {}
    with weights_kept():
        made: Any = _parts(Sleepy, ranks)
        engine = made.engine
        engine.note_sleep()
        for offload in ("none", "optimizer", "all"):
            engine._state = "asleep"  # as its construction leaves it
            engine.calls.clear()
            arena: Any = NotedArena(made.learner.arena, engine.calls)
            residency = Residency(engine, arena, made.ranks.backend, offload)
            found[offload] = _two_steps(made, residency)
        engine._state = "asleep"
        try:
            engine.load([])
        except AssertionError as error:
            found["load in sleep"] = str(error)
    return found


def _two_steps(made: Any, residency: Residency) -> list[str]:
    engine, prompts = made.engine, made.prompts
    with residency.publishing():
        made.publish()
    for _ in range(2):
        with residency.rollout():
            engine.calls.append("sample")
            in_order(engine.sample([Request(prompt.tokens, 1) for prompt in take(prompts, 2)]))
        with residency.training():
            engine.calls.append("train")
        with residency.publishing():
            made.publish()
    return list(engine.calls)
