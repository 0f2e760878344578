"""`a3po train`: a run on this machine."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

from .arguments import Force, Overrides, RunDir, path_argument


def train(
    config: Annotated[Path, path_argument(help="A configuration file, such as configs/demo.yaml.")],
    run_dir: RunDir = None,
    set_: Overrides = None,
    force: Force = False,
) -> None:
    """Train on this machine, with as many ranks as the layout needs; with parallel.layout auto, on all of its GPUs."""
    started = time.time()
    from ..launch.signals import Signals

    signals = Signals()  # before the imports that take seconds
    from ..config import load_config

    wanted = load_config(config, set_ or [])
    from ..launch.check import check_machine, settle
    from ..launch.check_files import check_files
    from ..launch.folder import default_folder, prepare_folder
    from ..launch.hardware import gpu_here, gpus_here
    from ..launch.local import rendezvous, run_local
    from ..report.page import write_report

    rendezvous(wanted.cluster.port).close()  # a port that is taken is named before anything is made
    backend = check_machine(wanted)
    gpu = gpu_here(wanted)
    whole = wanted.parallel.layout == "auto" and gpu is not None
    settings = settle(wanted, backend, gpus_here() if whole else None, gpu)
    if not force and gpu is not None:
        from ..launch.plan import check_memory

        check_memory(wanted, settings, gpu)
    for remark in check_files(settings, backend, here=True):
        print(f"data: {remark}")
    folder = run_dir or default_folder(settings.name)
    with prepare_folder(folder, settings) as lock:
        print(f"{settings.name}: starting {settings.ranks} rank{'s' * (settings.ranks > 1)} (run folder {folder})")
        run_local(folder, settings, started, lock, signals)
        signals.restore()
        page = write_report([folder], None)
    print(f"run folder: {folder}\nreport:     {page}")
