"""Rollouts laid end to end as one packed (THD) micro-batch.

A sequence of prompt tokens p and response tokens r (n of them) enters the model without its last token; the model's
output at the positions len(p) - 1 … len(p) + n - 2 predicts the response. Positions restart with every sequence.
Padding, where the layout demands a multiple, belongs to the last sequence and predicts nothing that counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

PromptAndResponse = tuple[Sequence[int], Sequence[int]]  # the tokens of one rollout


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor  # [1, T] int64
    positions: Tensor  # [1, T] int64
    packing: PackedSeqParams
    predicting: Tensor  # [R] int64, where in T the output predicts a response token
    targets: Tensor  # [R] int64, those response tokens, rollout after rollout
    index: Tensor  # [R] int64, where they lie among the batch's response tokens


def micro_batch(
    sequences: Sequence[PromptAndResponse],
    starts: Sequence[int],  # where each rollout's response begins among the batch's response tokens
    multiple: int = 1,
) -> MicroBatch:
    """Packs the sequences. Without any it holds one sequence of padding that predicts nothing, for a rank that has no
    share in an optimiser step but must take part in its collectives."""
    tokens: list[int] = []
    positions: list[int] = []
    predicting: list[int] = []
    targets: list[int] = []
    index: list[int] = []
    ends = [0]
    for (prompt, response), start in zip(sequences, starts, strict=True):
        begin = len(tokens) + len(prompt) - 1
        tokens += [*prompt, *response][:-1]
        positions += range(len(prompt) + len(response) - 1)
        predicting += range(begin, begin + len(response))
        targets += response
        index += range(start, start + len(response))
        ends.append(len(tokens))
    padding = -len(tokens) % multiple if tokens else multiple
    if padding:
        positions += range(positions[-1] + 1, positions[-1] + 1 + padding) if tokens else range(padding)
        tokens += [0] * padding
        ends = [*ends[:-1], len(tokens)] if len(ends) > 1 else [0, len(tokens)]
    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    return MicroBatch(
        tokens=torch.tensor([tokens]),
        positions=torch.tensor([positions]),
        packing=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=bounds,
            cu_seqlens_kv=bounds,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        predicting=torch.tensor(predicting, dtype=torch.int64),
        targets=torch.tensor(targets, dtype=torch.int64),
        index=torch.tensor(index, dtype=torch.int64),
    )
