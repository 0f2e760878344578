"""From a row of a record of measurements to what the planner is asked: a shape, a layout, and how it was trained.

What a row leaves open is taken as its framework takes it, and said in `assumed`:

    vocabulary      of a test of Megatron-LM that names only its tokenizer's file: GPT-2's 50,257
    attention       fused, unless the row says `unfused` or runs without Transformer Engine; its dropout as that of the
                    hidden states
    micro-batches   as many as the global batch has, else four times the pipeline's stages
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from a3po_megatron.preflight.activations import Share
from a3po_megatron.preflight.shape import Latent, Mixture, Shape

from .models import shape_of_name

GPT2_VOCABULARY = 50257
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Job:
    """How somebody trained."""

    shape: Shape
    share: Share
    tensor: int
    pipeline: int
    virtual: int
    expert: int
    expert_tensor: int
    context: int
    data: int
    micro_batches: int
    chunks: tuple[tuple[tuple[bool, ...], ...], ...]  # of each stage, of each chunk, of each layer: whether it is dense
    distributed: bool  # the optimizer's state is dealt over the data-parallel ranks
    vocab_multiple: int
    logit_bytes: float  # of one logit, with what the loss makes of it
    instances: int = 1  # of the distributed optimizer: each deals the state over a part of the ranks
    muon: bool = False  # one moment a matrix, and no rank is without it
    on_host: bool = False
    master_beside: bool = True
    fp8: bool = False
    hopper: bool = False
    last_stage: bool = True  # which was measured: the last one, or the fullest
    reserved: bool = False  # measured was what the allocator had, not what was in use
    assumed: tuple[str, ...] = field(default=())


class Unplannable(Exception):
    """Why a row says too little."""


def job_of(row: Row) -> Job:
    """Raises Unplannable."""
    settings, assumed = row.get("settings") or {}, list[str]()
    own = _own_shape(settings, row, assumed) if "num-layers" in settings else shape_of_name(str(row.get("model", "")))
    if own is None:
        raise Unplannable(f"unknown model: {row.get('model')}")
    tensor, pipeline, gpus = (_number(row, name) for name in ("tp", "pp", "gpus"))
    context, expert = _number(row, "cp", 1), _number(row, "ep", 1)
    expert_tensor = _expert_tensor(row, tensor, assumed)
    data = max(1, gpus // (tensor * pipeline * context))
    sequence, micro = _number(row, "seq"), _number(row, "mbs", 1)
    virtual = _virtual(row, settings, own, pipeline)
    precision = str(row.get("precision") or "bf16")
    recompute = _recompute(str(row.get("recompute") or "none"), settings)
    batch = int(settings.get("global-batch-size") or row.get("gbs") or 0)
    micro_batches = max(1, batch // (data * micro)) if batch else 4 * pipeline
    golden = row.get("family") == "mcore_golden"
    with_sequence = settings.get("sequence-parallel") == "true" if golden else tensor > 1
    share = Share(
        tokens=sequence * micro // context,
        length=sequence,
        tensor=tensor,
        sequence=with_sequence and tensor > 1,
        expert_tensor=expert_tensor,
        fp8="fp8" in precision,
        recompute=recompute,
    )
    optimizer = str(row.get("optimizer") or settings.get("optimizer") or "")
    fused_loss = row.get("family") == "megatron_bridge" or settings.get("cross-entropy-fusion-impl") == "te"
    return Job(
        shape=own,
        share=share,
        tensor=tensor,
        pipeline=pipeline,
        virtual=virtual,
        expert=expert,
        expert_tensor=expert_tensor,
        context=context,
        data=data,
        micro_batches=micro_batches,
        chunks=_chunks(row, settings, own, pipeline, virtual),
        distributed=row.get("dist_opt") is not False,
        vocab_multiple=int(settings.get("make-vocab-size-divisible-by") or 128) * tensor,
        logit_bytes=2 if fused_loss else 2 + 4 * (1 + own.predicted),
        instances=int(settings.get("num-distributed-optimizer-instances") or 1),
        muon="muon" in optimizer,
        on_host="cpu" in str(row.get("offload") or ""),
        fp8="fp8" in precision and settings.get("fp8-param-gather") != "true" and golden,
        hopper="100" in str(row.get("gpu")) and "A100" not in str(row.get("gpu")),
        last_stage=golden,
        reserved=row.get("metric_kind") in ("reserved", "hand") or row.get("family") == "ms_swift",
        assumed=tuple(assumed),
    )


def _expert_tensor(row: Row, tensor: int, assumed: list[str]) -> int:
    """The record has 1 where a test of Megatron-LM does not say; it is the tensor-parallel size then. Those that say it
    have it in their names."""
    if row.get("family") == "mcore_golden" and "etp" not in str(row["id"]) and tensor > 1:
        if "num-experts" in (row.get("settings") or {}):
            assumed.append(f"experts over {tensor} tensor-parallel ranks")
        return tensor
    return _number(row, "etp", 1)


def _number(row: Row, name: str, otherwise: int | None = None) -> int:
    value = row.get(name)
    if value is None and otherwise is None:
        raise Unplannable(f"no {name}")
    return int(value if value is not None else otherwise)  # type: ignore[arg-type]


def _own_shape(settings: Mapping[str, str], row: Row, assumed: list[str]) -> Shape:
    """Of a model that a row describes by Megatron-LM's arguments."""

    def number(name: str, otherwise: int) -> int:
        return int(settings[name]) if name in settings else otherwise

    def on(name: str) -> bool:
        return settings.get(name) == "true"

    hidden, heads = number("hidden-size", 0), number("num-attention-heads", 0)
    ffn = number("ffn-hidden-size", 0) or (int(4 * hidden * 2 / 3 / 64) * 64 if on("swiglu") else 4 * hidden)
    if "vocab-size" not in settings:
        assumed.append(f"a vocabulary of {GPT2_VOCABULARY}")
    # Tests without Transformer Engine say so in their names alone.
    local = "uninstall_te" in row["id"] or ("mcore_tp" in row["id"] and "_te_" not in row["id"])
    dropout = settings.get("hidden-dropout", "0.1") != "0.0"
    latent = None
    if on("multi-latent-attention"):
        latent = Latent(
            number("q-lora-rank", 0),
            number("kv-lora-rank", 512),
            number("qk-head-dim", 128),
            number("qk-pos-emb-head-dim", 64),
            number("v-head-dim", 128),
        )
    experts, rope = number("num-experts", 0), settings.get("position-embedding-type") == "rope"
    layers = number("num-layers", 0)
    dense = _dense_layers(settings.get("moe-layer-freq", "1"), layers) if experts else 0
    backend = settings.get("attention-backend", "").split(" ")[0]
    return Shape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("num-query-groups", heads) if on("group-query-attention") else heads,
        head_dim=number("kv-channels", hidden // heads),
        ffn=ffn,
        vocab=number("vocab-size", GPT2_VOCABULARY),
        tied=not on("untie-embeddings-and-output-weights"),
        mixture=Mixture(
            experts,
            number("moe-router-topk", 2),
            number("moe-ffn-hidden-size", ffn),
            number("moe-shared-expert-intermediate-size", 0),
        )
        if experts
        else None,
        dense_layers=dense,
        latent=latent,
        predicted=number("mtp-num-layers", 0),
        learned_positions=0 if rope else number("max-position-embeddings", 0),
        gated=on("swiglu"),
        fused_gate=True,
        rope=rope,
        fused_attention=backend in ("flash", "fused") or (backend == "" and not local),
        hidden_dropout=dropout,
        attention_dropout=settings.get("attention-dropout", "0.1" if dropout else "0.0") != "0.0",
        bias=not on("disable-bias-linear"),
        norm_bias=settings.get("normalization") != "RMSNorm",
    )


