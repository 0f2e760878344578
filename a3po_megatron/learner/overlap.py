"""The model's chunks as Megatron's data parallelism wraps them, and what of its communication goes on beside computing.

    learner.overlap_grad_reduce     a bucket of gradients is reduced as soon as the last micro-batch's backward has
                                    filled it
    learner.overlap_param_gather    the ranks' shares of the weights are gathered, bucket after bucket, while the next
                                    mini-batch's forward needs them; hooks on modules wait for each

The hooks are there within an update alone. When it ends every weight is whole on every rank, so that scores, publishes
and checkpoints, which read weights without a forward, see what the optimizer left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.transformer.transformer_config import TransformerConfig

from ..config import LearnerOptions
from ..model.modules import GPT


def data_parallel(
    chunks: Sequence[GPT], settings: TransformerConfig, options: LearnerOptions, distributed: bool
) -> list[DistributedDataParallel]:
    """Wraps a rank's chunks, and tells Megatron's schedules which micro-batches reduce nothing. `distributed`: the
    optimizer's state is shared out over the data-parallel ranks."""
    wrapped = [
        DistributedDataParallel(
            settings,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                use_distributed_optimizer=distributed,
                overlap_grad_reduce=options.overlap_grad_reduce,
                overlap_param_gather=options.overlap_param_gather,
            ),
            chunk,
            disable_bucketing=number > 0,
        )
        for number, chunk in enumerate(chunks)
    ]
    if options.overlap_grad_reduce:  # else every micro-batch's backward would reduce what is there so far
        pauses = [chunk.no_sync for chunk in wrapped]
        settings.no_sync_func = pauses if len(pauses) > 1 else pauses[0]
    for chunk in wrapped:
        if chunk.use_forward_hook:
            chunk.disable_forward_pre_hook(param_sync=False)
    return wrapped


@contextlib.contextmanager
def gathering(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Within the block forwards wait for the weights that are being gathered; behind it all are there. Collective."""
    overlapping = [chunk for chunk in chunks if chunk.use_forward_hook]
    for chunk in overlapping:
        chunk.enable_forward_pre_hook()
    try:
        yield
    finally:
        for chunk in overlapping:
            chunk.disable_forward_pre_hook(param_sync=False)
    for chunk in overlapping:
        chunk.start_param_sync(force_sync=True)


def await_weight(chunk: DistributedDataParallel, weight: torch.Tensor) -> None:
    """Waits for a weight that is used outside of the modules whose hooks wait for theirs: the head's."""
    if chunk.use_forward_hook and chunk.remove_forward_pre_hook_handles:
        chunk.param_to_bucket_group[weight].finish_param_sync()
