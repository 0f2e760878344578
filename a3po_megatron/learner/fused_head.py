"""The output layer and the loss's log-probs in one: hidden states → log-probs and entropy, logits never held.

    forward    per chunk of tokens: x = hidden Wᵀ / temperature → statistics of the rows (rows.py), x is dropped
    backward   per chunk: x again → dx; d hidden = dx W / temperature; dW += dxᵀ hidden / temperature, in float32

Four matrix products, work space for one chunk, and 12 bytes a token kept besides the inputs. dW goes straight into
`weight.main_grad` where Megatron's buffers exist. Then its DistributedDataParallel must still see a gradient of the
weight: a tensor that nobody reads (zeros if `zero_out_wgrad`: the same weight is an embedding too, whose gradient is
added to it), with `grad_added_to_main_grad` set.

Under sequence parallelism the hidden states are gathered along the tokens, forward and backward, and their gradient is
reduce-scattered. Otherwise they are the same on all ranks, and their gradient is summed over the group.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from .chunks import CHUNK_BYTES
from .rows import check, combine, gradient, in_slice, measure

BLOCK_BYTES = 16 << 20  # of weights that are cast to float32 at once


def logprob_and_entropy(
    hidden: Tensor,  # [T, H], the same on all ranks of the group
    weight: Tensor,  # [V/tp, H] this rank's slice
    targets: Tensor,  # [T] global token ids ([R] with rows)
    group: dist.ProcessGroup | None,  # tensor-parallel
    temperature: float = 1.0,
    chunk_tokens: int | None = None,
    *,
    vocab_size: int | None = None,  # true V where the last slices are padded
    with_entropy: bool = True,
    sequence_parallel: bool = False,  # hidden is this rank's [T/tp, H]
    rows: Tensor | None = None,  # [R] int64: score only these of the T tokens
) -> tuple[Tensor, Tensor | None]:
    """Log-probs of the targets [T] and entropies [T] (nats, float32) of softmax(hidden weightᵀ / temperature).

    Differentiable with respect to `hidden`, whose gradient comes back summed over the group (under sequence
    parallelism: this rank's share of the sum), and to `weight`: into `weight.main_grad` (float32) where that exists,
    else as autograd's gradient. Raises ValueError for shapes that do not fit and for a target outside the vocabulary.
    """
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden must be [T, H] and weight [V/tp, H]: {tuple(hidden.shape)}, {tuple(weight.shape)}")
    if group is None or group.size() == 1:
        group, sequence_parallel = None, False
    tokens = hidden.shape[0] * (group.size() if group is not None and sequence_parallel else 1)
    if rows is not None and rows.numel() and not (int(rows.min()) >= 0 and int(rows.max()) < tokens):
        raise ValueError(f"rows must lie in 0 … {tokens - 1}")
    scored = tokens if rows is None else rows.numel()
    first, valid = check(targets, scored, len(weight), group, vocab_size, temperature, chunk_tokens)
    chunk = chunk_tokens or max(1, CHUNK_BYTES[hidden.device.type] // (4 * max(len(weight), 1)))
    settings = (group, float(temperature), chunk, (first, valid), with_entropy, sequence_parallel)
    logprobs, entropy = _Head.apply(hidden, weight, targets, rows, settings)
    return logprobs, entropy if with_entropy else None


# group, temperature, chunk, (first column, number of columns that are no padding), with_entropy, sequence_parallel
Settings = tuple[dist.ProcessGroup | None, float, int, tuple[int, int], bool, bool]


class _Head(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: Tensor | None, settings: Settings
    ) -> tuple[Tensor, Tensor]:
        group, temperature, chunk, (first, valid), with_entropy, sequence_parallel = settings
        whole = _gather(hidden, group) if sequence_parallel else hidden
        here, column = in_slice(targets, first, valid)
        local = hidden.new_zeros((4, len(targets)), dtype=torch.float32)
        local[0] = float("-inf")
        work = _Work(chunk, valid, len(targets), with_entropy, hidden.device)
        for span in work.spans:
            x = work.logits(_chosen(whole, rows, span), weight, temperature)
            measure(x, here[span], column[span], with_entropy, local[:, span], work.second(x))
        logprobs, entropy, peak, log_z = combine(local, here, group)
        ctx.save_for_backward(hidden, weight, targets, peak, log_z, entropy, *([] if rows is None else [rows]))
        ctx.settings = settings
        if not with_entropy:
            ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_logprob: Tensor, of_entropy: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, peak, log_z, entropy, *more = ctx.saved_tensors
        group, temperature, chunk, (first, valid), with_entropy, sequence_parallel = ctx.settings
        rows = more[0] if more else None
        whole = _gather(hidden, group) if sequence_parallel else hidden
        here, column = in_slice(targets, first, valid)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        # Contiguous, whatever the caller's strides: collectives go by memory.
        d_hidden = torch.zeros_like(whole, memory_format=torch.contiguous_format) if wants_hidden else None
        sums = _weight_sums(weight) if wants_weight else None
        work = _Work(chunk, valid, len(targets), with_entropy, hidden.device)
        for span in work.spans:
            chosen = _chosen(whole, rows, span)
            x = work.logits(chosen, weight, temperature)
            statistics = (peak[span], log_z[span], entropy[span])
            asked = of_entropy[span] if with_entropy else None
            dx = gradient(x, here[span], column[span], statistics, of_logprob[span], asked, work.second(x))
            if temperature != 1.0:
                dx.div_(temperature)
            if sums is not None:
                _add_product(sums[:valid], dx.t(), chosen, weight)
            if d_hidden is not None:
                part = _times(dx, weight, valid)
                if rows is None:
                    d_hidden[span] = part
                else:
                    d_hidden.index_add_(0, rows[span], part.to(d_hidden.dtype))
        if d_hidden is not None and group is not None:
            d_hidden = _scatter(d_hidden, group) if sequence_parallel else _sum(d_hidden, group)
        return d_hidden, None if sums is None else _weight_gradient(weight, sums), None, None, None


class _Work:
    """Memory for one chunk of logits, and for its exponentials where entropy is asked for; used again and again."""

    def __init__(self, chunk: int, valid: int, tokens: int, with_entropy: bool, device: torch.device) -> None:
        # A slice that is padding alone has no logits: it gives nothing and gets nothing.
        self.spans = [slice(begin, min(begin + chunk, tokens)) for begin in range(0, tokens, chunk)] if valid else []
        shape = (min(chunk, tokens), valid)
        self._first = torch.empty(shape if valid else (0, 0), dtype=torch.float32, device=device)
        # Triton's kernels need no second one.
        self._second = torch.empty_like(self._first) if with_entropy and device.type == "cpu" else None

    def logits(self, hidden: Tensor, weight: Tensor, temperature: float) -> Tensor:
        """hidden weightᵀ / temperature [t, valid] in float32."""
        x = self._first[: len(hidden)]
        if _in_tensor_cores(hidden, weight):
            torch.mm(hidden, weight[: x.shape[1]].t(), out_dtype=torch.float32, out=x)
            return x.div_(temperature) if temperature != 1.0 else x
        wide = hidden.to(torch.float32)
        for block in _blocks(weight, x.shape[1]):
            torch.mm(wide, weight[block].to(torch.float32).t(), out=x[:, block])
        return x.div_(temperature) if temperature != 1.0 else x

    def second(self, x: Tensor) -> Tensor | None:
        return None if self._second is None else self._second[: len(x)]


def _blocks(weight: Tensor, valid: int) -> list[slice]:
    """Rows of the weight that are multiplied at once: all of them, unless they must be cast to float32 first."""
    step = valid if weight.dtype == torch.float32 else max(1, BLOCK_BYTES // (4 * weight.shape[1]))
    return [slice(begin, min(begin + step, valid)) for begin in range(0, valid, step)]


def _times(dx: Tensor, weight: Tensor, valid: int) -> Tensor:
    """dx weight [t, H] in float32."""
    if _in_tensor_cores(dx, weight):
        return torch.mm(dx.to(weight.dtype), weight[:valid], out_dtype=torch.float32)
    product = torch.zeros((len(dx), weight.shape[1]), dtype=torch.float32, device=dx.device)
    for block in _blocks(weight, valid):
        product.addmm_(dx[:, block], weight[block].to(torch.float32))
    return product


def _add_product(sums: Tensor, left: Tensor, right: Tensor, weight: Tensor) -> None:
    """sums += left right, the sums in float32."""
    if _in_tensor_cores(left, weight):
        torch.addmm(sums, left.to(weight.dtype), right, out_dtype=torch.float32, out=sums)
    else:
        sums.addmm_(left, right.to(torch.float32))


def _in_tensor_cores(values: Tensor, weight: Tensor) -> bool:
    """Whether a GPU multiplies bf16 as it is, and sums in float32: of the gradient of the logits that rounds what
    training in bf16 rounds anyway, where the head is an ordinary layer."""
    return values.is_cuda and weight.dtype == torch.bfloat16


def _chosen(whole: Tensor, rows: Tensor | None, span: slice) -> Tensor:
    return whole[span] if rows is None else whole.index_select(0, rows[span])


def _weight_sums(weight: Tensor) -> Tensor:
    """Where the weight's gradient is accumulated, in float32: Megatron's buffer, or memory of our own."""
    main_grad = getattr(weight, "main_grad", None)
    if main_grad is None:
        return torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
    if main_grad.dtype != torch.float32:
        raise ValueError(f"weight.main_grad must be float32: it is {main_grad.dtype}")
    return main_grad.view(weight.shape)


def _weight_gradient(weight: Tensor, sums: Tensor) -> Tensor | None:
    """What autograd is given: the gradient itself, or what keeps Megatron's hooks going."""
    if getattr(weight, "main_grad", None) is None:
        return sums.to(weight.dtype)
    if not hasattr(weight, "grad_added_to_main_grad"):
        return None
    weight.grad_added_to_main_grad = True
    return _unread(weight, zeros=bool(getattr(weight, "zero_out_wgrad", False)))


_UNREAD: dict[tuple[torch.Size, torch.dtype, torch.device, bool], Tensor] = {}


def _unread(weight: Tensor, zeros: bool) -> Tensor:
    """A gradient that nobody writes to: autograd must be given one, the sums are in main_grad. One for all
    micro-batches: V x H of a large model is a gigabyte. Zeros where Megatron adds it to a tied embedding's."""
    key = weight.shape, weight.dtype, weight.device, zeros
    if key not in _UNREAD:
        _UNREAD[key] = torch.zeros_like(weight) if zeros else torch.empty_like(weight)
    return _UNREAD[key].detach()  # autograd copies a tensor that someone else holds, but not what shares its memory


def _gather(hidden: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    assert group is not None
    whole = torch.empty((group.size() * len(hidden), hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole


def _scatter(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    share = torch.empty_like(gradient[: len(gradient) // group.size()])
    dist.reduce_scatter_tensor(share, gradient.contiguous(), group=group)
    return share


def _sum(gradient: Tensor, group: dist.ProcessGroup) -> Tensor:
    dist.all_reduce(gradient, group=group)
    return gradient
