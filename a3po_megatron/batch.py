"""The data types that travel through the loop, with their shapes.

    Prompt → Rollout (+ Verdict) → Group → Batch

Nothing here imports torch at run time, so that grader processes and `a3po --help` stay light. A rollout carries its
history token by token: the log-probs of the distribution it was sampled from, and segments: which weights sampled a
token, and whether it is trained on. A tool's answer, a masked turn and the first half of a rollout that older weights
began are segments, not types of their own. B is the number of rollouts, T the number of response tokens of all of them,
laid end to end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Outcome = Literal["correct", "wrong", "invalid"]
Finish = Literal["stop", "length"]
Gold = str | tuple[str, ...]  # of several texts any is right


@dataclass(frozen=True)
class Prompt:
    """One question and its gold answer. `index` is its position in the run's endless, seeded order of prompts."""

    id: str
    text: str  # as the model reads it
    answer: Gold
    tokens: tuple[int, ...] = ()
    index: int = -1
    grader: str = "math"  # its name (reward/grader.py)


class Answered(NamedTuple):
    """What a grader gets."""

    response: str
    answer: Gold
    finished: bool = True  # False: the response was cut off
    grader: str = ""  # its name (reward/grader.py); empty: the pool's own
    extract: str = ""  # where the answer is looked for; likewise
    problem: str = ""  # for a grader that is told it
    opened: int = 0  # characters that the response begins with, but that the prompt had written


class Step(NamedTuple):
    """A run of characters of a response's text as decoded, and what a grader gives for it."""

    begin: int
    end: int  # behind its last character
    score: float


@dataclass(frozen=True)
class Verdict:
    """What a grader says of one response.

    `invalid` is a failure of *grading* (worker killed, unreadable gold), never a bad answer: a response without an
    answer, one cut off, and one that takes too long to grade, is `wrong`.
    """

    outcome: Outcome
    reason: str = ""
    steps: tuple[Step, ...] = ()  # in order, none over another, maybe with gaps; what is malformed makes it invalid


class Segment(NamedTuple):
    """A run of response tokens with one history."""

    length: int  # tokens
    weight_version: int  # of the weights that sampled them, or that waited while a tool answered
    trained: bool = True  # False: read by the model, and no more: the tokens have no part in shaping, loss and metrics


@dataclass
class Rollout:
    """One sampled response of n tokens. Arrays are over response tokens; the end-of-sequence token counts.

    Raises ValueError, naming the rollout, where the segments do not cover the response exactly.
    """

    prompt: Prompt
    sample: int
    seed: int
    step: int
    tokens: np.ndarray  # [n] int64
    # [n] float32, log-probs of the sampling distribution (after temperature and truncation); of a token that nobody
    # sampled any number, since it is not trained on
    logprobs: np.ndarray
    finish: Finish
    text: str
    segments: tuple[Segment, ...]  # in order, n tokens in all; an empty response has one of length 0
    verdict: Verdict = field(default_factory=lambda: Verdict("invalid", "not graded"))
    reward: float = 0.0
    # [T, L, k] uint8 or uint16, the experts that the engine chose for each token that it read (prompt and response
    # without the last) in each of L layers; None: not asked for (rollout.routing_replay)
    routes: np.ndarray | None = None

    def __post_init__(self) -> None:
        lengths, tokens = [segment.length for segment in self.segments], len(self.tokens)
        if sum(lengths) != tokens or min(lengths, default=-1) < min(tokens, 1):
            raise ValueError(f"rollout {self.name}: its segments are of {lengths} tokens, and its response of {tokens}")

    @property
    def name(self) -> str:
        return f"{self.prompt.id}#{self.sample}"

    @property
    def untrained(self) -> int:
        """How many of its tokens are not trained on."""
        return sum(segment.length for segment in self.segments if not segment.trained)

    def trained(self) -> np.ndarray:
        """Returns which of its tokens are trained on, [n] bool."""
        return np.repeat([s.trained for s in self.segments], [s.length for s in self.segments])

    def sampled_by(self, weight_version: int) -> bool:
        """Returns whether these weights, and no others, sampled it."""
        return all(segment.weight_version == weight_version for segment in self.segments)


