"""CUDA's libraries from Python's packages, loaded before Transformer Engine 2.11 looks for them.

| what | symptom without it | cause |
|---|---|---|
| `preload` | import of Transformer Engine: `OSError: libcudnn_graph.so.9` (or libcublas.so.13) as soon as CUDA_HOME is set or /usr/local/cuda exists | it loads the parts of cuDNN and cuBLAS from the packages only where it finds no nvrtc and curand outside of them (transformer_engine/common/__init__.py) |
| | where CUDA 12 is installed, the first FP8 kernel that is compiled at run time fails: nvrtc of CUDA 12, headers of 13 | it takes nvrtc from CUDA_HOME, CUDA_PATH or /usr/local/cuda first; its core leaves nvrtc's symbols to whichever library came first |

What is loaded first, for all to see, is what is found later, whatever else is loaded then.
"""  # noqa: E501

from __future__ import annotations

import ctypes
from pathlib import Path

# In this order: each after what it needs.
LIBRARIES = (
    *("cu13/lib/libcudart.so.13", "cu13/lib/libcublasLt.so.13", "cu13/lib/libcublas.so.13"),
    *("cudnn/lib/libcudnn*.so.9", "cu13/lib/libnvrtc.so.13", "cu13/lib/libcurand.so.10"),
)


def preload(site: Path) -> list[Path]:
    """Loads the libraries of the packages in `site`, as far as they are there; returns them."""
    libraries = [path for pattern in LIBRARIES for path in sorted((site / "nvidia").glob(pattern))]
    for path in libraries:
        # Global: a library that names none of these as its own finds their symbols here.
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    return libraries
