"""The one assembly of a run: what there is, who gets whom. For the loop, tests and benchmarks."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .algorithm.advantage import assemble
from .algorithm.correction import mask_far, mask_truncated
from .algorithm.fork_tokens import keep_forks
from .algorithm.objectives.registry import objective_of
from .algorithm.process import add_process
from .algorithm.regulariser import Regularised, Regulariser
from .algorithm.restraint import restrain
from .algorithm.shaping import shape
from .algorithm.token_loss import Objective
from .batch import Batch, Collected
from .config import ForkTokens, Settings
from .data.prompts import Prompts
from .data.tokenizer import Tokenizer
from .evaluate.request import graders_in
from .evaluate.sampling import Evaluation
from .evaluate.training import WhileTraining, asked_of_run, engine_length
from .files.run_folder import RunFolder, step_of
from .files.writer import AtOnce, BesideRun
from .learner.learner import Learner
from .model.build import DTYPES
from .model.facts import ModelFacts
from .model.read import read_facts
from .preflight.memory import predicted_bytes
from .ranks.groups import Ranks
from .residency import Residency
from .reward.graders import chosen
from .reward.sandbox.choose import check_sandbox
from .rollout.balance import Balance
from .rollout.engine import local_experts
from .rollout.intake import Intake
from .rollout.sample import Graders, Sampler
from .rollout.vllm_engine import VllmEngine
from .run.checkpoints import Checkpoints, resumed_from
from .run.found import find
from .run.journal import Journal
from .run.manifest import Stateful, identity
from .run.recorder import Recorder
from .run.rejected import Rejected
from .run.scores import Scores
from .run.stop import INTERRUPT, Interrupt, Stop
from .schedule.balance import attention_scale
from .telemetry.catalogue import Phase, evaluation_metrics
from .telemetry.clock import phase
from .telemetry.profile import Profile
from .weights.publish import Publish, Publisher


@dataclass(frozen=True)
class Parts:
    settings: Settings
    ranks: Ranks
    facts: ModelFacts
    tokenizer: Tokenizer
    prompts: Prompts
    engine: VllmEngine
    learner: Learner
    residency: Residency
    journal: Journal
    intake: Intake
    assemble: Callable[[Collected], Batch]
    scores: Scores
    shape: Callable[[Batch, int], Batch]
    objective: Objective
    publish: Publish
    evaluate: Callable[[int], dict[str, float | None]]
    recorder: Recorder
    profile: Profile
    checkpoints: Checkpoints
    stop: Stop


def build(
    folder: Path,
    settings: Settings,
    ranks: Ranks,
    graders: Graders,
    *,
    started: float | None = None,  # when the command was given, seconds since the epoch; None: now
    interrupt: Interrupt = INTERRUPT,
    engine_of: type[VllmEngine] = VllmEngine,
    learner_of: type[Learner] = Learner,
) -> Parts:
    """Builds the parts of the run in `folder`, resumed from its newest checkpoint if there is one. Collective.

    Raises Interrupted where all ranks agreed to stop meanwhile.
    """
    started = time.time() if started is None else started
    place, model = RunFolder(folder), Path(settings.model.path)
    dtype = DTYPES[settings.model.dtype]
    stop = Stop(ranks, interrupt)
    facts = read_facts(model)
    tokenizer = Tokenizer.of(settings.data, model, facts.vocab, facts.eos)
    prompts = Prompts(settings.data, tokenizer, settings.trainer.seed, settings.rollout.max_prompt_tokens)
    asked = asked_of_run(settings, facts, lambda text: None)  # a launcher has said what there is to say
    if "code" in {*prompts.graders, *graders_in(asked)}:
        check_sandbox(chosen(settings.sandbox))  # on this machine, which the launcher's need not be
    length = engine_length(settings, asked, tokenizer.counts_of)
    # The engine first: it wants an empty device, and building it disturbs process-wide state.
    with phase(Phase.ENGINE):
        engine = engine_of(model, facts, tokenizer.stops, settings.rollout, dtype, ranks.backend, length)
    stop.while_starting(folder)
    checkpoint = resumed_from(folder, ranks)
    with phase(Phase.MODEL):
        learner = learner_of(ranks, facts, settings, checkpoint)
    stop.while_starting(folder)
    writer = BesideRun()  # of everything that a step writes
    first_step = 0 if checkpoint is None else step_of(checkpoint)
    before = find(place.journal, ranks, first_step)
    journal = Journal(
        place.journal, ranks.rank, identity(settings), before, writer, settings.checkpoint.replay == "all"
    )
    sampler = Sampler(
        ranks,
        tokenizer,
        settings.trainer,
        settings.rollout,
        settings.reward,
        journal,
        interrupt,
        engine,
        prompts,
        graders,
    )
    intake = Intake(sampler, settings.process)
    regulariser = Regulariser(
        settings.regulariser,
        settings.advantage,
        ranks.sum_over_data,
        ranks.gather_over_data,
        ranks.coordinates.data,
    )
    adapts: dict[str, Stateful] = {"regulariser": regulariser} if settings.regulariser.entropy_target else {}
    rejected = Rejected(ranks, place.rejected, settings.trainer.max_rejected_updates, writer)
    further = evaluation_metrics([each.benchmark for each in asked])
    balance = Balance(ranks, prompts.at, attention_scale(facts))
    recorder = Recorder(
        folder,
        settings,
        ranks,
        tokenizer,
        rejected,
        prompts.way_of,
        writer,
        started,
        first_step,
        further,
        balance.home,
        predicted_bytes(facts, settings),
    )
    evaluation = functools.partial(
        Evaluation,
        ranks,
        engine,
        tokenizer,
        graders,
        interrupt,
        max_sequences=settings.rollout.max_sequences,
        writer=writer,
    )
    numerics = [str(dtype), settings.rollout.quantization]
    evaluating = WhileTraining(folder, settings.evaluation, asked, evaluation, numerics, recorder.say, writer)
    publisher = _publisher(settings, ranks, facts, learner, prompts)
    publish = Publish(publisher, learner, engine, journal, model, dtype, place.witness, recorder.say)
    checkpoints = Checkpoints(
        folder,
        settings,
        ranks,
        prompts,
        tokenizer,
        learner,
        intake,
        publisher,
        {"rejected": rejected, **adapts},
        recorder,
        journal,
        stop,
        publish.export,
        writer,
        evaluating.best,
        checkpoint,
    )

    def assembled(collected: Collected) -> Batch:
        batch = assemble(collected, settings.advantage, settings.trainer.updates(len(collected.accepted)))
        batch = mask_truncated(batch) if settings.trainer.mask_truncated else batch
        return balance(add_process(batch, settings.process, settings.advantage, tokenizer.begins))

    def shaped(batch: Batch, step: int) -> Batch:
        batch = regulariser(mask_far(batch, settings.correction))
        if isinstance(settings.shaping, ForkTokens):
            batch = keep_forks(batch, settings.shaping, ranks.sum_over_data)
        return restrain(shape(batch, step, settings.shaping), settings.shaping, ranks.sum_over_data)

    def evaluate(step: int) -> dict[str, float | None]:
        return evaluating(step, journal.weights)

    interrupt.limit(settings.checkpoint.time_limit_seconds, max(0.0, time.time() - started))
    return Parts(
        settings=settings,
        ranks=ranks,
        facts=facts,
        tokenizer=tokenizer,
        prompts=prompts,
        engine=engine,
        learner=learner,
        residency=Residency(engine, learner.arena, ranks.backend, settings.learner.offload),
        journal=journal,
        intake=intake,
        assemble=assembled,
        scores=Scores(ranks, journal, rejected, learner.score_kinds),
        shape=shaped,
        objective=Regularised(objective_of(settings.objective, settings.correction)),
        publish=publish,
        evaluate=evaluate,
        recorder=recorder,
        profile=Profile(place.profile, settings.telemetry, ranks.rank, writer),
        checkpoints=checkpoints,
        stop=stop,
    )


@dataclass(frozen=True)
class Serving:
    """The parts of a rank that only samples."""

    folder: Path
    settings: Settings
    ranks: Ranks
    facts: ModelFacts
    engine: VllmEngine
    evaluation: Evaluation


def build_serving(
    folder: Path,
    settings: Settings,
    ranks: Ranks,
    graders: Graders,
    *,
    started: float | None = None,
    interrupt: Interrupt = INTERRUPT,
    engine_of: type[VllmEngine] = VllmEngine,
) -> Serving:
    """Builds the parts of an evaluation, but for what only learns. Collective."""
    model = Path(settings.model.path)
    facts = read_facts(model)
    # Prompts come rendered (evaluate/ask.py): the model need not have the template of training.
    raw = settings.data.model_copy(update={"template": "raw"})
    tokenizer = Tokenizer.of(raw, model, facts.vocab, facts.eos)
    with phase(Phase.ENGINE):
        engine = engine_of(model, facts, tokenizer.stops, settings.rollout, DTYPES[settings.model.dtype], ranks.backend)
    sequences = settings.rollout.max_sequences
    evaluation = Evaluation(ranks, engine, tokenizer, graders, interrupt, folder, sequences, AtOnce())
    return Serving(folder, settings, ranks, facts, engine, evaluation)


def _publisher(settings: Settings, ranks: Ranks, facts: ModelFacts, learner: Learner, prompts: Prompts) -> Publisher:
    canary = [prompts.at(number).tokens for number in range(settings.publish.canary_prompts)]
    rollout, experts = settings.rollout, facts.experts.count if facts.experts else 0

    def engine_experts(rank: int) -> tuple[int, int]:
        return local_experts(rank, rollout.tensor, rollout.expert, experts)

    dtype = DTYPES[settings.model.dtype]
    return Publisher(ranks, facts, learner.layout, settings.publish, canary, engine_experts, dtype)