def _dense_layers(frequency: str, layers: int) -> int:
    """Of Megatron-LM's pattern, such as ([0]*3+[1]*13), the dense layers, which come first in all that are recorded."""
    zeros = re.findall(r"\[0\]\*(\d+)", frequency)
    return min(layers, sum(map(int, zeros)))


def _recompute(said: str, settings: Mapping[str, str]) -> frozenset[str]:
    if said.startswith("full"):
        return frozenset({"full"})
    if said.startswith("selective"):
        modules = said.partition(":")[2] or settings.get("recompute-modules", "").strip("[]") or "core_attn"
        named = re.split(r"[+, ]+", modules)
        return frozenset("latent" if name == "mla_up_proj" else name for name in named)
    return frozenset()


def _virtual(row: Row, settings: Mapping[str, str], shape: Shape, pipeline: int) -> int:
    if pipeline == 1:
        return 1
    if each := settings.get("num-layers-per-virtual-pipeline-stage"):
        return max(1, shape.layers // pipeline // int(each))
    if layout := settings.get("pipeline-model-parallel-layout"):
        return len(_written_layout(layout)) // pipeline
    return int(row.get("vpp") or 1)


def _chunks(
    row: Row, settings: Mapping[str, str], shape: Shape, pipeline: int, virtual: int
) -> tuple[tuple[tuple[bool, ...], ...], ...]:
    """Layers of all chunks in the model's order, dealt out round robin; those that predict further tokens are the last
    chunk's."""
    counts = _counts(row, settings, shape.layers, pipeline * virtual)
    dense = [shape.mixture is None or number < shape.dense_layers for number in range(shape.layers)]
    dealt, begin = [], 0
    for count in counts:
        dealt.append(tuple(dense[begin : begin + count]))
        begin += count
    dealt[-1] += (shape.mixture is None,) * shape.predicted
    return tuple(tuple(dealt[virtual_ * pipeline + stage] for virtual_ in range(virtual)) for stage in range(pipeline))


def _counts(row: Row, settings: Mapping[str, str], layers: int, chunks: int) -> list[int]:
    if layout := settings.get("pipeline-model-parallel-layout"):
        return _written_layout(layout)
    first, last = row.get("first_pp_layers"), row.get("last_pp_layers")
    if (first or last) and chunks > 1:
        a, b = int(first or 0), int(last or 0)
        inner = chunks - bool(first) - bool(last)
        middle = _even(layers - a - b, inner) if inner else []
        return [*([a] if first else []), *middle, *([b] if last else [])]
    return _even(layers, chunks)


def _even(layers: int, chunks: int) -> list[int]:
    base, rest = divmod(layers, chunks)
    return [base + (number < rest) for number in range(chunks)]


def _written_layout(text: str) -> list[int]:
    """Megatron-LM's notation: t a layer, | a chunk's end, (…)*n and x*n what is repeated."""
    while match := re.search(r"\(([^()]*)\)\*(\d+)", text):
        text = text[: match.start()] + match[1] * int(match[2]) + text[match.end() :]
    text = re.sub(r"([a-zA-Z])\*(\d+)", lambda match: match[1] * int(match[2]), text)
    return [chunk.count("t") for chunk in text.split("|")]
