"""Tables for a person at a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from ..convert.verify import Verified
    from ..evaluate.compare import Comparison
    from ..evaluate.result import Estimate, Result


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


def comparison_tables(comparison: Comparison, names: tuple[str, str], shown: int) -> Iterator[Table]:
    """Yields tables that say which of two models is better, and on which problems; at most `shown` of these."""
    from rich.markup import escape
    from rich.table import Table

    gap, better = comparison.difference, sum(pair.difference > 0 for pair in comparison.changed)
    table = Table(
        title=escape(f"{comparison.version}: {gap.problems} problems"), show_header=False, title_justify="left"
    )
    table.add_column("what")
    table.add_column("value", justify="right")
    table.add_column("meaning", overflow="fold")
    table.add_row("A", f"{comparison.first:.2%}", escape(f"avg@{comparison.n} of {names[0]}"))
    table.add_row("B", f"{comparison.second:.2%}", escape(f"avg@{comparison.n} of {names[1]}"))
    low, high = 100 * gap.low, 100 * gap.high
    within = f"points (of 100); 95 % interval {low:+.2f} to {high:+.2f} (paired bootstrap)"
    table.add_row("B - A", f"{100 * gap.value:+.2f}", within)
    table.add_row("p", f"{comparison.p:.2g}", "how often two equal models are as far apart (paired permutation test)")
    worse = len(comparison.changed) - better
    table.add_row("changed", str(len(comparison.changed)), f"problems: B is better on {better}, worse on {worse}")
    if comparison.left_out:
        table.add_row("left out", str(comparison.left_out), "problems without a valid sample in A or in B")
    yield table
    if comparison.changed and shown:
        table = Table("problem")
        for name in ("A", "B", "B - A"):
            table.add_column(name, justify="right")
        for pair in comparison.changed[:shown]:
            counts = (f"{right}/{valid}" for right, valid in (pair.first, pair.second))
            table.add_row(escape(pair.id), *counts, f"{100 * pair.difference:+.1f}")
        if len(comparison.changed) > shown:
            table.add_row(f"… and {len(comparison.changed) - shown} more (--changed lists more)", "", "", "")
        yield table


def result_table(result: Result) -> Table:
    """Returns what an evaluation came to: means over problems, in percent, with their 95 % intervals."""
    from rich.markup import escape
    from rich.table import Table

    summary, n = result.summary, result.protocol["n"]
    title = f"{result.version}: {result.file.problems} problems, {n} sample{'s' * (n > 1)} each"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("number")
    table.add_column("value", justify="right")
    table.add_column("95 % interval, or what it is")

    def add(name: str, estimate: Estimate | None) -> None:
        if estimate is not None:
            low, high = 100 * estimate.low, 100 * estimate.high
            table.add_row(name, f"{100 * estimate.value:.1f}", f"{low:.1f} to {high:.1f} (bootstrap over problems)")

    add(f"avg@{n}", summary.avg)
    for k, estimate in summary.pass_at.items():
        if k > 1:
            add(f"pass@{k}", estimate)
    if n > 1:
        add(f"majority@{n}", summary.majority)
    table.add_section()
    table.add_row("length", f"{summary.length_mean:.0f}", "tokens of a response, in the mean")
    table.add_row("cut off", f"{100 * summary.truncated_rate:.1f}", "% of responses, at max_tokens")
    table.add_row("invalid", str(summary.invalid), "responses whose grading failed: left out above")
    table.add_row("speed", f"{summary.tokens_per_second:.0f}", f"tokens/s, over {summary.seconds:.0f} s")
    return table


def runs(numbers: list[int]) -> str:
    """0–3, 8–11"""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}–{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
