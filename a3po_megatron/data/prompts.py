"""The run's endless, seeded order of prompts, the same on every rank.

All rows are checked before anything starts: each has a problem and a gold answer that can be read, no problem has two
answers, none is too long. Each epoch has its own order, drawn by hash from (seed, epoch, row). With weights, every
block of draws holds each source as often as its weight says, in an order drawn by hash from (seed, block), and each
source has epochs of its own. Position n is the same whatever happened before: the only state is the position.
"""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import IO, Any

import numpy as np

from ..batch import Prompt
from ..config import ARITHMETIC, DataOptions
from ..errors import RequestError
from ..files.cache import Cache, name_of
from . import arithmetic
from .golds import unreadable_rows
from .load import Loaded, load
from .order import named_order
from .table import Row
from .tokenizer import Tokenizer

COUNTED_TOGETHER = 512  # prompts
LARGEST_BLOCK = 10_000  # draws over which weights come out exactly


class Prompts:
    """`remarks`: what was left out and why, in numbers, for who starts a run.

    check_golds: refuse gold answers that nobody can read (what leaves them out does so in any case).
    """

    def __init__(
        self, options: DataOptions, tokenizer: Tokenizer, seed: int, max_tokens: int, check_golds: bool = False
    ) -> None:
        self._options, self._tokenizer, self._seed, self._limit = options, tokenizer, seed, max_tokens
        self.remarks: list[str] = []
        self._data = None if options.path == ARITHMETIC else self._loaded(check_golds)
        if self._data is None and (length := len(tokenizer.encode(arithmetic.LONGEST))) > max_tokens:
            raise RequestError(
                f"{ARITHMETIC}: its longest prompt has {length} tokens, rollout.max_prompt_tokens is {max_tokens}"
            )
        # In which of the task's ways a response answers; None: the task names none. Recorded, never rewarded.
        names = [] if self._data is None else self._data.graders()
        self.graders = sorted({name or options.grader for name in names})  # that the rows have
        self.way_of: Callable[[str], str] | None = arithmetic.way_of if self._data is None else None
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._shares = self._checked_shares() if self._data is not None else []
        self.position = 0

    def at(self, index: int) -> Prompt:
        """The prompt at a position of the endless order."""
        if self._data is None:
            problem, answer = arithmetic.problem(index, self._seed)
            text = self._tokenizer.render(problem)
            return Prompt(f"arithmetic/{index}", text, answer, self._tokenizer.tokens_of(text), index)
        source, draw = self._source(index)
        first, end = (0, len(self._data.rows)) if source is None else self._data.bounds[source : source + 2]
        epoch, place = divmod(draw, end - first)
        row = self._data.rows[first + self._order(source, epoch, end - first)[place]]
        # The id names the draw of a rollout's seed: the same problem in a later epoch is another draw.
        name, text = self._data.id(row), self._rendered(self._data, row)
        grader, tokens = row.grader or self._options.grader, self._tokenizer.tokens_of(text)
        return Prompt(f"{name}@{epoch}" if epoch else name, text, row.gold, tokens, index, grader)

    def state(self) -> dict[str, Any]:
        return {"position": self.position}

    def restore(self, state: dict[str, Any]) -> None:
        self.position = state["position"]

    def _order(self, source: int | None, epoch: int, count: int) -> list[int] | range:
        if not self._options.shuffle:
            return range(count)
        key = (-1 if source is None else source, epoch)
        if key not in self._orders:  # a step may reach into the next epoch; older ones are done with
            self._orders = {k: v for k, v in self._orders.items() if k[0] != key[0] or k[1] >= epoch - 1}
            name = (self._seed, epoch) if source is None else (self._seed, f"source {source}", epoch)
            self._orders[key] = named_order(count, *name)
        return self._orders[key]

    def _source(self, index: int) -> tuple[int | None, int]:
        """The source of a draw, None for all of them as one, and the draw's number there."""
        if not self._shares:
            return None, index
        block, place = divmod(index, sum(self._shares))
        slots = [source for source, share in enumerate(self._shares) for _ in range(share)]
        order = named_order(len(slots), self._seed, "weights", block) if self._options.shuffle else range(len(slots))
        drawn = [slots[slot] for slot in list(order)[: place + 1]]
        source = drawn[-1]
        return source, block * self._shares[source] + drawn.count(source) - 1

    def _checked_shares(self) -> list[int]:
        """Draws of each source in a block, from `data.weights`."""
        assert self._data is not None
        weights, sources = self._options.weights, len(self._data.bounds) - 1
        if not weights:
            return []
        if len(weights) != sources:
            raise RequestError(f"data.weights has {len(weights)} numbers, data.path has {sources} sources")
        exact = [Fraction(str(weight)) for weight in weights]
        whole = [int(each * math.lcm(*(part.denominator for part in exact))) for each in exact]
        shares = [each // math.gcd(*whole) for each in whole]
        if sum(shares) > LARGEST_BLOCK:
            raise RequestError(
                f"data.weights = {list(weights)} come out exactly only over {sum(shares)} draws: choose rounder numbers"
            )
        for source, (first, end) in enumerate(zip(self._data.bounds, self._data.bounds[1:], strict=False)):
            if first == end:
                raise RequestError(
                    f"{self._options.path[source]}: no row is left of this source, and data.weights draws it"
                )
        return shares

    def _loaded(self, check_golds: bool) -> Loaded:
        options, cache = self._options, Cache(self._options.cache)
        data = load(options, cache)
        self.remarks += data.counts.remarks()
        if check_golds or options.unreadable_golds == "drop":
            data = self._with_readable_golds(data, cache)
        data = self._fitting(data, cache)
        self.remarks += [cache.refused] if cache.refused else []
        return data

    def _with_readable_golds(self, data: Loaded, cache: Cache) -> Loaded:
        rows = unreadable_rows(data, self._options.grader, cache)
        if not rows:
            return data
        more = f" (and {len(rows) - 1} more rows like it)" if len(rows) > 1 else ""
        if self._options.unreadable_golds == "error":
            raise RequestError(
                f"{data.where(rows[0].row)}: {rows[0].why}: {rows[0].gold!r:.80}{more}: mend it, or set "
                "data.unreadable_golds: drop"
            )
        readable = np.ones(len(data.rows), bool)
        readable[[each.number for each in rows]] = False
        self.remarks.append(
            f"{len(rows)} of {len(readable)} rows were left out: the grader cannot read their gold answers"
        )
        return data.only(readable)

    def _fitting(self, data: Loaded, cache: Cache) -> Loaded:
        """Without what is too long. Only prompts of more bytes than the limit are tokenised, where that is exact."""
        name = f"{name_of(data.key, data.rows.digest(), self._tokenizer.digest(), self._limit)}.npy"
        if data.large and (there := cache.find(name)) is not None:
            return self._shortened(data, np.load(there))
        lengths = np.zeros(len(data.rows), np.uint32)  # 0: not counted, surely within
        size, ascii_ = data.rows.problem_bytes()
        unsure = size > np.where(ascii_, *self._tokenizer.sure_bytes(self._limit))
        to_count = (
            (number, text)
            for number, row in zip(np.flatnonzero(unsure), data.rows.only(unsure), strict=True)
            if not self._tokenizer.surely_within(text := self._rendered(data, row), self._limit)
        )
        while batch := list(itertools.islice(to_count, COUNTED_TOGETHER)):
            numbers, texts = zip(*batch, strict=True)
            lengths[list(numbers)] = counts = self._tokenizer.counts_of(texts)
            if 0 in counts:
                where = data.where(data.rows[numbers[counts.index(0)]])
                raise RequestError(f"{where}: the tokenizer makes no token at all of the problem")
        if data.large:
            cache.put(name, lambda file: _save(file, lengths))
        return self._shortened(data, lengths)

    def _shortened(self, data: Loaded, lengths: np.ndarray) -> Loaded:
        long = lengths > self._limit
        if not (count := int(long.sum())):
            return data
        longest = int(lengths.max())
        if not self._options.drop_long_prompts:
            first = int(np.flatnonzero(long)[0])
            more = f" (and {count - 1} more, the longest {longest})" if count > 1 else ""
            raise RequestError(
                f"{data.where(data.rows[first])}: the prompt has {lengths[first]} tokens{more}, "
                f"rollout.max_prompt_tokens is {self._limit}: raise it, or set data.drop_long_prompts: true"
            )
        if count == len(lengths):
            raise RequestError(f"{data.files[0]}: no prompt is left within rollout.max_prompt_tokens")
        self.remarks.append(
            f"{count} of {len(lengths)} prompts have more than rollout.max_prompt_tokens = {self._limit} tokens (the "
            f"longest {longest}) and were left out"
        )
        return data.only(~long)

    def _rendered(self, data: Loaded, row: Row) -> str:
        try:
            return self._tokenizer.render(row.problem)
        except RequestError as error:
            raise RequestError(f"{data.where(row)}: {error}") from error


def _save(file: IO[bytes], lengths: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, lengths)
    file.write(buffer.getvalue())
