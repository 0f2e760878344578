"""What the process imports that a session's ranks are forked off (tests/harness/worlds.py).

A collection of garbage takes 0.4 s with a million objects of imported modules, and an engine makes three when it is
built and one when it ends: half of what small cases took. So these objects are left out of all collections, for good:
vLLM freezes and unfreezes everything as it likes, and what cases make must stay collectable.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tests.distributed  # before all that imports Megatron

# isort: split
import a3po_megatron.parts
import tests.harness.tiny_models
from a3po_megatron.compat.vllm import process_state_kept

with process_state_kept():  # as an engine imports it, and what its first one in a process imports
    import vllm.distributed.device_communicators.cpu_communicator
    import vllm.model_executor.layers.quantization.compressed_tensors.utils
    import vllm.model_executor.layers.quantization.online.base
    import vllm.plugins.lora_resolvers.filesystem_resolver
    import vllm.plugins.lora_resolvers.hf_hub_resolver
    import vllm.v1.attention.backends.cpu_attn
    import vllm.v1.core.sched.scheduler
    import vllm.v1.worker.cpu_worker
    from vllm import LLM
    from vllm.config.logging import LoggingConfig
    from vllm.logger import configure_logging_if_needed
    from vllm.platforms import current_platform
    from vllm.triton_utils import dispatcher

__all__ = ["LLM", "a3po_megatron", "tests", "vllm"]


def _of_what_is_new(rebind: Callable[[Any], None]) -> Callable[[Any], None]:
    """vLLM looks through every module for its kernels whenever it builds an engine, 0.3 s each. Of modules that it has
    seen it needs to know nothing more: they hold what it put there."""
    seen: set[str] = set()

    def rebind_where_new(overrides: Any) -> None:
        new = {name: module for name, module in sys.modules.items() if name not in seen}
        seen.update(new)
        with mock.patch.object(dispatcher, "sys", SimpleNamespace(modules=new)):
            rebind(overrides)

    return rebind_where_new


dispatcher._rebind_kernels = _of_what_is_new(dispatcher._rebind_kernels)
with process_state_kept():  # an engine does both; where it has been done it takes no time
    current_platform.register_triton_kernel_overrides()
    configure_logging_if_needed(LoggingConfig())
gc.collect()
gc.freeze()
gc.freeze = gc.unfreeze = lambda: None
