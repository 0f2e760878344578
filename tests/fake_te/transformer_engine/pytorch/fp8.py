"""The autocast context: which recipe is on."""

import contextlib
from collections.abc import Iterator
from typing import Any


class FP8GlobalStateManager:
    recipe: Any = None

    @classmethod
    def is_fp8_enabled(cls) -> bool:
        return cls.recipe is not None


@contextlib.contextmanager
def fp8_autocast(enabled: bool = True, fp8_recipe: Any = None, fp8_group: Any = None) -> Iterator[None]:
    before = FP8GlobalStateManager.recipe
    FP8GlobalStateManager.recipe = fp8_recipe if enabled else None
    try:
        yield
    finally:
        FP8GlobalStateManager.recipe = before


@contextlib.contextmanager
def fp8_model_init(enabled: bool = True, **_: Any) -> Iterator[None]:
    assert not enabled, "parameters stay in bf16"
    yield
