"""Linear layers, norms and attention with Transformer Engine's names."""

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.nn.functional import all_gather

from . import distributed as distributed
from . import ops as ops
from .fp8 import FP8GlobalStateManager
from .fp8 import fp8_autocast as fp8_autocast
from .fp8 import fp8_model_init as fp8_model_init

RUNS: list[tuple[str, str, Any]] = []  # of every linear module's forward: its name, its recipe, is_first_microbatch


def _mark(parameter: Tensor, dim: int) -> None:
    """Transformer Engine's set_tensor_model_parallel_attributes: Megatron's gradient norm goes by them."""
    for name, value in {"tensor_model_parallel": True, "partition_dim": dim, "partition_stride": 1}.items():
        setattr(parameter, name, value)


def _weight(
    columns: int, rows: int, ranks: int, parallel_mode: str | None, initialise: Any, dtype: Any, device: Any
) -> torch.nn.Parameter:
    """A rank's share of a linear layer's weight."""
    rows = rows // ranks if parallel_mode == "column" else rows
    columns = columns // ranks if parallel_mode == "row" else columns
    weight = torch.nn.Parameter(torch.empty(rows, columns, dtype=dtype, device=device))
    if initialise is not None:
        initialise(weight)
    _mark(weight, dim=1 if parallel_mode == "row" else 0)
    return weight


class _Module(torch.nn.Module):
    """The part of TransformerEngineBaseModule that state dicts see."""

    sequence_parallel = False

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)  # what it stores where no module ran in FP8 with a history

    def set_extra_state(self, state: Any) -> None:
        pass

    def _run(self, x: Tensor, weights: list[Tensor], is_first_microbatch: Any) -> None:
        """Records the run, and refuses what utils.py (assert_dim_for_fp8_exec) and, for blockwise column-parallel
        layers under sequence parallelism, module/linear.py (assert_dim_for_all_gather) refuse in 2.11."""
        recipe = FP8GlobalStateManager.recipe
        name = getattr(self, "ub_name", None) or type(self).__name__
        RUNS.append((name, type(recipe).__name__ if recipe else "bf16", is_first_microbatch))
        if recipe is None:
            return
        assert x.numel() // x.shape[-1] % 8 == 0 and x.shape[-1] % 16 == 0, f"{name}: {tuple(x.shape)} in FP8"
        for weight in weights:
            assert weight.shape[0] % 8 == 0 and weight.shape[1] % 16 == 0, f"{name}: weight {tuple(weight.shape)}"
        gathers = self.sequence_parallel and getattr(self, "parallel_mode", None) == "column"
        if gathers and type(recipe).__name__ == "Float8BlockScaling":
            assert x.numel() // x.shape[-1] % 128 == 0 and x.shape[-1] % 128 == 0, f"{name}: {tuple(x.shape)} gathered"


class Linear(_Module):
    def __init__(
        self,
        in_features: int,
        out_features: int,
        sequence_parallel: bool = False,
        fuse_wgrad_accumulation: bool = False,
        tp_group: Any = None,
        tp_size: int = 1,
        get_rng_state_tracker: Any = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        return_bias: bool = False,
        params_dtype: torch.dtype | None = None,
        parallel_mode: str | None = None,
        device: Any = "cuda",
        ub_name: str | None = None,
        rng_tracker_name: str | None = None,
        **_: Any,
    ) -> None:
        super().__init__()
        assert not return_bias
        self.sequence_parallel = sequence_parallel and tp_size > 1
        self.tp_group, self.tp_size, self.parallel_mode, self.ub_name = tp_group, tp_size, parallel_mode, ub_name
        self.weight = _weight(in_features, out_features, tp_size, parallel_mode, init_method, params_dtype, device)
        rows, columns = self.weight.shape
        self.in_features, self.out_features = columns, rows
        self.bias = torch.nn.Parameter(torch.zeros(rows, dtype=params_dtype, device=device)) if bias else None
        if self.bias is not None:
            assert parallel_mode == "column"
            _mark(self.bias, dim=0)
        self.use_bias = bias
        self.save_original_input = False  # set by Megatron where another module keeps the input anyway

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self._run(x, [self.weight], is_first_microbatch)
        return self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        from megatron.core.tensor_parallel import mappings

        group = self.tp_group
        if self.parallel_mode == "column" and self.tp_size > 1:
            if self.sequence_parallel:
                x = mappings.gather_from_sequence_parallel_region(x, group=group)
            else:
                x = mappings.copy_to_tensor_model_parallel_region(x, group=group)
        y = F.linear(x, self.weight)
        if self.parallel_mode == "row" and self.tp_size > 1:
            if self.sequence_parallel:
                y = mappings.reduce_scatter_to_sequence_parallel_region(y, group=group)
            else:
                y = mappings.reduce_from_tensor_model_parallel_region(y, group=group)
        return y if self.bias is None else y + self.bias


class RMSNorm(_Module):
    def __init__(
        self,
        hidden_size: int,
        eps: float = 1e-5,
        sequence_parallel: bool = False,
        zero_centered_gamma: bool = False,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **_: Any,
    ) -> None:
        super().__init__()
        assert not zero_centered_gamma
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, dtype=params_dtype, device=device))
        self.weight.sequence_parallel = sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)


class LayerNorm(RMSNorm):
    """Not used by the models of this package."""


