"""Which families there are, by the architecture that a config.json names."""

from __future__ import annotations

from ..facts import Family
from .dense import LLAMA, QWEN2, QWEN3
from .moe import QWEN3_MOE

FAMILIES: dict[str, Family] = {family.architecture: family for family in (QWEN2, QWEN3, QWEN3_MOE, LLAMA)}
