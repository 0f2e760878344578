"""What config.json says of quantised weights: FP8 that import can make bfloat16 of, or a refusal by the method's name.

    block-wise     `weight_block_size: [128, 128]`, a scale for every block, the last ones of a row or column cut short
    per tensor     no block size, one scale

as transformers' quantizer_finegrained_fp8 and vLLM's fp8 have it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..errors import RequestError

FIELDS = ("quantization_config", "compression_config")


@dataclass(frozen=True)
class Fp8:
    block: tuple[int, int] | None  # rows and columns that share a scale; None: the whole tensor does


def read_fp8(config: dict[str, Any], where: str) -> Fp8 | None:
    """The FP8 of a parsed config.json, None where nothing is quantised; `where` names the file in errors.

    Raises RequestError for every other method, and for FP8 with settings that are not known.
    """
    fields = {name: config[name] for name in FIELDS if config.get(name) not in (None, {})}
    if not fields:
        return None
    name, values = next(iter(fields.items()))
    if not isinstance(values, dict):
        raise RequestError(f"{where}: {name} = {values!r} is not supported: expected an object")
    method = values.get("quant_method")
    if name != "quantization_config" or method != "fp8":
        said = method or ("bitsandbytes" if any("load_in" in key for key in values) else "a method without a name")
        raise RequestError(
            f"{where}: {name}: the weights are quantised by {said}, of which only FP8 (quant_method fp8) is read: take "
            "the release that is not quantised, or write one with transformers (from_pretrained, dequantize, "
            "save_pretrained)"
        )
    if values.get("fmt") not in (None, "e4m3"):
        raise RequestError(f"{where}: {name}.fmt = {values['fmt']!r} is not supported: only e4m3 is read")
    block = values.get("weight_block_size")
    if block is None:
        return Fp8(None)
    if not isinstance(block, list) or len(block) != 2 or any(type(size) is not int or size < 1 for size in block):
        raise RequestError(f"{where}: {name}.weight_block_size = {block!r} is no pair of sizes")
    return Fp8((block[0], block[1]))
