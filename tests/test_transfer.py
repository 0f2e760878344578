"""Weights learner → engine by all ranks of a replica, against the numbered HF tensors themselves.

Ranks are threads and torch.distributed is a fake (collectives.py): 32 real ranks do not fit a test machine.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from a3po_megatron.model.cut import Piece, hf_tensors, pieces
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.families.dense import EMBEDDING, FINAL_NORM, HEAD
from a3po_megatron.model.layout import Layout, padded_vocab
from a3po_megatron.model.read import facts_of, read_facts
from a3po_megatron.rollout.engine import local_experts
from a3po_megatron.weights import transfer
from a3po_megatron.weights.fuse import FusedExperts
from a3po_megatron.weights.route import Plan, plan
from a3po_megatron.weights.transfer import Allocate, fresh, gather
from tests.harness.threads_as_ranks import Call, FakeDist, replica_groups
from tests.harness.tiny_models import make_checkpoint
from tests.test_layout import CONFIG, MOE, layouts, numbered, window

DATA = os.environ.get("A3PO_TEST_DATA")
DTYPE = torch.float32
property_test = settings(deadline=None, max_examples=16, suppress_health_check=[HealthCheck.filter_too_much])


@dataclass(frozen=True)
class Case:
    """One of `replicas` replicas of a learner, and engines over `engine` neighbouring ranks that share experts."""

    facts: ModelFacts
    layout: Layout
    engine: int = 1
    bucket: int = 300
    replica: int = 0
    replicas: int = 1

    @property
    def count(self) -> int:
        return self.facts.experts.count if self.facts.experts else 0

    @property
    def ranks(self) -> range:
        return range(len(self.layout.places()))

    def global_rank(self, rank: int) -> int:
        stage, within = divmod(rank, self.layout.stage_ranks)
        return within + self.layout.stage_ranks * (self.replica + self.replicas * stage)

    def experts(self) -> list[tuple[int, int]]:
        return [local_experts(self.global_rank(rank), self.engine, self.engine, self.count) for rank in self.ranks]

    def needs(self, rank: int, name: str) -> bool:
        """By the definition: an engine rank holds every tensor that is no expert's, and its share of the experts."""
        part, share = re.search(r"experts\.(\d+)", name), self.count // self.engine
        return part is None or int(part[1]) // share == self.global_rank(rank) % self.engine

    def pieces(self) -> list[tuple[Piece, ...]]:
        return [pieces(self.facts, self.layout, place) for place in self.layout.places()]

    def plan(self, **changes: Any) -> Plan:
        case, order = dataclasses.replace(self, **changes), list(hf_tensors(self.facts))
        return plan(case.layout, case.pieces(), order, case.bucket, DTYPE.itemsize, case.experts())


@st.composite
def cases(draw: st.DrawFn) -> Case:
    drawn = layouts().map(lambda drawn: Case(*drawn))
    case = draw(drawn.filter(lambda c: len(c.ranks) <= 32 and len(c.ranks) * len(hf_tensors(c.facts)) <= 4000))
    case = dataclasses.replace(case, replicas=draw(st.integers(1, 3)))
    world = len(case.ranks) * case.replicas
    engines = [size for size in (1, 2, 4) if size == 1 or (case.count and world % size == case.count % size == 0)]
    return dataclasses.replace(
        case,
        engine=draw(st.sampled_from(engines)),
        bucket=draw(st.sampled_from([1, 200, 1000, 6000, 1 << 20])),
        replica=draw(st.integers(0, case.replicas - 1)),
    )