class LayerNormLinear(Linear):
    def __init__(
        self, in_features: int, out_features: int, eps: float = 1e-5, normalization: str = "LayerNorm", **others: Any
    ) -> None:
        super().__init__(in_features, out_features, **others)
        assert normalization == "RMSNorm"
        self.eps = eps
        norm = torch.ones(in_features, dtype=others["params_dtype"], device=others["device"])
        self.layer_norm_weight = torch.nn.Parameter(norm)
        self.layer_norm_weight.sequence_parallel = others["sequence_parallel"]  # type: ignore[attr-defined]

    def forward(self, x: Tensor, is_first_microbatch: bool | None = None) -> Tensor:
        self._run(x, [self.weight], is_first_microbatch)
        return self._multiply(F.rms_norm(x, x.shape[-1:], self.layer_norm_weight, self.eps))


class GroupedLinear(_Module):
    def __init__(
        self,
        num_gemms: int,
        in_features: int,
        out_features: int,
        tp_size: int = 1,
        parallel_mode: str | None = None,
        init_method: Callable[[Tensor], Any] | None = None,
        bias: bool = True,
        params_dtype: torch.dtype | None = None,
        device: Any = "cuda",
        **_: Any,
    ) -> None:
        super().__init__()
        assert not bias
        self.num_gemms, self.use_bias, self.parallel_mode = num_gemms, bias, parallel_mode
        for number in range(num_gemms):
            weight = _weight(in_features, out_features, tp_size, parallel_mode, init_method, params_dtype, device)
            self.register_parameter(f"weight{number}", weight)

    def init_fp8_metadata(self, num_gemms: int = 1) -> None:
        pass

    def _encode_extra_state(self, state: Any) -> Tensor:
        return self.get_extra_state()

    def _decode_extra_state(self, state: Any) -> None:
        return None

    def forward(self, x: Tensor, m_splits: list[int], is_first_microbatch: bool | None = None) -> Tensor:
        weights = [getattr(self, f"weight{number}") for number in range(self.num_gemms)]
        self._run(x, weights, is_first_microbatch)
        if FP8GlobalStateManager.is_fp8_enabled():
            assert all(split % 16 == 0 for split in m_splits), f"experts' tokens {m_splits} in FP8"
        parts = x.split(list(m_splits))
        return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


class DotProductAttention(_Module):
    """Causal attention within packed sequences.

    Under context parallelism of C ranks `cu_seqlens` are those of whole sequences, of which rank c holds the chunks c
    and 2 C - 1 - c of 2 C (2.11, attention/dot_product_attention/context_parallel.py). Here every rank computes all.
    """

    def __init__(
        self,
        num_attention_heads: int,
        kv_channels: int,
        softmax_scale: float | None = None,
        cp_group: Any = None,
        **_: Any,
    ) -> None:
        super().__init__()
        self.cp_group = cp_group
        self.scale = softmax_scale or kv_channels**-0.5

        def forgive(_: Any, incompatible: Any) -> None:
            """As 2.11 does for checkpoints without this module's extra state, such as Megatron's."""
            missing = incompatible.missing_keys
            missing[:] = [name for name in missing if "core_attention._extra_state" not in name]

        self.register_load_state_dict_post_hook(forgive)

    def forward(
        self,
        query: Tensor,  # [T, heads, head_dim]
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        qkv_format: str = "sbhd",
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_kv: Tensor | None = None,
        cu_seqlens_q_padded: Tensor | None = None,
        cu_seqlens_kv_padded: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_kv: int | None = None,
        attn_mask_type: str = "causal",
    ) -> Tensor:
        assert (qkv_format, attn_mask_type) == ("thd", "padding_causal") and attention_mask is None
        assert cu_seqlens_q is not None and cu_seqlens_q.dtype == torch.int32 and cu_seqlens_q_padded is None
        ranks = self.cp_group.size() if self.cp_group is not None else 1
        assert int(cu_seqlens_q[-1]) == len(query) * ranks, "padding must belong to a sequence"
        assert max_seqlen_q == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
        ends, mine = cu_seqlens_q.tolist(), slice(None)
        if ranks > 1:
            place = torch.cat([_chunks(ends, ranks, rank) for rank in range(ranks)])
            query, key, value = (
                torch.cat(all_gather(x.contiguous(), group=self.cp_group))[torch.argsort(place)]
                for x in (query, key, value)
            )
            mine = _chunks(ends, ranks, self.cp_group.rank())  # type: ignore[assignment]
        outputs = []
        for begin, end in itertools.pairwise(ends):
            q, k, v = (x[begin:end].transpose(0, 1)[None] for x in (query, key, value))
            found = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=True)
            outputs.append(found[0].transpose(0, 1))
        return torch.cat(outputs).flatten(1)[mine]


def _chunks(ends: list[int], ranks: int, rank: int) -> Tensor:
    """Which tokens of the whole pack a context-parallel rank holds, in its order."""
    parts = []
    for begin, end in itertools.pairwise(ends):
        length, rest = divmod(end - begin, 2 * ranks)
        assert rest == 0, "a sequence must be whole chunks"
        for number in (rank, 2 * ranks - 1 - rank):
            parts.append(torch.arange(begin + number * length, begin + (number + 1) * length))
    return torch.cat(parts)


class Fp8Padding(torch.nn.Module):
    """Pads every expert's tokens in a copy of its own, where the router has not done so: here it has to have."""

    def __init__(self, num_gemms: int) -> None:
        super().__init__()

    def forward(self, x: Tensor, m_splits: list[int]) -> tuple[Tensor, list[int]]:
        assert all(split % 16 == 0 for split in m_splits), "the router is to pad the experts' tokens"
        return x, m_splits


class Fp8Unpadding(Fp8Padding):
    def forward(self, x: Tensor, m_splits: list[int]) -> Tensor:  # type: ignore[override]
        return x
