"""A run through nemo-run: the same ranks, the same folder, one srun task a rank and no torchrun in between.

    NEMO/bin/python launchers/nemo_run.py CONFIG --run-dir DIR [--set section.key=value]… [--dry-run] [--force]

nemo-run lives in an environment of its own, since its pins conflict with ours:

    python -m venv NEMO && NEMO/bin/pip install nemo-run==0.11.1 leptonai==0.27.3     (newer leptonai lacks a module)

This script runs there; what it knows of the run it has from `a3po submit --write`, called with --a3po-python (default:
.venv/bin/python beside this repository), which also runs the ranks. nemo-run asks Slurm's accounting for states: where
there is none, it cannot follow a job, and --detach is needed.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

sys.path = [entry for entry in sys.path if Path(entry).resolve() != Path(__file__).resolve().parent]
import nemo_run as run  # noqa: E402  this file bears the module's name, and must not be taken for it

ROOT = Path(__file__).resolve().parents[1]


def executor(slurm: dict[str, Any]) -> run.SlurmExecutor:
    """The `slurm` section of a configuration, as nemo-run's executor."""
    if isinstance(slurm["gpus_per_node"], str):
        sys.exit("error: slurm.gpus_per_node with a type is not passed on to nemo-run: give the number alone")
    ranks = slurm["tasks_per_node"]
    unknown = [name for name in ("spares", "extra") if slurm[name]]
    if unknown:
        sys.exit(f"error: slurm.{unknown[0]} is not passed on to nemo-run: take it back, or use `a3po submit`")
    memory = slurm["memory"] or ("0" if slurm["gpus_per_node"] else None)  # as launch/slurm.py
    if not slurm["account"]:
        sys.exit("error: slurm.account is not set: nemo-run names its jobs after it, and does not work without")
    return run.SlurmExecutor(
        account=slurm["account"],
        partition=slurm["partition"] or None,
        nodes=slurm["nodes"],
        ntasks_per_node=ranks,
        gpus_per_node=slurm["gpus_per_node"] or None,
        cpus_per_task=slurm["cpus_per_task"],
        time=slurm["time"],
        mem=memory,
        container_image=slurm["container"] or None,
        container_mounts=list(slurm["mounts"]),
        # Since 22.05 srun does not take the number of CPUs over from the job.
        env_vars=slurm["environment"] | {"SRUN_CPUS_PER_TASK": str(slurm["cpus_per_task"])},
        setup_lines="\n".join(slurm["setup"]) or None,
        # The ranks meet on the first node; RANK is SLURM_PROCID, which torchrun would shuffle.
        launcher=None,
        tunnel=run.LocalTunnel(job_dir=""),
        packager=run.Packager(),
        retries=slurm["attempts"],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--run-dir", type=Path, required=True)
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="overrides")
    parser.add_argument("--dry-run", action="store_true", help="print what nemo-run would submit")
    parser.add_argument("--detach", action="store_true", help="do not wait for the job")
    parser.add_argument("--force", action="store_true", help="also where the plan of memory says that it does not fit")
    parser.add_argument("--a3po-python", default=str(ROOT / ".venv/bin/python"))
    options = parser.parse_args()
    folder = options.run_dir.resolve()
    words = [options.a3po_python, "-m", "a3po_megatron", "submit", str(options.config), "--run-dir", str(folder)]
    words += ["--write", *(["--force"] if options.force else [])]
    made = subprocess.run([*words, *(w for o in options.overrides for w in ("--set", o))])
    if made.returncode:
        sys.exit(made.returncode)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    python = config["slurm"]["python"] or options.a3po_python
    meet = 'export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -1)'
    port = "export MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))"
    deaf = "trap '' USR1 TERM INT"  # until the rank can hear them
    ranks = f"{deaf}\n{meet}\n{port}\nexec {shlex.quote(python)} -m a3po_megatron.train {shlex.quote(str(folder))}\n"
    with run.Experiment(config["name"]) as experiment:
        experiment.add(run.Script(inline=ranks), executor=executor(config["slurm"]), name="train")
        experiment.dryrun() if options.dry_run else experiment.run(detach=options.detach, tail_logs=False)


if __name__ == "__main__":
    main()