def shards(mine: tuple[Piece, ...], hf: dict[str, Tensor]) -> dict[tuple[int, str], Tensor]:
    """One rank's parameters, in another dtype than the engine's, with a row of padding where there may be one."""
    found: dict[tuple[int, str], Tensor] = {}
    for piece in mine:
        if piece.key not in found:
            shape = list(piece.shape)
            shape[piece.dim] = sum(other.length for other in mine if other.key == piece.key)
            shape[0] += piece.tensor in (EMBEDDING, HEAD)
            found[piece.key] = torch.full(shape, -1.0, dtype=torch.float64)
        found[piece.key][window(piece, piece.offset)] = hf[piece.tensor][window(piece, piece.start)].double()
    return found


def run(case: Case, consume: Callable[[FakeDist, int, Any], Any] | None = None) -> tuple[list[Any], FakeDist]:
    """consume(fake, rank, stream) of every rank, where stream(plan, allocate) is its `gather`; None: a list of that."""
    fake, hf, the_plan = FakeDist(), numbered(case.facts), case.plan()
    parameters = [shards(mine, hf) for mine in case.pieces()]
    groups = replica_groups(fake, case.layout, case.global_rank)
    by_global = {case.global_rank(rank): rank for rank in case.ranks}

    def work(global_rank: int) -> Any:
        def stream(some: Plan = the_plan, allocate: Allocate = fresh) -> Iterator[tuple[str, Tensor]]:
            return itertools.chain.from_iterable(gather(some, parameters[rank], groups[rank], DTYPE, allocate))

        rank = by_global[global_rank]
        return consume(fake, rank, stream) if consume else list(stream())

    with patch.object(transfer, "dist", fake):
        return fake.run(by_global, work), fake


def wanted(case: Case) -> list[dict[str, Tensor]]:
    hf = {name: value.to(DTYPE) for name, value in numbered(case.facts).items()}
    return [{name: value for name, value in hf.items() if case.needs(rank, name)} for rank in case.ranks]


def fused(case: Case, hf: dict[str, Tensor]) -> dict[str, Tensor]:
    """HF tensors with every layer's experts packed, said literally."""
    found = {name: value for name, value in hf.items() if ".experts." not in name}
    for layer in range(case.facts.layers):
        prefix = f"model.layers.{layer}.mlp.experts."
        parts = [[hf[f"{prefix}{e}.{kind}_proj.weight"] for e in range(case.count)] for kind in ("gate", "up", "down")]
        gate_up = [torch.cat(pair) for pair in zip(parts[0], parts[1], strict=True)]
        found |= {f"{prefix}gate_up_proj": torch.stack(gate_up), f"{prefix}down_proj": torch.stack(parts[2])}
    return found


def by_layer(names: Iterable[str]) -> list[str]:
    """The order of the layers: within one, experts may come in any order."""
    return [name.partition(".experts.")[0] for name in names]


@property_test
@given(cases())
def test_every_rank_gets_exactly_the_tensors_that_it_needs_in_the_order_of_the_layers(case: Case) -> None:
    (found, _), the_plan = run(case), case.plan()
    for rank, (stream, want) in enumerate(zip(found, wanted(case), strict=True)):
        assert by_layer(name for name, _ in stream) == by_layer(want)
        assert len(stream) == len(want)
        assert {t.name: t.shape for t in the_plan.tensors(rank)} == {
            name: tuple(value.shape) for name, value in want.items()
        }
        for name, value in stream:
            assert value.dtype == DTYPE and torch.equal(value, want[name]), f"{name} on rank {rank}"


