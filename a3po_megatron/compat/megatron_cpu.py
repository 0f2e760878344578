"""Megatron-Core 0.16.1 on a machine without CUDA: what has to be patched so that the real code runs on gloo.

| patch | symptom without it | cause |
|---|---|---|
| facade | `Torch not compiled with CUDA enabled` in rotary embeddings, gradient buffers, schedules, RNG | `torch.cuda.current_device()`, `device="cuda"` literals, streams, events and nvtx ranges in `megatron.core` |
| type names | `TypeError: Wrapped parameters must be one of torch.cuda.FloatTensor` when the optimizer is built, and unclipped gradients | tensor types compared with strings in `optimizer.py`, `distrib_optimizer.py`, `clip_grads.py` |
| experts | `AttributeError: te_general_gemm`; `all_to_all_single` refuses a tensor of split sizes | `moe_utils` has the name only with Transformer Engine; `maybe_move_tensor_to_cpu` makes a list only of CUDA tensors |
| uneven experts | `allgather: invalid tensor size` with tensor-parallel experts | gloo gathers equal sizes only, NCCL any |
| RNG tracker | `CUDA RNG state` calls when a model is built or dropout forks its stream | `tensor_parallel/random.py` keeps CUDA generators |

The facade is a stand-in for the *name* `torch` inside Megatron's modules; the real `torch` is left as it is, so that
vLLM, transformers and our own code are unaffected.
"""  # noqa: E501

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_CPU = torch.device("cpu")
_HERE = [_CPU]  # what Megatron's modules get for a device named "cuda"
_FACTORIES = (
    *("zeros", "ones", "empty", "full", "tensor", "as_tensor", "arange", "eye", "rand", "randn", "randint"),
    *("zeros_like", "ones_like", "empty_like", "full_like"),
)
_TYPE_NAMES = {f"torch.cuda.{name}": f"torch.{name}" for name in ("FloatTensor", "HalfTensor", "BFloat16Tensor")}


class _Inert:
    """Stands for a stream, an event or an nvtx range: there is only one order of execution on a CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __getattr__(self, name: str) -> Callable[..., _Inert]:
        return lambda *args, **kwargs: self


class _CudaFacade(types.ModuleType):
    """`torch.cuda` as Megatron's modules see it. What is not listed here comes from the real module."""

    Stream = _Inert
    Event = _Inert

    def __init__(self) -> None:
        super().__init__("torch.cuda")
        stream = _Inert()
        self.nvtx = types.SimpleNamespace(
            range_push=lambda *_: None, range_pop=lambda *_: None, range=lambda *_: contextlib.nullcontext()
        )
        self.current_device = lambda: _HERE[0]
        self.device_count = lambda: 1
        self.set_device = self.synchronize = self.empty_cache = lambda *_, **__: None
        self.current_stream = self.default_stream = lambda *_: stream
        self.stream = lambda _: contextlib.nullcontext()
        self.memory_allocated = self.max_memory_allocated = lambda *_: 0
        self.get_rng_state = lambda *_: torch.get_rng_state()
        self.set_rng_state = lambda state, *_: torch.set_rng_state(state)
        self.manual_seed = lambda seed: torch.manual_seed(seed)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)


class _TorchFacade(types.ModuleType):
    """`torch` as Megatron's modules see it: devices named "cuda" are the CPU."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _CudaFacade()
        self.__dict__.update({name: _on_cpu(getattr(torch, name)) for name in _FACTORIES})

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        self.__dict__[name] = value  # the next look-up is a plain dictionary access
        return value


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")  # a number is a CUDA device's
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = _HERE[0]
        kwargs.pop("pin_memory", None)  # it is CUDA that pins
        return factory(*args, **kwargs)

    return make


_FACADE = _TorchFacade()


class _Finder(importlib.abc.MetaPathFinder):
    """Gives the facade to Megatron modules that are imported later; a missed one fails at a random place."""

    def find_spec(self, name: str, path: Any, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if not name.startswith("megatron."):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None or not hasattr(spec.loader, "exec_module"):
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: types.ModuleType) -> None:
            execute(module)
            # Only after it was run: its own `import torch` would undo what came before.
            if module.__dict__.get("torch") is torch:
                module.__dict__["torch"] = _FACADE

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def _rename_types(function: Any, names: dict[str, str] = _TYPE_NAMES) -> None:
    """Replaces the CUDA type names among a function's constants."""
    # Methods and decorated functions (torch.no_grad) hold the one whose code has the names.
    function = getattr(function, "__func__", function)
    function = getattr(function, "__wrapped__", function)

    def swap(constant: Any) -> Any:
        if isinstance(constant, str):
            return names.get(constant, constant)
        if isinstance(constant, tuple | frozenset):  # what `in (…)` and `in {…}` are compiled to
            return type(constant)(swap(item) for item in constant)
        return constant

    constants = tuple(swap(constant) for constant in function.__code__.co_consts)
    if constants == function.__code__.co_consts:
        raise RuntimeError(
            f"megatron-core has changed: no CUDA type name in {function.__qualname__}; compat/ is for 0.16.1"
        )
    function.__code__ = function.__code__.replace(co_consts=constants)


