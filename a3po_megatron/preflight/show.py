"""A plan as a table, and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .flops import training_flops
from .memory import PARTS, Phase, elements_of
from .overhead import GIB, MIB, gib
from .plan import Plan


def as_tree(plan: Plan) -> dict[str, Any]:
    """Everything, in bytes."""
    settings, memory = plan.settings, plan.memory
    return {
        "verdict": str(plan.verdict),
        "parameters": parameters(plan),
        "flops_of_a_token": flops_of_a_token(plan),
        "ranks": settings.ranks,
        "device": settings.cluster.device,
        "capacity": plan.capacity,
        "phases": {
            str(phase): {
                "verdict": str(plan.verdicts[phase]),
                "total": memory.total(phase),
                "parts": {name: size for name, size in memory.phases[phase].items() if size},
            }
            for phase in Phase
        },
        "host": {
            "verdict": str(plan.host),
            "capacity": plan.node,
            "total": sum(memory.host.values()),
            "parts": dict(memory.host),
        },
        "layout": settings.parallel.model_dump(mode="json"),
        "sizes": {option: {"value": _value(plan, option), "why": why} for option, why in settings.reasons.items()},
        "changes": [{"set": list(change.overrides), "verdict": str(change.verdict)} for change in plan.changes],
    }


def _value(plan: Plan, option: str) -> Any:
    section, _, name = option.partition(".")
    return getattr(getattr(plan.settings, section), name)


def parameters(plan: Plan) -> int:
    """Returns how many the model has; a tied head counts once."""
    return sum(elements_of(plan.facts))


def flops_of_a_token(plan: Plan) -> float:
    """Returns what training on one token of the longest sample takes, forward and backward."""
    longest = plan.settings.rollout.longest
    return training_flops(plan.facts, [longest]) / longest


def as_text(plan: Plan, explain: bool = False) -> str:
    """A table of phases, GiB of the fullest rank; the node's memory; the sizes that were filled in."""
    settings, memory, phases = plan.settings, plan.memory, list(Phase)
    parts = [part for part in PARTS if any(memory.phases[phase][part] for phase in phases)]
    width = max(map(len, [*parts, "of the device"]))
    lines = [_title(plan), ""]
    lines.append(" " * width + "".join(f"{phase:>14}" for phase in phases))
    for part in parts:
        lines.append(f"{part:<{width}}" + "".join(f"{_cell(memory.phases[phase][part]):>14}" for phase in phases))
    lines.append(f"{'together':<{width}}" + "".join(f"{_cell(memory.total(phase)):>14}" for phase in phases))
    if plan.capacity:
        shares = (f"{memory.total(phase) / plan.capacity:.0%}" for phase in phases)
        lines.append(f"{'of the device':<{width}}" + "".join(f"{share:>14}" for share in shares))
        lines.append(f"{'':<{width}}" + "".join(f"{plan.verdicts[phase]:>14}" for phase in phases))
        needed = ", ".join(f"{name} {_cell(size)}" for name, size in memory.host.items() if size)
        host = f"{gib(sum(memory.host.values()))} of {gib(plan.node)} ({plan.host})"
        lines += ["", f"a node's memory: {host}: {needed}"]
    if settings.reasons:
        lines += ["", "filled in:"]
        lines += [f"  {option}: {_value(plan, option)}    {why}" for option, why in settings.reasons.items()]
    if explain:
        lines += ["", "by these formulas (a3po_megatron/preflight/):"]
        lines += [f"  {part:<{width}}  {PARTS[part]}" for part in parts]
    return "\n".join(lines)


def _title(plan: Plan) -> str:
    settings, parallel = plan.settings, plan.settings.parallel
    where = f"{gib(plan.capacity)} each" if plan.capacity else "on a CPU, of which nothing is asked"
    layout = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "data": parallel.data,
    }
    words = " × ".join(f"{name} {size}" for name, size in layout.items() if size > 1) or "one"
    engines = f"{settings.rollout.data} engines of {settings.rollout.tensor}"
    return (
        f"{settings.name}: {plan.verdict}. {settings.ranks} ranks ({words}; {engines}), {where}\n"
        f"{parameters(plan):,} parameters; {flops_of_a_token(plan) / 1e9:.1f} GFLOP a token of the longest sample. "
        "GiB of the fullest rank:"
    )


def _cell(size: float) -> str:
    return "-" if not size else f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / MIB:.1f} MiB"


def build_text(built: Mapping[str, Any]) -> str:
    """What --build found."""
    lines = ["", f"rank {built['rank']} of {built['world']}, built on the meta device:"]
    for name in ("weights", "gradients", "optimizer"):
        planned, real = built[name]["planned"], built[name]["built"]
        said = "as planned" if planned == real else f"but {planned} were planned"
        lines.append(
            f"  {name:<10} {planned} bytes planned; to build it takes Transformer Engine, which needs a GPU"
            if real is None
            else f"  {name:<10} {real} bytes, {said}"
        )
    publish = built["publish"]
    same = "one plan" if len(publish["digests"]) == 1 else f"{len(publish['digests'])} plans, by their engines' experts"
    lines.append(f"  publish    {publish['replicas']} replicas, {same}: {', '.join(publish['digests'])}")
    lines += ["", f"{'of a step, at most':<22}{'':<28}{'ranks':>7}{'times':>8}{'GiB each':>11}{'GiB':>12}"]
    for each in built["collectives"]:
        size, times = each["bytes"] / GIB, each["times"]
        lines.append(
            f"{each['what']:<22}{each['kind']:<28}{each['ranks']:>7}{times:>8}{size:>11.4f}{size * times:>12.1f}"
        )
    head = f"{'ranks':>7}{'optimizer, GiB':>17}{'most, GiB':>12}{'ranks of a gradient':>22}{'words of a decision':>22}"
    lines += ["", "the same layout with more data-parallel ranks:", head]
    for row in built["growth"]:
        lines.append(
            f"{row['ranks']:>7}{row['optimizer'] / GIB:>17.2f}{row['most'] / GIB:>12.1f}"
            f"{row['gradient_ranks']:>22}{row['decision']:>22}"
        )
    return "\n".join(lines)