@property_test
@given(cases())
def test_a_rank_receives_what_it_needs_and_lacks_and_what_it_relays_to_its_expert_group(case: Case) -> None:
    """Exact. Beyond what it lacks, a rank only receives

    - with engines that share experts: the experts of its column from other stages that another rank of its group needs
    - in a tied model of three or more stages, on the last one: its slice of the embedding, which goes to all others
    """
    layout, facts, the_plan, (_, fake) = case.layout, case.facts, case.plan(), run(case)
    unused = (padded_vocab(facts.vocab, layout.tensor) - facts.vocab) * facts.hidden * (1 if facts.tied else 2)
    shapes, places, held = hf_tensors(facts), layout.places(), case.pieces()
    needed = [{name for name in shapes if case.needs(rank, name)} for rank in case.ranks]
    for rank, place in enumerate(places):
        lacked = sum(math.prod(shapes[name]) for name in needed[rank])
        lacked -= sum(piece.numel for piece in held[rank] if piece.tensor in needed[rank])
        relayed = 0
        if facts.tied and layout.pipeline > 2 and place.pipeline == layout.pipeline - 1:
            relayed += sum(piece.numel for piece in held[rank] if piece.tensor == EMBEDDING)
        for source in range(layout.pipeline):
            for piece in held[source * layout.stage_ranks + rank % layout.stage_ranks]:
                if source != place.pipeline and piece.tensor not in needed[rank]:
                    group = [r for r in case.ranks if places[r].copy == place.copy and places[r].pipeline != source]
                    relayed += piece.numel * any(piece.tensor in needed[r] for r in group)
        assert fake.received[case.global_rank(rank)] == lacked + relayed
        assert 2 * sum(the_plan.received(rank).values()) == 2 * (lacked + relayed)
        assert fake.padding[case.global_rank(rank)] <= unused


def small(experts: int = 0, layers: int = 3, tied: bool = False) -> ModelFacts:
    sizes = {"hidden_size": 6, "intermediate_size": 12, "head_dim": 2, "num_hidden_layers": layers, "vocab_size": 9}
    moe = MOE | {"num_experts": experts, "moe_intermediate_size": 4} if experts else {}
    return facts_of(CONFIG | moe | sizes | {"tie_word_embeddings": tied}, "config.json")


@pytest.mark.parametrize("replica", [0, 2])
@pytest.mark.parametrize(("experts", "expert"), [(0, 1), (8, 1), (8, 2), (8, 4)])
def test_replicated_weights_and_experts_shared_alike_do_not_move(experts: int, expert: int, replica: int) -> None:
    case = Case(small(experts), Layout(expert=expert), engine=expert, replica=replica, replicas=3)
    _, fake = run(case)
    assert not any(fake.received.values()) and not any(fake.padding.values())
    assert [sum(case.plan().received(rank).values()) for rank in case.ranks] == [0] * len(case.ranks)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", [Layout(1, 2), Layout(1, 2, 2, stages=(1, 2, 1, 1)), Layout(1, 4, scheme="te")])
def test_without_tensor_parallelism_a_rank_receives_the_tensors_of_other_stages(layout: Layout, tied: bool) -> None:
    facts = small(layers=5, tied=tied)
    _, fake = run(Case(facts, layout))
    for stage in range(layout.pipeline):
        own = {f"model.layers.{layer}." for chunk in layout.chunk_layers(5, stage) for layer in chunk}
        own |= {FINAL_NORM, HEAD} if stage == layout.pipeline - 1 else set()
        own |= {EMBEDDING} if stage == 0 or (tied and layout.pipeline == 2) else set()
        others = [shape for name, shape in hf_tensors(facts).items() if not name.startswith(tuple(own))]
        assert fake.received[stage] == sum(map(math.prod, others))
        assert fake.padding[stage] == 0


@property_test
@given(cases())
def test_a_bucket_takes_one_call_per_group_and_hop_and_all_ranks_of_a_group_make_the_same_calls(case: Case) -> None:
    """The fake compares kinds and sizes of every call and checks that buffers are contiguous."""

    whole = case.plan()

    def by_bucket(fake: FakeDist, rank: int, stream: Any) -> list[list[Call]]:
        calls, per_bucket = fake.calls[case.global_rank(rank)], []
        for bucket in whole.buckets:
            before = len(calls)
            list(stream(dataclasses.replace(whole, buckets=(bucket,))))
            per_bucket.append(calls[before:])
        return per_bucket

    found, _ = run(case, by_bucket)
    by_group: dict[str, list[Call]] = {}
    for per_bucket in found:
        for calls in per_bucket:
            hops = [call.group.split()[0] for call in calls]
            assert hops == [hop for hop in ("stages", "tensor", "experts") if hop in hops]  # each at most once
        in_all = [call for calls in per_bucket for call in calls]
        for group in {call.group for call in in_all}:
            of_group = [call for call in in_all if call.group == group]
            assert of_group == by_group.setdefault(group, of_group), group


