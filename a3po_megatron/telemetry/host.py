"""How much memory of this host a process may still take: of the machine, and of the control groups that it is in.

Slurm jobs, containers and login nodes limit memory by control groups: what is free on the machine says nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def available_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be allocated without anything being killed; pages of files that can be dropped count as free."""
    meminfo = dict(line.split(":") for line in (root / "proc/meminfo").read_text().splitlines())
    return min([int(meminfo["MemAvailable"].split()[0]) * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[int]:
    for line in (root / "proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory"):
            names = V1 if controllers else V2
            top = root / "sys/fs/cgroup" / controllers
            group = top / path.lstrip("/")
            for folder in [group, *group.parents]:
                if folder.is_relative_to(top):
                    yield from _left_in(folder, *names)


V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
V2 = ("memory.max", "memory.current", "inactive_file")


def _left_in(folder: Path, limit: str, usage: str, droppable: str) -> Iterator[int]:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:  # the topmost group of v2 has none of these; a container does not see the groups above its own
        return
    if most != "max":
        yield max(0, int(most) - used + int(stat.get(droppable, 0)))
