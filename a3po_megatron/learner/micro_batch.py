"""Rollouts laid end to end as one packed (THD) micro-batch.

A sequence of prompt tokens p and response tokens r (n of them) enters the model without its last token; the model's
output at the positions len(p) - 1 … len(p) + n - 2 predicts the response. Positions restart with every sequence.
Padding, where the layout demands a multiple, belongs to the end of a sequence and predicts nothing that counts. Where
routes are replayed, it goes to the experts 0 … k - 1; a micro-batch of padding alone routes by itself.

Response tokens that are not trained on are read like a prompt's, and predicted nowhere (`only`): they cost no logits,
and score, loss and normaliser know nothing of them.

Under context parallelism of C ranks every sequence is padded to a multiple of 2 C and cut into as many chunks; rank c
holds chunks c and 2 C - 1 - c, so that causal attention costs all ranks the same (Megatron's and Transformer Engine's
order). `predicting`, `targets` and `index` are of the tokens on this rank; the packing describes whole sequences.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

PromptAndResponse = tuple[Sequence[int], Sequence[int] | np.ndarray]  # the tokens of one rollout


@dataclass(frozen=True)
class MicroBatch:
    tokens: Tensor  # [1, T] int64, those on this rank
    positions: Tensor  # [1, T] int64
    packing: PackedSeqParams
    predicting: Tensor  # [R] int64, where in T the output predicts a response token
    targets: Tensor  # [R] int64, those response tokens, rollout after rollout
    index: Tensor  # [R] int64, where they lie among the batch's response tokens; stays on the host, as the batch does
    routes: Tensor | None = None  # [T, L, k] uint8 or int32, the experts of the tokens on this rank in each of L layers
    rollout: Tensor | None = None  # [T] int64, with routes: the rollout of each token among the batch's; -1: padding

    def only(self, trained: Tensor) -> MicroBatch:
        """Returns it with those targets alone that are trained on; `trained`: [T] bool over the batch's response
        tokens."""
        mask = trained[self.index]
        mine = self.predicting[mask], self.targets[mask], self.index[mask]
        return dataclasses.replace(self, predicting=mine[0], targets=mine[1], index=mine[2])

    def to(self, device: torch.device) -> MicroBatch:
        """Returns it with what the model reads on its device."""
        if device.type == "cpu":
            return self
        bounds = self.packing.cu_seqlens_q.to(device, non_blocking=True)
        names = ("tokens", "positions", "predicting", "targets", "routes", "rollout")
        values = {name: getattr(self, name) for name in names}
        moved = {name: value.to(device, non_blocking=True) for name, value in values.items() if value is not None}
        packing = dataclasses.replace(self.packing, cu_seqlens_q=bounds, cu_seqlens_kv=bounds)
        return dataclasses.replace(self, packing=packing, **moved)


def micro_batch(
    sequences: Sequence[PromptAndResponse],  # of each rollout
    starts: Sequence[int],  # where each rollout's response begins among the batch's response tokens
    multiple: int = 1,  # of which T must be one
    context: tuple[int, int] = (1, 0),  # context-parallel size and rank
    routed: Sequence[tuple[int, np.ndarray]] = (),  # which rollout of the batch each is, and its routes; or of none
) -> MicroBatch:
    """Packs the sequences. Without any it holds one sequence of padding that predicts nothing, for a rank that has no
    share in an optimiser step but must take part in its collectives.

    Raises ValueError for a sequence without a prompt.
    """
    size, rank = context
    grain = 2 * size if size > 1 else 1
    if any(not len(prompt) for prompt, _ in sequences):
        raise ValueError("a rollout without a prompt has nothing that predicts its first token")
    read = [len(prompt) + len(response) - 1 for prompt, response in sequences]  # nothing follows the last token
    ends = [0, *itertools.accumulate(-(-length // grain) * grain for length in read)]
    # Every rank holds 1 / size of the tokens, and of that `multiple` is asked.
    whole = math.lcm(grain, size * multiple)
    length = -(-ends[-1] // whole) * whole or whole
    # The padding of the whole belongs to the last sequence; where there is none, it is one. Positions go on in padding:
    # to attention it is the end of the sequence before it.
    ends = [*ends[:-1], length] if sequences else [0, length]
    begins = np.array(ends[:-1])
    tokens, positions = np.zeros(length, np.int64), np.arange(length) - np.repeat(begins, np.diff(ends))
    for (prompt, response), begin, count in zip(sequences, ends, read, strict=False):
        tokens[begin : begin + count] = np.concatenate([prompt, response])[:-1]
    answers = [np.asarray(response, np.int64) for _, response in sequences]
    targets = np.concatenate([np.zeros(0, np.int64), *answers])
    counts = np.array([len(answer) for answer in answers], np.int64)
    # Where the responses begin in what is predicted here: as one row, in the packing, in the batch.
    rows = np.arange(len(targets)) - np.repeat(counts.cumsum() - counts, counts)
    firsts = np.array([begin + len(prompt) - 1 for (prompt, _), begin in zip(sequences, ends, strict=False)], np.int64)
    predicting = rows + np.repeat(firsts, counts)
    index = rows + np.repeat(np.array(starts, np.int64), counts)
    bounds = torch.tensor(ends, dtype=torch.int32)
    longest = int((bounds[1:] - bounds[:-1]).max())
    here = local_tokens(ends, size, rank)
    place = torch.full((length,), -1)  # of each packed token on this rank; -1: another has it
    place[here] = torch.arange(len(here))
    places = place[torch.from_numpy(predicting)]
    mine = places >= 0
    routes = rollout = None
    if routed:
        _, layers, experts = routed[0][1].shape
        # Of more than 256 experts they come as uint16, for which torch has few operations.
        kind = torch.uint8 if routed[0][1].dtype == np.uint8 else torch.int32
        # Padding takes k experts that differ, as a router's choice does.
        routes = torch.arange(experts, dtype=kind).repeat(length, layers, 1)
        rollout = torch.full((length,), -1)
        for (number, chosen_experts), begin in zip(routed, ends[:-1], strict=True):
            routes[begin : begin + len(chosen_experts)] = torch.from_numpy(chosen_experts).to(kind)
            rollout[begin : begin + len(chosen_experts)] = number
        routes, rollout = routes[here], rollout[here]
    packing = PackedSeqParams(
        qkv_format="thd", cu_seqlens_q=bounds, cu_seqlens_kv=bounds, max_seqlen_q=longest, max_seqlen_kv=longest
    )
    return MicroBatch(
        tokens=torch.from_numpy(tokens)[None, here],
        positions=torch.from_numpy(positions)[None, here],
        packing=packing,
        predicting=places[mine],
        targets=torch.from_numpy(targets)[mine],
        index=torch.from_numpy(index)[mine],
        routes=routes,
        rollout=rollout,
    )


def local_tokens(ends: Sequence[int], size: int, rank: int) -> Tensor:
    """Returns which of the packed tokens a context-parallel rank holds, in its order [T / size] int64."""
    if size == 1:
        return torch.arange(ends[-1])
    parts = []
    for begin, end in itertools.pairwise(ends):
        chunk = (end - begin) // (2 * size)
        for number in (rank, 2 * size - 1 - rank):
            parts.append(torch.arange(begin + number * chunk, begin + (number + 1) * chunk))
    return torch.cat(parts)