@property_test
@given(cases())
def test_buckets_are_bounded_and_hold_neighbours_of_one_stage_in_the_order_of_the_layers(case: Case) -> None:
    layout, the_plan = case.layout, case.plan()
    travelled = [(tensor.name, tensor.shape) for bucket in the_plan.buckets for tensor in bucket.tensors]
    shapes = hf_tensors(case.facts)
    assert sorted(travelled) == sorted(shapes.items())
    assert by_layer(name for name, _ in travelled) == by_layer(shapes)
    stage_of = {EMBEDDING: 0, FINAL_NORM: layout.pipeline - 1, HEAD: layout.pipeline - 1}
    for stage in range(layout.pipeline):
        for layer in (layer for chunk in layout.chunk_layers(case.facts.layers, stage) for layer in chunk):
            stage_of |= {name: stage for name in hf_tensors(case.facts) if name.startswith(f"model.layers.{layer}.")}
    for bucket in the_plan.buckets:
        assert {stage_of[tensor.name] for tensor in bucket.tensors} == {bucket.stage}
        size = DTYPE.itemsize * sum(tensor.numel for tensor in bucket.tensors)
        assert len(bucket.tensors) == 1 or size <= case.bucket


@settings(property_test, max_examples=12)  # the dearest: all ranks hold all that comes
@given(cases())
def test_no_tensor_is_reused_and_experts_are_fused_once_they_are_complete(case: Case) -> None:
    fuses = case.count > 0 and case.engine == 1

    def hold(fake: FakeDist, rank: int, stream: Any) -> list[tuple[str, Tensor]]:
        experts, held = FusedExperts(case.facts), []
        for name, value in experts.fuse(stream(allocate=experts.allocate)):
            assert torch.equal(value, want[name]), f"{name} is handed on too early"
            held.append((name, value))
        return held

    plain = wanted(case)
    want = fused(case, plain[0]) if fuses else {}
    found, _ = run(case, hold if fuses else None)
    for stream, unfused in zip(found, plain, strict=True):
        expected = want if fuses else unfused
        assert sorted(name for name, _ in stream) == sorted(expected)
        assert all(torch.equal(value, expected[name]) for name, value in stream)  # also after all others have come
        spans = sorted((value.data_ptr(), value.numel() * value.itemsize) for _, value in stream)
        assert all(begin + size <= after for (begin, size), (after, _) in itertools.pairwise(spans))


@property_test
@given(st.data())
def test_fused_experts_come_with_their_last_part_in_any_order_and_other_tensors_pass(data: st.DataObject) -> None:
    case = Case(small(4, layers=2), Layout())
    (hf,) = wanted(case)
    order = data.draw(st.permutations(list(hf)))
    experts, given_in, passed = FusedExperts(case.facts), [], {}

    def stream() -> Iterator[tuple[str, Tensor]]:
        for name in order:
            given_in.append(name)
            passed[name] = experts.allocate(name, tuple(hf[name].shape), DTYPE, torch.device("cpu")).copy_(hf[name])
            yield name, passed[name]

    want, count = fused(case, hf), 0
    for count, (name, value) in enumerate(experts.fuse(stream()), 1):  # noqa: B007
        assert torch.equal(value, want[name])
        if name in hf:
            assert value is passed[name] and given_in[-1] == name
        else:
            layer, kinds = name.split("experts.")[0], ("down",) if name.endswith("down_proj") else ("gate", "up")
            parts = {f"{layer}experts.{e}.{kind}_proj.weight" for e in range(4) for kind in kinds}
            assert parts <= set(given_in) and given_in[-1] in parts
    assert count == len(want)


