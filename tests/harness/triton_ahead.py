"""The loss's Triton kernels compiled for sm_90 without a GPU: their registers, spilled bytes and shared memory.

python -m tests.harness.triton_ahead [FOLDER]     JSON: kernel → figures; FOLDER: another Triton's, before ours
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = sys.argv[1:2]

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from a3po_megatron.learner import rows_triton  # noqa: E402

TARGET = GPUTarget("cuda", 90, 32)
FLOATS = dict.fromkeys(("x", "out", "peak", "log_z", "entropy", "of_logprob", "of_entropy"), "*fp32")
TYPES = FLOATS | {"column": "*i64", "here": "*i8"} | dict.fromkeys(("columns", "stride", "tokens"), "i32")
USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


def figures(kernel: Any, with_entropy: bool) -> dict[str, int]:
    names = kernel.arg_names
    constants = {"WITH_ENTROPY": with_entropy, "BLOCK": rows_triton.BLOCK}
    signature = {name: "constexpr" if name in constants else TYPES[name] for name in names}
    source = ASTSource(kernel, signature, {(names.index(name),): value for name, value in constants.items()})
    compiled = triton.compile(source, target=TARGET)
    cuobjdump = next(Path(triton.__file__).parent.glob("backends/nvidia/bin/cuobjdump"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        command = [cuobjdump, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = map(int, USAGE.search(said).groups())  # type: ignore[union-attr]
    return {"registers": registers, "spilled": stack + local, "shared": compiled.metadata.shared}


if __name__ == "__main__":
    found = {
        f"{name}{', entropy' * with_entropy}": figures(kernel, with_entropy)
        for name, kernel in (("measure", rows_triton._measure), ("gradient", rows_triton._gradient))
        for with_entropy in (False, True)
    }
    print(json.dumps({"triton": triton.__version__, "kernels": found}))
