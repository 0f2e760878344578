"""The only place where third parties are patched. `prepare()` runs once, before anything imports Megatron or vLLM.

Each patch names the version it was made for, the symptom without it and the cause. The patches of the CPU path refuse
to install where CUDA is present.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path


def prepare() -> None:
    """Installs what this machine's path needs. Idempotent."""
    import torch

    from . import python

    python.keep_mask()  # before any helper is started
    if torch.cuda.is_available():
        from . import cuda

        # Before Megatron, which imports Transformer Engine, which looks for these libraries.
        cuda.preload(Path(sysconfig.get_path("purelib")))
    else:
        from . import megatron_cpu

        megatron_cpu.install()
    from . import megatron

    megatron.install()