def test_fused_experts_are_packed_as_transformers_packs_them(tmp_path: Path) -> None:
    make_checkpoint(tmp_path, "qwen3_moe")
    hf, facts = load_file(tmp_path / "model.safetensors"), read_facts(tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).state_dict()
    experts = FusedExperts(facts)
    stream = ((n, experts.allocate(n, tuple(v.shape), v.dtype, v.device).copy_(v)) for n, v in hf.items())
    found = dict(experts.fuse(stream))
    assert sum(name.endswith("experts.gate_up_proj") for name in found) == facts.layers
    assert all(torch.equal(value, packed[name]) for name, value in found.items())


@property_test
@given(cases())
def test_equal_inputs_have_equal_digests_and_other_bucket_sizes_and_experts_others(case: Case) -> None:
    assert case.plan().digest() == case.plan().digest()
    changes = [{"bucket": 1 if case.bucket > 1 else 1 << 20}]
    changes += [{"engine": 1 if case.engine > 1 else 2}] if case.count else []
    assert len({case.plan().digest(), *(case.plan(**change).digest() for change in changes)}) == 1 + len(changes)


def test_other_layouts_have_other_digests() -> None:
    some = [Layout(), Layout(2), Layout(1, 2), Layout(1, 2, 2), Layout(1, 2, stages=(1, 3)), Layout(1, 2, scheme="te")]
    some += [Layout(1, expert=2), Layout(1, expert=4), Layout(2, expert=2, expert_tensor=1), Layout(2, expert=2)]
    assert len({Case(small(8, layers=4), layout).plan().digest() for layout in some}) == len(some)


@pytest.mark.skipif(DATA is None, reason="A3PO_TEST_DATA does not name a folder with model configs")
@pytest.mark.parametrize(
    ("shape", "engine"),
    [
        *(((32, 1), 8), ((16, 2), 1)),
        *(pytest.param(*each, marks=pytest.mark.soak) for each in (((32, 1), 1), ((16, 2), 8))),
    ],
)
def test_every_tensor_of_a_published_model_is_in_one_bucket_of_its_plan(shape: tuple[int, int], engine: int) -> None:
    layout = Layout(4, 8, expert=shape[0], expert_tensor=shape[1], scheme="te")
    config = json.loads(Path(str(DATA), "model_configs", "Qwen3-235B-A22B.config.json").read_text())
    case = Case(facts_of(config, "config.json"), layout, engine, bucket=256 << 20)
    the_plan, shapes = case.plan(), hf_tensors(case.facts)
    travelled = [(tensor.name, tensor.shape) for bucket in the_plan.buckets for tensor in bucket.tensors]
    assert sorted(travelled) == sorted(shapes.items())
    assert by_layer(name for name, _ in travelled) == by_layer(shapes)
    for rank in (0, 13, len(case.ranks) - 1):
        assert {tensor.name for tensor in the_plan.tensors(rank)} == {
            tensor for tensor in shapes if case.needs(rank, tensor)
        }


def test_the_fake_names_ranks_that_call_different_collectives_or_none() -> None:
    fake, buffer = FakeDist(timeout=0.5), torch.ones(2)
    pair, others = (fake.new_group(name, [0, 1]) for name in ("pair", "others"))
    calls = [lambda: fake.all_gather([buffer, buffer], buffer, pair), lambda: fake.broadcast(buffer, 0, pair)]
    with pytest.raises(AssertionError, match="pair: rank . calls .*, rank . calls "):
        fake.run([0, 1], lambda rank: calls[rank]())
    with pytest.raises(TimeoutError, match="others: rank 1 calls broadcast, not all others came"):
        fake.run([0, 1], lambda rank: fake.broadcast(buffer, 0, others) if rank else None)