def _install_rng_tracker() -> None:
    from megatron.core.tensor_parallel import random

    class CpuRngTracker(random.CudaRNGStatesTracker):
        """The same named streams, held as CPU generator states."""

        def add(self, name: str, seed: int) -> None:
            if seed in self.seeds_ or name in self.states_:
                raise ValueError(f"the RNG stream {name!r} or its seed {seed} exists already")
            self._is_initialized = True
            self.seeds_.add(seed)
            self.states_[name] = torch.Generator().manual_seed(seed).get_state()

        @contextlib.contextmanager
        def fork(self, name: str = random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
            outside = torch.get_rng_state()
            torch.set_rng_state(self.states_[name])
            try:
                yield
            finally:
                self.states_[name] = torch.get_rng_state()
                torch.set_rng_state(outside)

    random._CUDA_RNG_STATE_TRACKER = CpuRngTracker()
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    random._get_cuda_rng_state = lambda *_, **__: None
    random._set_cuda_rng_state = lambda *_, **__: None


def _install_moe() -> None:
    from megatron.core.tensor_parallel import mappings
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if torch.is_tensor(tensor) and as_numpy else tensor

    gather, reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather_uneven(input_: Any, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Any:
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        padded = input_.new_zeros((max(output_split_sizes), *input_.shape[1:]))
        padded[: len(input_)] = input_
        parts = [torch.empty_like(padded) for _ in output_split_sizes]
        torch.distributed.all_gather(parts, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(parts, output_split_sizes, strict=True)])

    def reduce_scatter_uneven(
        input_: Any, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Any:
        if input_split_sizes is None or group.size() == 1:
            return reduce_scatter(input_, group, input_split_sizes, use_global_buffer)
        # Everything to everyone, and each keeps its rows: these sizes differ, too.
        total = input_.clone()
        torch.distributed.all_reduce(total, group=group)
        return total.split(input_split_sizes)[group.rank()].contiguous()

    mappings._gather_along_first_dim = gather_uneven
    mappings._reduce_scatter_along_first_dim = reduce_scatter_uneven
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None
    moe_utils.maybe_move_tensor_to_cpu = token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


@contextlib.contextmanager
def on_device(name: str) -> Iterator[None]:
    """Megatron's modules find this device in CUDA's place: `meta`, for a model without its memory."""
    from megatron.core.optimizer import distrib_optimizer, optimizer

    kinds = (
        distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups,
        optimizer.Float16OptimizerWithFloat16Params.__init__,
    )
    names = {own: own.replace("torch.", f"torch.{name}.") for own in _TYPE_NAMES.values()}
    _HERE[0] = torch.device(name)
    for kind in kinds:
        _rename_types(kind, names)
    try:
        yield
    finally:
        _HERE[0] = _CPU
        for kind in kinds:
            _rename_types(kind, {there: own for own, there in names.items()})


def install() -> None:
    """Installs the patches once per process; refuses where CUDA is present."""
    if torch.cuda.is_available():
        raise RuntimeError("the CPU patches for Megatron-Core must not be installed where CUDA is present")
    if any(isinstance(finder, _Finder) for finder in sys.meta_path):
        return
    if imported := [name for name in sys.modules if name.startswith("megatron.core.")]:
        raise RuntimeError(f"compat.prepare() must run before Megatron is imported, but {imported[0]} is loaded")
    sys.meta_path.insert(0, _Finder())

    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    _rename_types(distrib_optimizer.DistributedOptimizer.__init__)
    _rename_types(distrib_optimizer.DistributedOptimizer._build_model_and_main_param_groups)
    _rename_types(optimizer.Float16OptimizerWithFloat16Params.__init__)
    _rename_types(clip_grads.clip_grad_by_total_norm_fp32)
    _install_rng_tracker()
    _install_moe()
