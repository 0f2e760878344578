"""What a process is started as: its environment, signals and patches, then the loop of its role.

The order is the point, which is why imports stand within: what libraries read when they are imported is set before,
a signal that comes while they are imported is not lost, and patches are in place before anything imports Megatron or
vLLM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .launch import environment

if TYPE_CHECKING:
    Loop = Callable[[Any], None]
    Build = Callable[..., Any]


def start(folder: Path, loop: Loop, build: Build | None = None) -> None:
    """Runs a rank of the run in `folder`, with the loop of its role, and ends the process.

    build: what makes the loop's parts (parts.py), called as `parts.build` is, which is the default
    """
    environment.prepare()
    from .run.stop import INTERRUPT

    INTERRUPT.install()
    from . import compat

    compat.prepare()
    environment.report_failures(folder, functools.partial(_run, loop=loop, build=build))


def _run(folder: Path, loop: Loop, build: Build | None) -> None:
    from .config import load_resolved
    from .files.run_folder import RunFolder
    from .launch.folder import prepare_folder
    from .launch.hardware import find_hardware
    from .launch.shell import check_interfaces
    from .model.precision import check_hardware
    from .parts import build as build_learner
    from .ranks.groups import connect
    from .ranks.handoff import Handoff
    from .reward.graders import graders_of
    from .telemetry.catalogue import Phase
    from .telemetry.clock import CLOCK, phase
    from .telemetry.watchdog import Watchdog

    rank, world = environment.rank(), environment.world()
    if (note := Handoff.of().phase_fd) is not None:
        CLOCK.attach(note)
    settings = load_resolved(RunFolder(folder).config)
    # Held until the process ends.
    lock = None if environment.launched() or rank else prepare_folder(folder, settings)
    watchdog = Watchdog(folder, rank, world, settings.telemetry, CLOCK, environment.last_words)
    if environment.launched():
        watchdog.start()
    CLOCK.seconds[Phase.IMPORTS] = environment.since_start()
    check_hardware(settings.learner.precision, find_hardware())  # a job's launcher may be on another node, or outside
    check_interfaces()
    with graders_of(settings.reward, settings.grader_pool, settings.sandbox) as graders:
        with phase(Phase.GROUPS):
            parallel, engine = settings.parallel, settings.rollout.tensor
            ranks = connect(parallel, settings.cluster, engine, settings.trainer.seed, watchdog.meet)
        loop((build or build_learner)(folder, settings, ranks, graders, started=Handoff.of().started))
    del lock
