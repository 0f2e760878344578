"""What a layer keeps for its backward, and what it works with meanwhile, in bytes.

T tokens a rank and micro-batch (context parallelism divides them), t tensor-parallel ranks, b bytes an element, and
s = t under sequence parallelism, else 1. Of a layer's tensors, as Megatron-Core 0.16.1 and Transformer Engine's modules
keep them:

    norms       4 x b T hidden / s                      input and output of both
    attention   b T (q + k + v) / t                     one tensor, of which the values are a view
                b T (q + k) / t                         with rope: rotated copies
                b T out / t  +  4 T heads / t           output and softmax statistics
                (b [+ 1 + b]) T heads / t x length      scores, where attention is not fused [dropout's mask and result]
    MLP         b T (2 + 1) ffn / t                     SwiGLU in one kernel; +1 where the gate's activation is kept
    experts     rows R = T x per_token / s x expert tensor x imbalance, for each b (hidden + (2 + 1) ffn / etp);
                +2 ffn / etp where kernels are not fused (the activation, and it before its probability)

Without Transformer Engine's kernels (model/modules.py) a norm also keeps what it scales, queries and keys that are
normed likewise, and attention its values and its output once more.

The formulas for dense layers are arXiv 2205.05198's without its assumptions (q = hidden, ffn = 4 hidden, GELU). What
the public record says of them: tools/plan_accuracy.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .shape import Latent, Shape

STATISTICS = 4  # bytes a head and token: float32


@dataclass(frozen=True)
class Share:
    """How one rank computes its share of a layer."""

    tokens: int  # of a micro-batch, on this rank
    length: int  # of the longest sequence, in tokens: what scores grow with
    tensor: int = 1
    sequence: bool = False
    expert_tensor: int = 1
    itemsize: int = 2
    fp8: bool = False  # inputs of linear layers are kept in 8 bits
    # Megatron's names of modules, `latent` for what comes out of compressed vectors; or "full"
    recompute: frozenset[str] = frozenset()
    imbalance: float = 1.0  # tokens of the busiest rank's experts over the mean

    @property
    def spread(self) -> int:
        """Over how many ranks the tokens between layers lie."""
        return self.tensor if self.sequence else 1


@dataclass(frozen=True)
class Kept:
    """Bytes of one layer and micro-batch."""

    saved: Mapping[str, float]  # until its backward
    work: float  # beside them, at the worst moment of its forward or backward

    @property
    def total(self) -> float:
        return sum(self.saved.values())


def layer(shape: Shape, share: Share, dense: bool) -> Kept:
    """Returns what a layer keeps; `dense`: one with an MLP in a mixture of experts."""
    here = 1 / share.spread
    inputs = 1 if share.fp8 else share.itemsize  # bytes of what a linear layer keeps
    norm = share.itemsize * shape.hidden * here
    normed = 0 if "layernorm" in share.recompute else inputs * shape.hidden * here
    saved = {"norms": 2 * (norm + normed + (0 if shape.fused else norm)), **_attention(shape, share)}
    work = _work_of_attention(shape, share)
    if shape.hidden_dropout:
        saved["dropout"] = 2 * shape.hidden * here
    if shape.mixture is None or dense:
        mlp, of_mlp = _mlp(shape, share, shape.ffn), _work_of_mlp(shape, share, shape.ffn)
        if "mlp" in share.recompute:
            work, mlp = max(work, mlp + of_mlp), 0
        saved["mlp"], work = mlp, max(work, of_mlp)
    else:
        experts, shared, of_experts = _experts(shape, share)
        if "moe" in share.recompute:
            work, experts, shared = max(work, experts + shared + of_experts), 0, 0
        elif "shared_experts" in share.recompute:
            shared = 0
        saved |= {"experts": experts, "shared experts": shared}
        work = max(work, of_experts)
    tokens = share.tokens
    whole = Kept({name: size * tokens for name, size in saved.items()}, work * tokens)
    if "full" in share.recompute:
        return Kept({"inputs": share.itemsize * shape.hidden * here * tokens}, whole.total + whole.work)
    return whole


def _attention(shape: Shape, share: Share) -> dict[str, float]:
    """Bytes a token."""
    b, t = share.itemsize, share.tensor
    saved: dict[str, float] = {}
    if shape.latent is not None:
        saved["compressed"] = _compressed(shape.latent, b)
    widths = shape.queries + shape.keys + shape.values
    if shape.rope:
        widths += shape.queries + shape.keys
    if not shape.fused:
        widths += shape.values + shape.outputs + (2 * (shape.queries + shape.keys) if shape.qk_norm else 0)
    saved["queries, keys, values"] = 0 if "latent" in share.recompute else b * widths / t
    saved["attention"] = (b * shape.outputs + STATISTICS * shape.heads) / t + share.fp8 * shape.outputs / t
    if not shape.fused_attention and "core_attn" not in share.recompute:
        saved["scores"] = _scores(shape, share)
    return saved


def _compressed(latent: Latent, itemsize: int) -> float:
    """Both compressed vectors before and after their norms: every tensor-parallel rank has them whole."""
    return itemsize * 2 * (latent.query_rank + latent.key_rank + latent.rope)


def _scores(shape: Shape, share: Share) -> float:
    kinds = share.itemsize + (1 + share.itemsize if shape.attention_dropout else 0)
    return kinds * shape.heads / share.tensor * share.length


def _work_of_attention(shape: Shape, share: Share) -> float:
    """Gradients of the projections and, unfused, of one layer's scores."""
    b, t = share.itemsize, share.tensor
    gathered = shape.hidden if share.spread > 1 else 0
    scores = 2 * share.itemsize * shape.heads / t * share.length if not shape.fused_attention else 0
    return b * (2 * shape.hidden / share.spread + gathered + (shape.queries + shape.keys + shape.values) / t) + scores


