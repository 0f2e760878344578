"""Our own modules for Megatron's layer specs on the CPU path, through Megatron's spec mechanism: nothing is patched.

Megatron's local `DotProductAttention` refuses packed sequences, and its `WrappedTorchNorm` refuses sequence
parallelism; Transformer Engine's modules, which do both, need CUDA.
"""

from __future__ import annotations

import functools
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

SHORT = 16  # tokens: sequences up to this are attended to at once, whatever their lengths


class GPT(GPTModel):  # type: ignore[misc]  # Megatron has no types
    """Megatron's GPTModel, whose two copies of a tied embedding (PP > 1) are filled by the loader.

    Megatron would bring them into line with an all-reduce when it builds the model, for which it moves them to CUDA.
    With `headless` the last stage ends with the hidden states [T, 1, H] (under sequence parallelism this rank's share):
    learner/fused_head.py goes on from there.
    """

    headless = False
    _loading = False

    def output_weight(self) -> Tensor:
        """The output layer's weight [V/tp, H], which a tied model shares with its embedding."""
        shared = self.share_embeddings_and_output_weights
        weight: Tensor = self.shared_embedding_or_output_weight() if shared else self.output_layer.weight
        return weight

    def _postprocess(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.post_process and self.headless:
            return hidden_states
        output: Tensor = super()._postprocess(hidden_states, *args, **kwargs)
        return output

    def setup_embeddings_and_output_layer(self) -> None:
        self._loading = True
        super().setup_embeddings_and_output_layer()
        self._loading = False

    def _is_in_embd_group(self) -> bool:
        return not self._loading and super()._is_in_embd_group()


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm, whose weight tells Megatron to sum its gradient over a sequence-parallel group."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class PackedAttention(MegatronModule):  # type: ignore[misc]  # Megatron has no types
    """Causal attention within each sequence of a packed micro-batch, by torch's scaled_dot_product_attention.

    Sequences of about one length are attended to in one call, side by side: a call for each costs more than what it
    computes where they are short. What stands behind a sequence's end, none of its positions sees.

    Under context parallelism (C ranks, rank c holds chunks c and 2 C - 1 - c of every sequence: learner/micro_batch.py)
    keys and values are gathered over the ranks, and each of the two chunks attends to all that comes before its end.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        pg_collection: Any = None,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.scale = config.softmax_scale  # always given (model/build.py)
        self.context = pg_collection.cp if config.context_parallel_size > 1 else None

    def forward(
        self,
        query: Tensor,  # [T, heads/tp, head_dim]
        key: Tensor,  # [T, kv_heads/tp, head_dim]
        value: Tensor,  # [T, kv_heads/tp, head_dim]
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:  # [T, heads/tp * head_dim]
        assert packed_seq_params is not None and packed_seq_params.qkv_format == "thd", "sequences must be packed"
        ends = packed_seq_params.cu_seqlens_q.tolist()
        if self.context is not None:
            return self._over_ranks(query, key, value, ends)
        beside, back = side_by_side(tuple(ends))
        outputs = [
            self._attend(query[rows].transpose(1, 2), key[rows].transpose(1, 2), value[rows].transpose(1, 2))
            for rows in beside
        ]
        # [rows of all, heads, head_dim], of which each token has one
        laid = torch.cat([output.transpose(1, 2).flatten(0, 1) for output in outputs])
        return laid[back].flatten(1)

    def _over_ranks(self, query: Tensor, key: Tensor, value: Tensor, ends: list[int]) -> Tensor:
        assert self.context is not None
        size, rank, width = self.context.size(), self.context.rank(), key.shape[2]
        both = torch.cat([key, value], dim=2)
        # [C, T, kv_heads, 2 head_dim]
        gathered = _GatherContext.apply(both, self.context)  # type: ignore[no-untyped-call]  # torch's own
        outputs = []
        for begin, end in itertools.pairwise(ends):
            chunk, first = (end - begin) // (2 * size), begin // size
            halves = gathered[:, first : first + 2 * chunk].unflatten(1, (2, chunk))  # [C, 2, chunk, …]
            whole = torch.cat([halves[:, 0], halves[:, 1].flip(0)]).flatten(0, 1).transpose(0, 1)
            for half, number in enumerate((rank, 2 * size - 1 - rank)):
                asked = query[first + half * chunk : first + (half + 1) * chunk].transpose(0, 1)
                known = whole[:, : (number + 1) * chunk]
                keys_and_values = known[None, :, :, :width], known[None, :, :, width:]
                outputs.append(self._attend(asked[None], *keys_and_values, number * chunk)[0])
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, before: int = 0) -> Tensor:
        """[b, heads, t, head_dim]: the queries are the last of the keys' positions; `before` keys lie before the
        first."""
        mask = None
        if before:
            positions = torch.arange(key.shape[2], device=key.device)
            mask = positions <= before + torch.arange(query.shape[2], device=key.device)[:, None]
        return F.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=self.scale, enable_gqa=True
        )


@functools.lru_cache(maxsize=64)  # of a micro-batch every layer asks, and its backward
def side_by_side(ends: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """Returns which tokens stand in which row of what is attended to at once, a [sequences, longest] int64 for each, a
    shorter sequence's last token again behind its end; and of all those rows, laid end to end, that of each token.

    `ends`: where sequences begin and end among the tokens, from 0 on.
    """
    lengths = {begin: end - begin for begin, end in itertools.pairwise(ends)}
    together: list[list[int]] = []  # begins of sequences
    for begin in sorted(lengths, key=lambda begin: -lengths[begin]):
        longest = lengths[together[-1][0]] if together else 0
        if not together or (longest > SHORT and lengths[begin] < 0.75 * longest):
            together.append([])
        together[-1].append(begin)
    beside, back, row = [], torch.empty(ends[-1], dtype=torch.int64), 0
    for begins in together:
        longest = lengths[begins[0]]
        for number, begin in enumerate(begins):
            first = row + number * longest
            back[begin : begin + lengths[begin]] = torch.arange(first, first + lengths[begin])
        last = torch.tensor([[begin + lengths[begin] - 1] for begin in begins])
        beside.append(torch.minimum(torch.tensor(begins)[:, None] + torch.arange(longest), last))
        row += len(begins) * longest
    return beside, back


class _GatherContext(torch.autograd.Function):
    """[T, …] of every context-parallel rank → [C, T, …]; backward, the sum of all ranks' gradients of one's own."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        gathered = [torch.empty_like(values, memory_format=torch.contiguous_format) for _ in range(group.size())]
        dist.all_gather(gathered, values.contiguous(), group=group)
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        own = torch.empty_like(gradient[0], memory_format=torch.contiguous_format)
        dist.reduce_scatter_tensor(own, gradient.contiguous().flatten(0, 1), group=ctx.group)
        return own, None
