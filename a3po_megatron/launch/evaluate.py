"""An evaluation, from the command to its ranks: what is asked of which weights, with what engine, in which folder.

    RUN/evaluations/step-000012/        of a run's checkpoint
    evaluations/NAME-1a2b3c4d/          in the current directory, of other weights; the digits are of their path
        BENCHMARK.json                  the results, where --json names no other file
        config.yaml  request.json  logs/  partial/

The folder follows from what is evaluated, so that the same command resumes one that was killed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from blake3 import blake3

from ..config import ARITHMETIC, Config, ParallelOptions, Settings, config_of_model, load_config
from ..convert.convert import newest_checkpoint
from ..data.tokenizer import Tokenizer
from ..errors import RequestError
from ..evaluate.ask import Wishes, ask
from ..evaluate.request import Asked, Request, Source, graders_in, write_request
from ..files.lock import hold
from ..files.run_folder import RunFolder, step_folder, step_of
from ..files.side_files import HF
from ..model.facts import ModelFacts
from ..model.read import read_facts
from ..ranks.backend import Backend
from ..ranks.topology import topology_of
from ..reward.graders import chosen
from ..reward.sandbox.choose import check_sandbox
from ..run.folder import save_resolved
from .check import settle

PROGRAM = ("-m", "a3po_megatron.serve")
PROGRAM_SECONDS = 180.0  # that all tests of one response may take, at least
SEQUENCES = 256  # at once, of which the cache holds as many as it does
LEAST_CACHE = 256 << 20
LONGEST = 8  # sequences of full length that the engine's cache has room for, at least


def source_of(path: Path) -> tuple[Source, Path]:
    """Returns what a path names, and the folder in which its evaluations lie.

    Raises RequestError for what is neither an HF folder, nor a Megatron checkpoint, nor a run with a checkpoint.
    """
    if (path / "config.json").is_file():
        return Source(str(path), "hf", None, str(path)), _beside(path)
    checkpoint = newest_checkpoint(path)
    if not (checkpoint / "metadata.json").is_file():
        raise RequestError(f"{path}: neither an HF folder (config.json), nor a Megatron checkpoint, nor a run")
    run = RunFolder(checkpoint.parents[1])
    if checkpoint.parent == run.checkpoints and run.config.is_file():
        step = step_of(checkpoint)
        return Source(str(run.path), "run", step, str(checkpoint)), step_folder(run.evaluations, step)
    return Source(str(path), "checkpoint", None, str(checkpoint)), _beside(path)


def _beside(path: Path) -> Path:
    whole = path.resolve()
    return Path("evaluations") / f"{whole.name}-{blake3(str(whole).encode()).hexdigest()[:8]}"


def config_of(source: Source, config: Path | None, overrides: Sequence[str]) -> Config:
    """Returns the configuration that the weights are asked under: the run's, that of a file, else the defaults."""
    folder = model_folder(source)
    if config is not None and source.kind == "run":
        raise RequestError(f"--config {config}: {source.path} is a run, which has its own configuration")
    model = f"model.path={folder.resolve()}"
    if source.kind == "run":  # of which nothing is trained on: its prompts may be on another machine
        return load_config(RunFolder(Path(source.path)).config, [model, f"data.path={ARITHMETIC}", *overrides])
    if config is None:
        return config_of_model(str(folder.resolve()), overrides)
    return load_config(config, [model, *overrides])


def model_folder(source: Source) -> Path:
    """Returns the folder with the model's configuration and tokenizer."""
    return Path(source.weights) if source.kind == "hf" else Path(source.weights) / HF


def plan_evaluation(
    source: Source,
    config: Config,
    backend: Backend,
    wishes: Wishes,
    result: Callable[[str], Path],
    remark: Callable[[str], None],
) -> tuple[Settings, Request]:
    """Returns what the ranks do and are asked. Raises RequestError for whatever cannot work."""
    folder = model_folder(source)
    facts = read_facts(folder)
    asked = ask(wishes, config, folder, facts, result, remark)
    tokenizer = Tokenizer.of(config.data.model_copy(update={"template": "raw"}), folder, facts.vocab, facts.eos)
    prompt = max(max(tokenizer.counts_of(each.prompts)) for each in asked)
    for each in asked:
        _check_length(each, prompt, facts)
    response = max(each.sampling.max_tokens for each in asked)
    heads = -(-facts.kv_heads // config.rollout.tensor)  # of each rank; whether they can be cut so, `settle` says
    per_token = 2 * facts.layers * heads * facts.head_dim * 4
    rollout = {
        "max_sequences": config.rollout.max_sequences or SEQUENCES,
        "max_tokens": response,
        "max_prompt_tokens": prompt,
        "kv_cache_bytes": max(config.rollout.kv_cache_bytes or LEAST_CACHE, LONGEST * per_token * (prompt + response)),
    }
    pool = config.grader_pool
    if "code" in graders_in(asked):
        check_sandbox(chosen(config.sandbox))
        pool = pool.model_copy(update={"timeout_seconds": max(pool.timeout_seconds, PROGRAM_SECONDS)})
    world = topology_of(config.parallel, config.rollout.tensor).world
    changed = config.model_copy(
        update={
            "parallel": ParallelOptions(data=min(world, backend.visible() or world)),  # nothing is cut but engines
            "rollout": config.rollout.model_copy(update=rollout | {"data": None}),
            "grader_pool": pool,
            "reward": config.reward.model_copy(update={"overlong_tokens": 0}),
        }
    )
    return settle(changed, backend), Request(source, tuple(asked))


def _check_length(asked: Asked, prompt: int, facts: ModelFacts) -> None:
    wanted = asked.sampling.max_tokens
    if prompt + wanted > facts.max_positions:
        raise RequestError(
            f"{asked.benchmark} wants responses of up to {wanted} tokens, which with the longest prompt of {prompt} is "
            f"more than the model's context of {facts.max_positions}: --max-tokens "
            f"{max(1, facts.max_positions - prompt)} asks for shorter ones, which is another version of the benchmark"
        )


def wishes_of(config: Config, benchmarks: str, wishes: Wishes | None = None) -> Wishes:
    """Returns what is wished for on a command line, and where it says nothing what the configuration does."""
    own, command = config.evaluation, wishes or Wishes(())
    return Wishes(
        tuple(filter(None, (name.strip() for name in benchmarks.split(",")))),
        command.data or (Path(own.data) if own.data else None),
        command.samples if command.samples is not None else own.samples or None,
        command.max_tokens or own.max_tokens or None,
        command.release or own.release,
        command.window or own.window,
        command.seed,
    )


def check_benchmarks(config: Config, benchmarks: str) -> list[str]:
    """Returns remarks on what a run will be evaluated on when it is done. Raises RequestError where it cannot be."""
    remarks: list[str] = []
    facts = read_facts(config.model.path)
    ask(wishes_of(config, benchmarks), config, Path(config.model.path), facts, Path, remarks.append)
    return remarks


def make_evaluation(folder: Path, settings: Settings, request: Request) -> IO[str]:
    """Makes the folder ready for the ranks, and returns its lock."""
    run = RunFolder(folder)
    try:
        run.logs.mkdir(parents=True, exist_ok=True)
        for asked in request.asked:
            Path(asked.result).parent.mkdir(parents=True, exist_ok=True)
        lock = hold(folder, advice="wait for it")
        save_resolved(settings, run.config)
        write_request(folder, request)
    except OSError as error:
        raise RequestError(f"{error.filename or folder}: cannot make the folder ready: {error.strerror}") from error
    return lock
