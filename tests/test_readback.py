"""A publish reads back what the engine holds, rank by rank, and memory changes hands in the one order that is safe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from a3po_megatron.model.cut import EngineRank, cut, hf_tensors
from a3po_megatron.model.read import read_facts
from a3po_megatron.rollout.engine import local_experts
from a3po_megatron.weights.receipt import shard_checksums, tensor_checksum, wrap
from tests.distributed import cases_readback as cases
from tests.harness.ranks import run_ranks
from tests.harness.tiny_models import make_checkpoint


@pytest.mark.parametrize(
    ("case", "kinds"),
    [
        *(("narrow", cases.NARROW), ("wide", cases.WIDE), ("dealt", cases.DEALT)),
        pytest.param("narrow_implied", cases.NARROW_IMPLIED, marks=pytest.mark.soak),
        pytest.param("four", cases.FOUR, marks=pytest.mark.soak),
    ],
)
def test_one_wrong_bit_in_one_ranks_engine_is_found_in_its_own_tensors_and_named(
    tmp_path: Path, case: str, kinds: dict[str, Any]
) -> None:
    last = 3 if case == "four" else 1
    for by_kind in run_ranks(last + 1, getattr(cases, case), folder=tmp_path)[case]:
        assert by_kind.keys() == kinds.keys()
        for kind, found in by_kind.items():
            assert found.pop("not vLLM's slices") == "", kind
            assert found.pop("greedy") == "equal", kind
            for name in ("sound", "sound again", "sound after that", "sound at last"):
                assert found.pop(name) == "ok, engine", (kind, name)
            assert found.pop("unmapped") == "", kind  # every tensor of vLLM's model is some HF tensor's
            swapped = found.pop("gate and up swapped in the engine's map")
            assert "gate_proj.weight, but does not hold it" in swapped, kind
            assert len(found) == 3
            for what, said in found.items():
                tensor = f"model.{what.removeprefix('one bit of ')}"
                # The ranks of an engine add up what they share; what each has whole, the one that lost it names.
                rank = 0 if not case.startswith("narrow") and "o_proj" in tensor else last
                assert f"the engine of rank {rank} was sent {tensor}, but does not hold it" in said, (kind, what)


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("tensor", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", ["qwen3", "qwen2"])
def test_an_engine_of_more_ranks_than_kv_heads_has_each_head_on_neighbours_and_all_their_copies_are_proven(
    tmp_path: Path, kind: str, tensor: int, kv_heads: int
) -> None:
    sizes = {"num_attention_heads": 8, "num_key_value_heads": kv_heads, "num_hidden_layers": 1, "hidden_size": 64}
    facts, hf = read_facts(make_checkpoint(tmp_path, kind, **sizes)), load_file(tmp_path / "model.safetensors")
    names = [name for name in hf if "k_proj" in name or "v_proj" in name]
    total, held = torch.zeros(len(names), dtype=torch.int64), dict.fromkeys(names, 0)
    for rank in range(tensor):
        ours = [piece for piece in cut(facts, EngineRank(tensor, rank, (0, 0))) if piece.tensor in names]
        # vllm/model_executor/layers/linear.py: QKVParallelLinear, weight_loader
        replicas = max(1, tensor // kv_heads)
        rows = max(1, kv_heads // tensor) * facts.head_dim
        shards = {}
        for piece in ours:
            assert (piece.start, piece.length) == (rank // replicas * rows, rows)
            assert piece.offset == 8 // tensor * facts.head_dim + ("v_proj" in piece.tensor) * rows
            end = piece.offset + piece.length
            shard = shards.setdefault(piece.key, torch.zeros(end + rows, *piece.shape[1:]))
            shard[piece.offset : end] = hf[piece.tensor][piece.start : piece.start + rows]
            held[piece.tensor] += piece.numel
        total += shard_checksums(ours, shards, None, names)
    for name, found in zip(names, total.tolist(), strict=True):
        assert held[name] == replicas * hf[name].numel()
        assert found == wrap(replicas * tensor_checksum(hf[name]))


@pytest.mark.parametrize("kind", ["qwen3", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize(("tensor", "expert"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 4)])
def test_the_ranks_of_an_engine_hold_every_element_whole_or_share_it_out(
    tmp_path: Path, kind: str, tensor: int, expert: int
) -> None:
    sizes = {"num_key_value_heads": 4, "vocab_size": 333}
    facts = read_facts(make_checkpoint(tmp_path, kind, **sizes))
    count = facts.experts.count if facts.experts else 0
    if expert > 1 and not count:
        return
    covered = {name: np.zeros(shape, dtype=int) for name, shape in hf_tensors(facts).items()}
    for rank in range(tensor):
        pieces = cut(facts, EngineRank(tensor, rank, local_experts(rank, tensor, expert, count)))
        for piece in pieces:
            assert covered[piece.tensor].shape == piece.shape
            if piece.numel == math.prod(piece.shape) and piece.hf.expert is None:
                covered[piece.tensor] += rank == 0  # on every rank; counted once
                continue
            span = (slice(None),) * piece.dim + (slice(piece.start, piece.start + piece.length),)
            covered[piece.tensor][span] += 1
    assert all((times == 1).all() for times in covered.values())


def test_an_engines_codes_are_the_whole_tensors_wherever_its_shards_are_whole_blocks(tmp_path: Path) -> None:
    found = run_ranks(1, cases.checks_quantised, folder=tmp_path)["checks_quantised"][0]
    # The quantiser itself: e4m3 rounds to the nearest of its values, of which the last is reached by the largest.
    # 0.02 more than half a step: the quantiser multiplies by a rounded reciprocal.
    assert found["worst"] <= 0.52
    assert found["unequal"] == []
    # One code of every tensor of vLLM's, that is of one of the two or three HF tensors that are stacked in it.
    assert found["altered"] == [2 * 4, 2 * 4]  # layers × (qkv, o, gate and up, down)


def test_an_engine_leaves_the_learners_process_as_it_found_it(tmp_path: Path) -> None:
    # In a process that has not imported vLLM: the import is part of it.
    assert run_ranks(1, cases.keeps_the_process, folder=tmp_path, fresh=True)["keeps_the_process"] == [[]]


def test_memory_changes_hands_in_the_one_order_in_which_it_is_there(tmp_path: Path) -> None:
    (found,) = run_ranks(1, cases.sleeps, folder=tmp_path)["sleeps"]
    publish = ["wake weights", "load", "read back", "wake kv_cache", "probe"]
    assert found.pop("load in sleep") == "an engine that is asleep has no memory to load into"
    away = {"none": [], "optimizer": ["gradients_away", "optimizer_away", "give_back"]}
    away["all"] = away["optimizer"]
    leave = {"none": [], "optimizer": [], "all": ["parameters_away", "give_back"]}
    back = {"none": [], "optimizer": ["parameters_back", "gradients_back", "optimizer_back"]}
    back["all"] = back["optimizer"]
    for offload, calls in found.items():
        step = [*leave[offload], "sample", "sleep 2", *back[offload], "train", *away[offload], *publish]
        assert calls == [*away[offload], *publish, *step, *step], offload
