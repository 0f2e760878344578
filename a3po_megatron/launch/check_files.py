"""What a run reads, before any rank starts: the weights' headers, the tokenizer, the prompts; and the names of options
that are passed on, against the libraries that take them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

from .. import compat
from ..config import Settings
from ..data.prompts import Prompts
from ..data.tokenizer import Tokenizer
from ..model.facts import ModelFacts
from ..model.read import read_facts
from ..ranks.backend import Backend
from ..weights.load import check_checkpoint
from . import environment


def check_files(settings: Settings, backend: Backend) -> list[str]:
    """Remarks on the run's data. Raises RequestError with one clear message if the run could not go on with what it
    reads."""
    model = Path(settings.model.path)
    facts = read_facts(model)
    check_checkpoint(model, facts)
    tokenizer = Tokenizer.of(settings.data, model, facts.vocab, facts.eos)
    limit = settings.rollout.max_prompt_tokens
    prompts = Prompts(settings.data, tokenizer, settings.trainer.seed, limit, check_golds=True)
    _check_extra(settings, facts, backend)
    return prompts.remarks


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
