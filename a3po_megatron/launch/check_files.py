"""What a run reads, before any rank starts: the weights' headers, the tokenizer, the prompts; and the names of options
that are passed on, against the libraries that take them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .. import compat
from ..config import RemoteSandbox, Settings
from ..data.prompts import Prompts
from ..data.tokenizer import Tokenizer
from ..errors import RequestError
from ..evaluate.request import graders_in
from ..evaluate.training import asked_of_run, engine_length
from ..model.facts import ModelFacts
from ..model.read import read_facts
from ..ranks.backend import Backend
from ..reward.endpoint import longest_seconds
from ..reward.function import function_of
from ..reward.grader import GRADERS
from ..reward.graders import chosen
from ..reward.sandbox.choose import check_sandbox
from ..reward.sandbox.remote import MARGIN_SECONDS
from ..weights.load import check_checkpoint
from . import environment
from .check import check_cache


def check_files(settings: Settings, backend: Backend, *, here: bool) -> list[str]:
    """Remarks on the run's data. Raises RequestError with one clear message if the run could not go on with what it
    reads.

    here: it is to run on this machine, so that its sandbox is tried here
    """
    model = Path(settings.model.path)
    facts = read_facts(model)
    check_checkpoint(model, facts)
    tokenizer = Tokenizer.of(settings.data, model, facts.vocab, facts.eos)
    limit = settings.rollout.max_prompt_tokens
    prompts = Prompts(settings.data, tokenizer, settings.trainer.seed, limit, check_golds=True)
    _check_function(settings, prompts)
    _check_judge(settings, prompts)
    _check_process(settings, prompts)
    asked = asked_of_run(settings, facts, prompts.remarks.append)
    if "code" in {*prompts.graders, *graders_in(asked)}:
        _check_sandbox(settings, here)
    _check_evaluation(settings, facts, engine_length(settings, asked, tokenizer.counts_of))
    _check_extra(settings, facts, backend)
    return prompts.remarks


def _check_judge(settings: Settings, prompts: Prompts) -> None:
    reward, limit = settings.reward, settings.grader_pool.timeout_seconds
    if "judge" not in prompts.graders:
        if reward.judge_url:
            raise RequestError(
                f"reward.judge_url = {reward.judge_url} has no effect: no row has the grader `judge` (data.grader, "
                "data.grader_field)"
            )
        return
    if not (reward.judge_url and reward.judge_model):
        raise RequestError("data.grader: rows have the grader `judge`, which needs reward.judge_url and judge_model")
    if reward.judge_key_variable and not os.environ.get(reward.judge_key_variable):
        raise RequestError(f"reward.judge_key_variable: the variable {reward.judge_key_variable} is not set here")
    if (longest := longest_seconds(reward.judge_timeout_seconds, reward.judge_retries)) >= limit:
        raise RequestError(
            f"grader_pool.timeout_seconds = {limit:g}, but a judge may take {longest:g} s "
            "(reward.judge_timeout_seconds, judge_retries), and what takes longer than the pool allows counts as "
            "wrong: raise it, or lower these"
        )


def _check_sandbox(settings: Settings, here: bool) -> None:
    sandbox, limit = settings.sandbox, settings.grader_pool.timeout_seconds
    longest, of = sandbox.wall_seconds, "sandbox.wall_seconds"
    if isinstance(sandbox, RemoteSandbox):  # a server that does not answer makes verdicts invalid, not wrong
        longest, of = longest_seconds(longest + MARGIN_SECONDS, sandbox.retries), f"{of}, the way, sandbox.retries"
    if limit <= longest:
        raise RequestError(
            f"grader_pool.timeout_seconds = {limit:g}, but a program may run for {longest:g} s ({of}), and rows have "
            "the grader `code`: raise it to what all tests of a response may take"
        )
    if here:
        check_sandbox(chosen(settings.sandbox))


def _check_function(settings: Settings, prompts: Prompts) -> None:
    named = settings.reward.function
    if "function" in prompts.graders:
        if not named:
            raise RequestError("data.grader: rows have the grader `function`, and reward.function names none")
        function_of(named)
    elif named:
        raise RequestError(
            f"reward.function = {named} has no effect: no row has the grader `function` (data.grader, "
            "data.grader_field)"
        )


def _check_process(settings: Settings, prompts: Prompts) -> None:
    name, able = settings.process.name, [grader for grader, row in GRADERS.items() if row.steps]
    if name != "none" and not {*able} & {*prompts.graders}:
        raise RequestError(
            f"process.name = {name} has no effect: no row has a grader that scores steps (data.grader, "
            f"data.grader_field: {', '.join(able)})"
        )


def _check_evaluation(settings: Settings, facts: ModelFacts, length: int) -> None:
    """Whether the engine takes the longest sequence of a benchmark, beside training's."""
    if length > facts.max_positions:
        raise RequestError(
            f"evaluation.benchmarks: their longest prompt and response have {length} tokens, more than the model's "
            f"context of {facts.max_positions}: evaluation.max_tokens asks for shorter responses"
        )
    check_cache(settings, facts, length, of=" of evaluation.benchmarks")


def _check_extra(settings: Settings, facts: ModelFacts, backend: Backend) -> None:
    """Pass-through options are held against the libraries' own fields; importing those takes seconds, so only then."""
    if not settings.megatron.extra and not settings.rollout.engine_args:
        return
    environment.prepare()
    with warnings.catch_warnings():  # what the libraries lack or advise is not about this request
        warnings.simplefilter("ignore")
        os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
        compat.prepare()
        from ..model.build import DTYPES, transformer_config
        from ..rollout.vllm_engine import engine_arguments

        transformer_config(facts, settings.parallel, settings.model, settings.megatron, settings.learner, backend)
        engine_arguments(
            Path(settings.model.path), settings.rollout, DTYPES[settings.model.dtype], backend, facts.layers
        )
