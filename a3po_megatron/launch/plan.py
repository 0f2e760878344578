"""A run's memory before it is submitted: what `a3po plan` shows, and what `submit` and `train` refuse by."""

from __future__ import annotations

from pathlib import Path

from ..config import Config, Settings
from ..errors import RequestError
from ..model.read import read_facts
from ..preflight.gpus import Gpu, planned_gpu
from ..preflight.plan import Plan, plan_of
from ..preflight.verdict import Verdict
from ..ranks.backend import backend_of
from .check import settle
from .hardware import gpus_here
from .slurm import settled

MODELS = Path(__file__).resolve().parents[2] / "configs/models"  # config.json files of models, by their names
NODE_GPUS = 8


def on_gpus(config: Config, gpus: int | None, gpu: str | None) -> Config:
    """The same run on so many GPUs of such a kind, on whole nodes where they are many. Raises RequestError."""
    if gpus is None and gpu is None:
        return config
    slurm, cluster = config.slurm, config.cluster
    if gpus is not None:
        if gpus < 1:
            raise RequestError(f"--gpus {gpus}: a run has at least one GPU")
        node = min(gpus, slurm.gpus() or NODE_GPUS)
        if gpus % node:
            raise RequestError(f"--gpus {gpus} is no multiple of the {node} GPUs of a node (slurm.gpus_per_node)")
        slurm = slurm.model_copy(update={"nodes": gpus // node, "gpus_per_node": node, "tasks_per_node": None})
    elif not slurm.gpus():
        slurm = slurm.model_copy(update={"gpus_per_node": NODE_GPUS, "tasks_per_node": None})
    named = {"gpu": gpu} if gpu is not None else {}
    cluster = cluster.model_copy(update={"device": "cuda", **named})
    return config.model_copy(update={"slurm": slurm, "cluster": cluster})


def with_known_model(config: Config) -> tuple[Config, str]:
    """The same with the config.json of that name from configs/models, where the model's folder is not there yet; and
    what there is to say about that."""
    folder = Path(config.model.path)
    known = MODELS / folder.name
    if folder.is_dir() or not known.is_dir():
        return config, ""
    model = config.model.model_copy(update={"path": str(known)})
    return config.model_copy(update={"model": model}), f"{folder} is not there: planned with {known / 'config.json'}"


def plan(config: Config, nodes_fixed: bool = False) -> Plan:
    """`nodes_fixed`: more nodes are no change that would help. Raises RequestError where such a run cannot be, whatever
    memory it has."""
    job = "slurm" in config.model_fields_set or config.cluster.device == "cuda"
    device = config.cluster.device or ("cuda" if job and config.slurm.gpus_per_node else "cpu")

    def settled_run(changed: Config) -> Settings:
        return settled(changed) if job else settle(changed, backend_of(device))

    settings = settled_run(config)
    gpu = planned_gpu(config) if device == "cuda" else None
    return plan_of(config, settings, read_facts(config.model.path), gpu, settled_run, nodes_fixed)


def check_memory(config: Config, settings: Settings, here: Gpu | None = None) -> None:
    """Raises RequestError where a run on GPUs does not fit. `here`: this machine's; None: a job's."""
    if settings.cluster.device == "cpu":
        return
    backend = backend_of(settings.cluster.device)
    gpus = gpus_here() if here else 0

    def settled_run(changed: Config) -> Settings:
        if here is None:
            return settled(changed)
        found = settle(changed, backend, gpus if changed.parallel.layout == "auto" else None, here)
        if found.ranks > gpus:
            raise RequestError(f"the layout has {found.ranks} ranks, and this machine {gpus} GPUs")
        return found

    gpu, facts = here or planned_gpu(config), read_facts(config.model.path)
    found = plan_of(config, settings, facts, gpu, settled_run, nodes_fixed=here is not None)
    if found.verdict == Verdict.NO:
        raise RequestError(f"{found.refusal(settings.name)}. a3po plan shows all of it; --force tries it all the same")