def _mlp(shape: Shape, share: Share, ffn: int) -> float:
    width, t = 2 if shape.gated else 1, share.tensor
    inputs = 1 if share.fp8 else share.itemsize
    kept = share.itemsize * width + inputs
    if shape.gated and not shape.fused_gate:
        kept += share.itemsize
    return kept * ffn / t


def _work_of_mlp(shape: Shape, share: Share, ffn: int) -> float:
    """Gradients of the activation and of what it is computed from, and the input, gathered."""
    width, gathered = 2 if shape.gated else 1, shape.hidden if share.spread > 1 else 0
    return share.itemsize * (2 * shape.hidden / share.spread + gathered + (1 + width) * ffn / share.tensor)


def _experts(shape: Shape, share: Share) -> tuple[float, float, float]:
    """What experts keep, what those keep that every token passes, and what the experts work with; bytes a token."""
    mixture = shape.mixture
    assert mixture is not None
    b, width, etp = share.itemsize, 2 if shape.gated else 1, share.expert_tensor
    inputs = 1 if share.fp8 else b
    rows = mixture.per_token / share.spread * etp * share.imbalance
    kept = inputs * shape.hidden + b * width * mixture.ffn / etp + inputs * mixture.ffn / etp
    if not shape.fused_gate:
        kept += (2 if shape.gated else 1) * b * mixture.ffn / etp
    if "moe_act" in share.recompute:
        kept = inputs * shape.hidden + b * width * mixture.ffn / etp
    router = 3 * STATISTICS * mixture.count / share.spread
    work = rows * b * (2 * shape.hidden + (1 + width) * mixture.ffn / etp) + 2 * b * shape.hidden / share.spread
    shared = _mlp(shape, share, mixture.shared) if mixture.shared else 0.0
    return rows * kept + router, shared, work


def in_flight(pipeline: int, virtual: int, stage: int, micro_batches: int) -> list[int]:
    """Returns how many micro-batches of each of a stage's chunks await their backward at most, under Megatron-Core's
    1F1B and its interleaved schedule (pipeline_parallel/schedules.py)."""
    if virtual == 1:
        return [min(micro_batches, pipeline - stage)]
    warmup = (pipeline - stage - 1) * 2 + (virtual - 1) * pipeline
    counts = [0] * virtual
    for number in range(min(warmup + 1, micro_batches * virtual)):
        counts[number % (pipeline * virtual) // pipeline] += 1
    return counts
