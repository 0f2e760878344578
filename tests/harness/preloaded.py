"""What the process imports that a session's ranks are forked off (tests/harness/worlds.py).

A collection of garbage takes 0.4 s with a million objects of imported modules, and an engine makes three when it is
built and one when it ends: half of what small cases took. So these objects are left out of all collections, for good:
vLLM freezes and unfreezes everything as it likes, and what cases make must stay collectable.
"""

from __future__ import annotations

import gc
import sys

import tests.distributed  # before all that imports Megatron

# isort: split
import a3po_megatron.parts
import tests.harness.tiny_models
from a3po_megatron.compat.vllm import process_state_kept

with process_state_kept():  # as an engine imports it
    import vllm.v1.worker.cpu_worker
    from vllm import LLM
    from vllm.triton_utils import dispatcher

__all__ = ["LLM", "a3po_megatron", "tests", "vllm"]


def _once(rebind: object) -> object:
    """vLLM looks through every module for its kernels whenever it builds an engine, 0.3 s each; there is something to
    find only where modules were imported meanwhile."""
    seen = 0

    def rebind_where_new(overrides: object) -> None:
        nonlocal seen
        if len(sys.modules) > seen:
            rebind(overrides)  # type: ignore[operator]
            seen = len(sys.modules)

    return rebind_where_new


dispatcher._rebind_kernels = _once(dispatcher._rebind_kernels)  # type: ignore[assignment]
gc.collect()
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None