@dataclass
class Group:
    """The G rollouts of one prompt, in sample order."""

    prompt: Prompt
    rollouts: list[Rollout]

    @property
    def valid(self) -> list[Rollout]:
        return [r for r in self.rollouts if r.verdict.outcome != "invalid"]

    @property
    def has_spread(self) -> bool:
        """True if at least two valid members differ in their *verdict*; a shaped score never counts as spread."""
        return len({r.verdict.outcome for r in self.valid}) == 2


@dataclass
class Collected:
    """What one step's collection gave: this replica's accepted groups and the facts that all ranks share."""

    groups: list[Group]  # accepted, owned by this data-parallel replica, in prompt order
    sampled: list[Group]  # all groups that this rank itself sampled and graded in this step
    accepted: list[int]  # prompt indices accepted over *all* replicas, in prompt order
    metrics: dict[str, float | None]  # over every rollout sampled in this step, all ranks


SCORES = ("old_logprobs", "entropy", "proxy_logprobs", "reference_logprobs")  # of a batch


class Pull(NamedTuple):
    """What draws tokens to other log-probs, in the loss: their divergence from these counts there."""

    estimator: str  # of algorithm/kl.py
    targets: Tensor  # [T] float32
    weights: Tensor  # [T] float32; 0: this token is not drawn


@dataclass
class Batch:
    """This replica's rollouts of one step: per rollout [B], per response token [T], rollout after rollout."""

    rollouts: list[Rollout]
    group_index: Tensor  # [B] int64, ascending
    mini_batch: Tensor  # [B] int64, ascending: which optimiser step of this RL step uses the rollout
    mini_batches: int  # over all replicas; this replica may own no rollout of some
    rewards: Tensor  # [B] float32
    positive: Tensor  # [B] bool, the verifier's verdict
    advantages: Tensor  # [B] float32, of the outcome
    lengths: Tensor  # [B] int64, response tokens
    rollout_index: Tensor  # [T] int64, ascending
    rollout_logprobs: Tensor  # [T] float32, from the engine
    trained: Tensor | None = None  # [T] bool, which tokens are trained on; None: all
    masked: Tensor | None = None  # [B] bool, rollouts that are not trained on (algorithm/correction.py); None: none
    process_advantages: Tensor | None = None  # [T] float32, what steps add to advantages; None: no process rewards
    token_positive: Tensor | None = None  # [T] bool, a token's polarity; None: that of its rollout's verdict
    old_logprobs: Tensor | None = None  # [T] float32, from the training engine (score); 0 where not trained on
    entropy: Tensor | None = None  # [T] float32, likewise
    # [T] float32, likewise, of the run's first weights; None: nobody asked for them
    reference_logprobs: Tensor | None = None
    # [T] float32, of the less noisy policy (learner/proxy.py), -inf where that never takes the token; None: likewise
    proxy_logprobs: Tensor | None = None
    rerouted: Tensor | None = None  # [B] int64, (token, layer) pairs whose experts the learner would not choose (score)
    token_weights: Tensor | None = None  # [T] float32 (shape); 0 where not trained on
    rho: tuple[float, float] = (1.0, 1.0)  # the step's weights of positives and negatives (shape)
    pulls: list[Pull] = field(default_factory=list)  # of the same kinds on all ranks
    restrained: Tensor | None = None  # [T] bool, tokens that are drawn by choice (algorithm/restraint.py)
    entropy_weight: float = 0.0  # of the entropy bonus in this step's loss
    imbalance: float = 1.0  # of the step: how many times the mean the heaviest replica has, in its worst mini-batch
    rejected: list[int] = field(default_factory=list)  # mini-batches whose update was not finite and not applied

    def scores(self) -> dict[str, Tensor]:
        """Returns what the learner said of the response tokens before the update, each [T] float32."""
        values = {name: getattr(self, name) for name in SCORES}
        return {name: value for name, value in values.items() if value is not None}

    def is_trained(self) -> Tensor:
        """Returns which response tokens are trained on, [T] bool."""
        return self.rollout_index >= 0 if self.trained is None else self.trained

    def token_advantages(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Returns the advantages of response tokens, by their places among the T or a mask of them: of the outcome, and
        of their steps where there are process rewards."""
        outcome = self.advantages[self.rollout_index[tokens]]
        return outcome if self.process_advantages is None else outcome + self.process_advantages[tokens]

    def positive_tokens(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Returns the polarity of response tokens likewise."""
        if self.token_positive is None:
            return self.positive[self.rollout_index[tokens]]
        return self.token_positive[tokens]
