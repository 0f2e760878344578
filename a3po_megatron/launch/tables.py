"""Tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..convert.verify import Verified


def layout_tables(found: Verified) -> Iterator[Table]:
    """Where the bytes go, for a person."""
    from rich.table import Table

    layout = found.layout
    table = Table(title="one replica")
    for name in ("rank", "pipeline", "tensor", "expert", "layers", "bytes held", "answers for", "padding"):
        table.add_column(name, justify="left" if name == "layers" else "right")

    def row(rank: str, where: Sequence[int], layers: str, sizes: Sequence[int]) -> None:
        table.add_row(rank, *map(str, where), layers, *(f"{size:,}" for size in sizes))

    for rank, share in enumerate(found.ranks):
        where = (share.place.pipeline, share.place.tensor, share.place.expert)
        row(str(rank), where, runs(share.layers), (share.held, share.owned, share.padding))
    table.add_section()
    sums = [sum(sizes) for sizes in zip(*((s.held, s.owned, s.padding) for s in found.ranks), strict=True)]
    row("all", (layout.pipeline, layout.tensor, layout.expert), "", sums)
    yield table
    if found.shown:
        table = Table(title=found.shown[0][1].tensor)
        table.add_column("rank", justify="right")
        table.add_column("parameter", overflow="fold")
        for name in ("its …", "hold the tensor's", "owner"):
            table.add_column(name)
        for rank, piece in found.shown:
            axis = "rows" if piece.dim == 0 else "columns"
            here = f"{axis} {piece.offset}–{piece.offset + piece.length - 1}"
            there = f"{axis} {piece.start}–{piece.start + piece.length - 1}"
            parameter = piece.parameter if layout.virtual == 1 else f"chunk {piece.chunk}: {piece.parameter}"
            table.add_row(str(rank), parameter, here, there, "yes" if piece.owner else "")
        yield table


def runs(numbers: list[int]) -> str:
    """0–3, 8–11"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
