"""Stands for Transformer Engine 2.11's C++ extension, in plain PyTorch on the CPU.

Names and arguments are those that its Python calls; what is not here raises AttributeError or, when it is called,
NotImplementedError. Products take the operands' stored values and sum in float32, as cuBLAS does with bf16 and FP8.
"""

import enum
from collections.abc import Callable
from typing import Any


class DType(enum.IntEnum):
    kByte, kInt32, kInt64, kFloat32, kFloat16, kBFloat16, kFloat8E4M3, kFloat8E5M2, kFloat8E8M0, kFloat4E2M1 = range(10)


class Float8BlockScaleTensorFormat(enum.Enum):
    GEMM_READY, COMPACT = range(2)


class CommOverlapType(enum.Enum):
    RS, AG = range(2)


class CommOverlapAlgo(enum.Enum):
    BULK_OVERLAP_AG, BULK_OVERLAP_RS = range(2)


class CommOverlap: ...


class CommOverlapP2P: ...


class CommOverlapHelper: ...


class FP8TensorMeta: ...


class FP8FwdTensors(enum.IntEnum):
    GEMM1_INPUT, GEMM1_WEIGHT, GEMM1_OUTPUT = 0, 1, 2
    GEMM2_INPUT, GEMM2_WEIGHT, GEMM2_OUTPUT = 3, 4, 5
    GEMM3_INPUT, GEMM3_WEIGHT, GEMM3_OUTPUT = 6, 7, 8


class FP8BwdTensors(enum.IntEnum):
    GRAD_OUTPUT1, GRAD_INPUT1, GRAD_OUTPUT2, GRAD_INPUT2, GRAD_OUTPUT3, GRAD_INPUT3 = range(6)


def _enumeration(name: str, members: str, start: int = 0) -> Any:
    return enum.IntEnum(name, [f"NVTE_{member}" for member in members.split()], start=start)


NVTE_Bias_Type = _enumeration("NVTE_Bias_Type", "NO_BIAS PRE_SCALE_BIAS POST_SCALE_BIAS ALIBI")
NVTE_Mask_Type = _enumeration(
    "NVTE_Mask_Type",
    "NO_MASK PADDING_MASK CAUSAL_MASK PADDING_CAUSAL_MASK CAUSAL_BOTTOM_RIGHT_MASK PADDING_CAUSAL_BOTTOM_RIGHT_MASK",
)
NVTE_Softmax_Type = _enumeration("NVTE_Softmax_Type", "VANILLA_SOFTMAX OFF_BY_ONE_SOFTMAX LEARNABLE_SOFTMAX")
NVTE_Fused_Attn_Backend = _enumeration(
    "NVTE_Fused_Attn_Backend", "No_Backend F16_max512_seqlen F16_arbitrary_seqlen FP8", start=-1
)
NVTE_QKV_Format = _enumeration("NVTE_QKV_Format", "SBHD BSHD THD BSHD_2SBHD SBHD_2BSHD THD_2BSHD THD_2SBHD")
NVTE_QKV_Layout = _enumeration(
    "NVTE_QKV_Layout",
    "SB3HD SBH3D SBHD_SB2HD SBHD_SBH2D SBHD_SBHD_SBHD BS3HD BSH3D BSHD_BS2HD BSHD_BSH2D BSHD_BSHD_BSHD "
    "T3HD TH3D THD_T2HD THD_TH2D THD_THD_THD SBHD_BSHD_BSHD BSHD_SBHD_SBHD THD_BSHD_BSHD THD_SBHD_SBHD "
    "Paged_KV_BSHD_BSHD_BSHD Paged_KV_BSHD_SBHD_SBHD Paged_KV_SBHD_BSHD_BSHD Paged_KV_SBHD_SBHD_SBHD "
    "Paged_KV_THD_BSHD_BSHD Paged_KV_THD_SBHD_SBHD",
)

get_cublasLt_version = lambda: 130100  # noqa: E731
get_cudnn_version = lambda: 92000  # noqa: E731
get_num_cublas_streams = lambda: 4  # noqa: E731


# What its Python takes by `import *`, and nothing here calls.
_NAMED = """
layernorm_fwd layernorm_bwd rmsnorm_bwd_add gelu dgelu geglu dgeglu qgelu dqgelu qgeglu dqgeglu relu drelu reglu dreglu
srelu dsrelu sreglu dsreglu silu dsilu swiglu dswiglu clamped_swiglu clamped_dswiglu dbias_dgelu dbias_dqgelu
dbias_drelu dbias_dsilu dbias_dsrelu dropout_fwd dropout_bwd
"""


def __getattr__(name: str) -> Callable[..., Any]:
    """A function of the extension that nothing here needs: it may be named, not called."""
    if not name[0].islower():
        raise AttributeError(f"the stand-in for transformer_engine_torch has no {name}")

    def missing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError(f"transformer_engine_torch.{name} (tests/harness/te_on_cpu)")

    return missing


globals().update({name: __getattr__(name) for name in _NAMED.split()})

from .attention import fused_attn_bwd as fused_attn_bwd  # noqa: E402
from .attention import fused_attn_fwd as fused_attn_fwd  # noqa: E402
from .attention import get_fused_attn_backend as get_fused_attn_backend  # noqa: E402
from .products import CALLS as CALLS  # noqa: E402
from .products import generic_gemm as generic_gemm  # noqa: E402
from .products import te_general_grouped_gemm as te_general_grouped_gemm  # noqa: E402
from .quantised import bgrad_quantize as bgrad_quantize  # noqa: E402
from .quantised import dequantize as dequantize  # noqa: E402
from .quantised import fp8_transpose as fp8_transpose  # noqa: E402
from .quantised import quantize as quantize  # noqa: E402
from .quantised import split_quantize as split_quantize  # noqa: E402
from .rows import fused_rope_backward as fused_rope_backward  # noqa: E402
from .rows import fused_rope_forward as fused_rope_forward  # noqa: E402
from .rows import multi_tensor_adam as multi_tensor_adam  # noqa: E402
from .rows import multi_tensor_l2norm as multi_tensor_l2norm  # noqa: E402
from .rows import multi_tensor_scale as multi_tensor_scale  # noqa: E402
from .rows import rmsnorm_bwd as rmsnorm_bwd  # noqa: E402
from .rows import rmsnorm_fwd as rmsnorm_fwd  # noqa: E402
