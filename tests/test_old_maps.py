"""The families' tables give the very maps that stood here before them: kept for one commit, as their oracle."""

from __future__ import annotations

import itertools

from hypothesis import given, settings

from a3po_megatron.convert.stored import stored_objects, stored_parameters, stored_shapes
from a3po_megatron.model.cut import EngineRank, cut, hf_tensors, pieces
from a3po_megatron.model.facts import ModelFacts
from a3po_megatron.model.layout import Layout
from tests.old_maps import engine_layout, layout, stored
from tests.test_layout import layouts


def plain(piece: object) -> tuple[object, ...]:
    names = ("tensor", "shape", "chunk", "parameter", "dim", "start", "offset", "length", "owner", "numel", "key")
    return tuple(getattr(piece, name) for name in names)


@settings(deadline=None, max_examples=300)
@given(layouts())
def test_the_tables_give_the_maps_that_were(case: tuple[ModelFacts, Layout]) -> None:
    facts, ours = case
    before = layout.Layout(**vars(ours))
    assert list(hf_tensors(facts).items()) == list(layout.hf_tensors(facts).items())
    for place, old in zip(ours.places(), before.places(), strict=True):
        assert [plain(p) for p in pieces(facts, ours, place)] == [plain(p) for p in layout.pieces(facts, before, old)]
    count = facts.experts.count if facts.experts else 0
    for tensor, apart in itertools.product((1, 2), (False, True)):
        for rank in range(tensor):
            held = (rank * count // tensor, (rank + 1) * count // tensor) if apart else (0, count)
            found = cut(facts, EngineRank(tensor, rank, held))
            assert [plain(p) for p in found] == [
                plain(p) for p in engine_layout.engine_pieces(facts, tensor, rank, held)
            ]
    parameters, were = stored_parameters(facts), stored.stored_parameters(facts)
    assert [(p.key, p.lead, p.shape, [vars(s) for s in p.spans]) for p in parameters] == [
        (p.key, p.lead, p.shape, [vars(s) for s in p.spans]) for p in were
    ]
    assert stored_shapes(facts, parameters) == stored.stored_shapes(facts, were)
    assert stored_objects(facts, parameters) == stored.stored_objects(facts, were)
