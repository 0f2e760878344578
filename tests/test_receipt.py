"""Checksums against Python integers, for any cut of the weights; buckets that hold every tensor once."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from a3po_megatron.model.cut import hf_tensors
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.weights import receipt
from a3po_megatron.weights.receipt import block_checksum, shard_checksums, tensor_checksum
from tests.harness.tiny_models import tensor_pieces
from tests.test_layout import megatron_parameters

NUMPY_BITS = {torch.float32: (torch.int32, np.uint32), torch.bfloat16: (torch.int16, np.uint16)}
FAMILY = ModelFacts(
    architecture="Qwen2ForCausalLM",
    layers=3,
    hidden=12,
    ffn=20,
    heads=8,
    kv_heads=4,
    head_dim=3,
    vocab=29,
    tied=False,
    qk_norm=False,
    qkv_bias=True,
    norm_eps=1e-6,
    rope_theta=1e4,
    max_positions=64,
    eos=(1,),
)


def mixed(index: int) -> int:
    """splitmix64 (Steele, Lea and Flood 2014) of `index`, in Python integers."""
    z = index * 0x9E3779B97F4A7C15 % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def literal_checksum(tensor: Tensor) -> int:
    """The sum of bit pattern times odd hash of the index, modulo 2^64, as an unsigned integer."""
    signed, unsigned = NUMPY_BITS[tensor.dtype]
    bits = tensor.contiguous().view(signed).numpy().view(unsigned).reshape(-1)
    return sum(int(value) * (mixed(index) | 1) for index, value in enumerate(bits)) % 2**64


def random_weights(facts: ModelFacts = FAMILY, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in hf_tensors(facts).items()}


def wrapped(total: int) -> int:
    return total % 2**64


# --- the sum -----------------------------------------------------------------------------------------------------


def test_the_mixer_is_splitmix64() -> None:
    # The first outputs of the published generator seeded with 0 are its mixer at multiples of the golden gamma.
    assert [mixed(index) for index in (1, 2, 3)] == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1,), (37,), (5, 7), (3, 1), (64, 33)])
def test_the_checksum_is_the_literal_sum_in_python_integers(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e3
    values.view(-1)[0] = -0.0
    tensor = values.to(dtype)
    assert wrapped(tensor_checksum(tensor)) == literal_checksum(tensor)
    assert -(2**63) <= tensor_checksum(tensor) < 2**63
    assert wrapped(tensor_checksum(tensor.t().contiguous().t())) == literal_checksum(tensor)  # strides do not count


def keyed(parameters: dict[str, torch.Tensor]) -> dict[tuple[int, str], torch.Tensor]:
    """Parameters of a rank with one model chunk."""
    return {(0, name): value for name, value in parameters.items()}


@pytest.mark.parametrize("chunk", [1, 7, 64, 10**6])
def test_the_checksum_does_not_depend_on_how_much_is_hashed_at_once(
    monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr(receipt, "CHUNK", {"cpu": chunk})
    weights = random_weights()
    names = list(weights)
    parameters = keyed(megatron_parameters(FAMILY, 2, 1, weights))
    before = shard_checksums(tensor_pieces(FAMILY, 2, 1), parameters, torch.float32, names)
    assert wrapped(tensor_checksum(weights[names[1]])) == literal_checksum(weights[names[1]])
    monkeypatch.undo()
    assert torch.equal(shard_checksums(tensor_pieces(FAMILY, 2, 1), parameters, torch.float32, names), before)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.data())
def test_the_sums_of_any_blocks_in_any_order_add_up_to_the_whole(rows: int, columns: int, data: st.DataObject) -> None:
    tensor = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * columns))
    row, column = data.draw(st.integers(0, rows)), data.draw(st.integers(0, columns))
    blocks = [(0, row, 0, column), (0, row, column, columns), (row, rows, 0, column), (row, rows, column, columns)]
    total = 0
    for top, bottom, left, right in data.draw(st.permutations(blocks)):
        block = tensor[top:bottom, left:right]
        total += block_checksum(block, top * columns + left, columns, tensor.dtype)
    assert wrapped(total) == literal_checksum(tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_the_shares_of_all_ranks_add_up_to_the_checksum_of_every_hf_tensor(tensor: int, dtype: torch.dtype) -> None:
    weights = random_weights()
    names = list(weights)
    total = torch.zeros(len(names), dtype=torch.int64)
    for rank in range(tensor):
        parameters = keyed(megatron_parameters(FAMILY, tensor, rank, weights))
        # Padding of the vocabulary is nobody's: it must not count, whatever it holds.
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            held = parameters[0, name]
            held[min(len(held), FAMILY.vocab - rank * len(held)) :] = 99.0
        total += shard_checksums(tensor_pieces(FAMILY, tensor, rank), parameters, dtype, names)
    for name, found in zip(names, total.tolist(), strict=True):
        assert wrapped(found) == literal_checksum(weights[name].to(dtype)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_any_single_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    signed, _ = NUMPY_BITS[dtype]
    tensor = torch.randn(4, 5, generator=torch.Generator().manual_seed(2)).to(dtype)
    before = tensor_checksum(tensor)
    width = 8 * tensor.element_size()
    found = set()
    for element in range(tensor.numel()):
        for bit in range(width):
            changed = tensor.clone()
            flip = 1 << bit if bit < width - 1 else -(1 << bit)
            changed.view(signed).view(-1)[element] ^= flip
            assert int((changed.view(signed) != tensor.view(signed)).sum()) == 1
            found.add(tensor_checksum(changed))
    assert before not in found
    assert len(found) == tensor.numel() * width, "each flip gives a sum of its own"


@pytest.mark.parametrize(
    "change",
    [
        lambda tensor: tensor[[1, 0, *range(2, 8)]],
        lambda tensor: tensor[:, [0, 1, 3, 2, 4, 5, 6, 7]],
        lambda tensor: tensor.t(),
        lambda tensor: tensor.roll(1),
        lambda tensor: tensor.flip(0),
        lambda tensor: tensor.to(torch.bfloat16).to(torch.float32),
        lambda tensor: -tensor,
        lambda tensor: torch.where(tensor == tensor.abs().min(), 0.0, tensor),
        lambda tensor: torch.nextafter(tensor, torch.tensor(torch.inf)),
    ],
    ids=["rows", "columns", "transposed", "rolled", "flipped", "bf16 and back", "negated", "one zeroed", "last bits"],
)
def test_moved_or_altered_elements_change_the_checksum(change: Callable[[Tensor], Tensor]) -> None:
    tensor = torch.randn(8, 8, generator=torch.Generator().manual_seed(3))
    assert tensor_checksum(change(tensor)) != tensor_checksum(tensor)


def test_zero_and_minus_zero_and_another_dtype_are_different_bits() -> None:
    assert tensor_checksum(torch.zeros(3)) != tensor_checksum(-torch.zeros(3))
    tensor = torch.tensor([1.0, 2.0])  # exact in both
    assert tensor_checksum(tensor) != tensor_checksum(tensor.to(torch.bfloat16))
