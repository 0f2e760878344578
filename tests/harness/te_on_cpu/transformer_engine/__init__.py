"""Transformer Engine 2.11's own Python, on a CPU: this folder on PYTHONPATH puts it in the place of the real package.

The wheel `transformer-engine` holds Python only; `tools/setup.sh` unpacks it beside the packages of .venv. Here its
modules run as they are, with

    the extension     `transformer_engine_torch`, beside this package: its functions in plain PyTorch, with what its
                      kernels demand of shapes, masks, layouts and copies as assertions
    `torch`           Megatron's facade of compat/megatron_cpu.py, with a Hopper GPU added to what it says of devices
    `.is_cuda`        read as `.is_cpu`, and `.cuda()` as `.cpu()`

What it shows: that constructors, arguments, names, saved tensors, gradients and copies of weights are what Transformer
Engine's Python makes of them. What it cannot show: the numbers of kernels, what cuDNN and cuBLAS refuse beyond those
assertions, streams, memory, context parallelism, and gathers of quantised tensors.
"""

import importlib.abc
import importlib.machinery
import importlib.metadata
import os
import sys
import types
from pathlib import Path
from typing import Any

import torch

from a3po_megatron.compat import megatron_cpu

TREE = Path(os.environ.get("A3PO_TE_TREE", Path(sys.prefix, "transformer-engine")))
if not (TREE / "transformer_engine/pytorch").is_dir():
    raise RuntimeError(f"Transformer Engine's wheel is not in {TREE}: run `make setup`")


class _Device(type):
    """`torch.device`, of which "cuda" is the CPU."""

    def __call__(cls, *of: Any) -> torch.device:
        index = of[0] if of else "cuda"
        return torch.device("cpu") if isinstance(index, int) or "cuda" in str(index) else torch.device(*of)

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, torch.device)


class _AnyDevice(metaclass=_Device): ...


def _facade() -> Any:
    facade = megatron_cpu._TorchFacade()
    hopper = types.SimpleNamespace(major=9, minor=0, multi_processor_count=132, name="H200", total_memory=141 << 30)
    facade.cuda.is_available = lambda: True
    facade.cuda.get_device_capability = lambda *_: (9, 0)
    facade.cuda.get_device_properties = lambda *_: hopper
    facade.cuda.is_current_stream_capturing = lambda: False
    facade.version = types.SimpleNamespace(cuda="13.0")
    facade.device = _AnyDevice
    return facade


_FACADE = _facade()


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> types.CodeType:
        source = self.get_data(self.path).replace(b".is_cuda", b".is_cpu").replace(b".cuda()", b".cpu()")
        return self.source_to_code(source, self.path)  # type: ignore[return-value]

    def exec_module(self, module: types.ModuleType) -> None:
        if module.__name__ == "transformer_engine.pytorch.onnx_extensions":  # export to ONNX needs onnxscript
            module.__getattr__ = lambda name: None  # type: ignore[method-assign]
            return
        super().exec_module(module)
        if module.__dict__.get("torch") is torch:
            module.__dict__["torch"] = _FACADE
        if module.__name__ == "transformer_engine.pytorch.distributed":  # what is recomputed draws as it did
            module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
            module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
        if module.__name__ == "transformer_engine.common":
            module.load_framework_extension = lambda framework: None  # the extension is a module of its own here


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("transformer_engine."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


os.environ["NVTE_PROJECT_BUILDING"] = "1"  # CUDA's libraries are not looked for
sys.meta_path.insert(0, _Finder())
sys.path.append(str(TREE))  # after all else: for its metadata, by which Megatron knows the version
__path__ = [str(TREE / "transformer_engine")]
__version__ = importlib.metadata.version("transformer_engine")

from transformer_engine import common as common  # noqa: E402
from transformer_engine import pytorch as pytorch  # noqa: E402
