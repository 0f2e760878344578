"""What was meant by an option that does not exist."""

from __future__ import annotations

import difflib

from .sbatch_options import KNOWN

# Other projects' words, without their section → ours.
SYNONYMS = {
    "learning_rate": "optimizer.lr",
    "grad_clip": "optimizer.clip_grad",
    "max_grad_norm": "optimizer.clip_grad",
    "lr_scheduler": "lr_schedule.name",
    "lr_scheduler_type": "lr_schedule.name",
    "warmup": "lr_schedule.warmup_steps",
    "adam_betas": "optimizer.betas",
    "num_steps": "trainer.steps",
    "max_steps": "trainer.steps",
    "total_steps": "trainer.steps",
    "epochs": "trainer.steps",
    "total_epochs": "trainer.steps",
    "batch_size": "trainer.prompts_per_step",
    "train_batch_size": "trainer.prompts_per_step",
    "rollout_batch_size": "trainer.prompts_per_step",
    "global_batch_size": "trainer.prompts_per_step",
    "group_size": "trainer.rollouts_per_prompt",
    "num_generations": "trainer.rollouts_per_prompt",
    "n_samples_per_prompt": "trainer.rollouts_per_prompt",
    "ppo_mini_batch_size": "trainer.mini_batch_prompts",
    "num_minibatches": "trainer.mini_batches",
    "micro_batch_size": "learner.micro_batch_tokens",
    "max_tokens_per_gpu": "learner.micro_batch_tokens",
    "tensor_model_parallel_size": "parallel.tensor",
    "tensor_parallel_size": "parallel.tensor",
    "tp": "parallel.tensor",
    "pipeline_model_parallel_size": "parallel.pipeline",
    "pp": "parallel.pipeline",
    "context_parallel_size": "parallel.context",
    "cp": "parallel.context",
    "expert_model_parallel_size": "parallel.expert",
    "ep": "parallel.expert",
    "sequence_parallel": "parallel.sequence",
    "max_new_tokens": "rollout.max_tokens",
    "max_response_length": "rollout.max_tokens",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "gpu_memory_utilization": "rollout.kv_cache_bytes",
    "max_num_seqs": "rollout.max_sequences",
    "clip_ratio_low": "objective.clip_low",
    "clip_ratio_high": "objective.clip_high",
    "eps_clip": "objective.clip_low",
    "eps_clip_high": "objective.clip_high",
    "save_interval": "checkpoint.every_steps",
    "save_freq": "checkpoint.every_steps",
    "model_name_or_path": "model.path",
    "hf_checkpoint": "model.path",
    "train_files": "data.path",
    "prompt_data": "data.path",
    "input_key": "data.problem_field",
    "label_key": "data.answer_field",
    "walltime": "slurm.time",
    "time_limit": "slurm.time",
    "num_nodes": "slurm.nodes",
    "gpus": "slurm.gpus_per_node",
    "num_gpus_per_node": "slurm.gpus_per_node",
}


def hint(option: str, known: list[str], sections: set[str]) -> str:
    """What to write instead of an unknown option, as the end of a message."""
    section, dot, _ = option.partition(".")
    last = option.rpartition(".")[2]
    if (directive := _sbatch(option if not dot else last, section, bool(dot))) is not None:
        return directive
    names = [name for name in known if name.rpartition(".")[2] == last]
    names = names or ([SYNONYMS[last]] if last in SYNONYMS else [])
    names = names or _near(option, last, known if dot else [*known, *sections])
    if names:
        return f"; did you mean {' or '.join(names)}?"
    inside = [name for name in known if name.startswith(f"{section}.")]
    return f"; {section} has {', '.join(inside)}" if inside else f"; the sections are {', '.join(sorted(sections))}"


def _near(option: str, last: str, known: list[str]) -> list[str]:
    """The option whose name is nearest, as a whole or without its section, if any is near."""
    whole = difflib.get_close_matches(option, known, n=1)
    lasts = {name.rpartition(".")[2]: name for name in reversed(known)}
    ends = difflib.get_close_matches(last, lasts, n=1, cutoff=0.8)
    if whole and ends:
        likeness = difflib.SequenceMatcher(None, option, whole[0]).ratio()
        return whole if likeness >= difflib.SequenceMatcher(None, last, ends[0]).ratio() else [lasts[ends[0]]]
    return whole or [lasts[end] for end in ends]


def _sbatch(name: str, section: str, dotted: bool) -> str | None:
    """Where an option of Slurm's goes that was written as one of the section slurm."""
    directive = name.replace("_", "-").lower()
    if directive not in KNOWN or (dotted and section != "slurm"):
        return None
    owner = KNOWN[directive].owner
    if owner.startswith("slurm."):
        return f"; did you mean {owner}?"
    if owner:
        return f"; --{directive} is set by {owner}"
    value = {"=": "=…", "?": "", "": ""}[KNOWN[directive].value]
    return f"; slurm.extra takes it: slurm.extra: ['--{directive}{value}']"
