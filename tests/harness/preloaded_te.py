"""What the process imports that ranks with Transformer Engine are forked off (tests/harness/worlds.py): its stand-in
comes first in this process's path, so Megatron-Core finds it. No engine runs there, so vLLM is left out."""

from __future__ import annotations

import gc

import tests.distributed.cases_te

__all__ = ["tests"]

gc.collect()
gc.freeze()
