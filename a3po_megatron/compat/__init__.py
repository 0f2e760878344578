"""The only place where third parties are patched. `prepare()` runs once, before anything imports Megatron or vLLM.

Each patch names the version it was made for, the symptom without it and the cause. Patches are for the CPU path only
and refuse to install where CUDA is present: there the libraries run as they are.
"""

from __future__ import annotations


def prepare() -> None:
    """Installs what the CPU path needs. Idempotent.

    Called at module level by entry scripts, because Megatron's checkpoint writers start children that import the main
    module again: a patch made under `if __name__ == "__main__"` would be missing in them.
    """
    import torch

    if torch.cuda.is_available():
        return
    from . import megatron_cpu

    megatron_cpu.install()
