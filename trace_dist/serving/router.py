"""Prompts in, answers out: each prompt is answered with the delta of its task, and the model is the base again afterwards.

    router = Router.open("runs/quickstart/bank", "runs/quickstart/models/target")
    for answer in router.ask(["Spell this word backward: stone", "What is 3 + 4?"]):
        print(answer.task, answer.margin, answer.text)

The frozen base reads every prompt once; the nearest cluster of its representation says the task (serving/finding.py). Prompts of
one task are answered together, one delta after the other.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.blend import weighed
from trace_dist.bank.delta import applied
from trace_dist.bank.facts import dtype_of
from trace_dist.bank.learned_on import learned_on, warn_of_others
from trace_dist.bank.swap import Swap
from trace_dist.data.encoding import context_length, encode_prompt, pad_id, stop_ids
from trace_dist.data.examples import Prompt
from trace_dist.evaluation.inputs import check_decoder
from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.models.loading import load_tokenizer
from trace_dist.models.trust import trust
from trace_dist.serving.cache import DeltaCache
from trace_dist.serving.finding import Finder, Route, Shares
from trace_dist.serving.options import Sampling, Source
from trace_dist.serving.prompts import check_prompt
from trace_dist.serving.row import Finish, Row
from trace_dist.serving.stream import Pieces, Stream
from trace_dist.serving.watch import Watched
from trace_dist.serving.writing import write, write_out
from trace_dist.sharding.base import ShardedModel
from trace_dist.sharding.build import load_sharded
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger
from trace_dist.utils.names import AUTO, BASE

logger = get_logger(__name__)
MOST_TOKENS = 256
"""Of an answer, where nobody says how many."""


class UnknownTask(ValueError):
    """The bank holds no task of this name."""


@dataclass(frozen=True)
class Answer:
    """An answer, and how it came about."""

    text: str
    task: str
    """Whose delta answered: a task's, or ``base`` for none."""
    margin: float | None
    """Nats between the retrieved task and the second; None where the task was named, or no second one was compared."""
    rejected: bool
    """Whether the prompt is of no task that the bank knows, so that the base answered."""
    error_bound: float | None
    """Upper 95 % limit on the share of that task's prompts that another task is retrieved for, in [0, 1]; None where the task has
    no signature, or tasks are compared under their own weights."""
    finish: Finish
    """``stop``: the model ended it, or a stop text; ``length``: it was cut; ``cancelled``: nobody wanted the rest."""
    num_prompt_tokens: int
    num_tokens: int
    blend: dict[str, float] = field(default_factory=dict)
    """Tasks whose deltas answered together, with their weights; empty where ``task`` answered alone."""


class Router:
    """Answers prompts from a bank. One thread at a time; others wait.

    Where the base is spread over ranks all of them make the same calls, with the same prompts, and get the same answers.

    Args:
        bank: the bank; what is added to it later is seen from ``refresh`` on.
        model: its base, which the router has for itself, on one device or spread over the ranks of this job.
        tokenizer: the base's.
        source: how it was opened.
    """

    def __init__(self, bank: DeltaBank, model: ShardedModel, tokenizer: Any, source: Source) -> None:
        check_decoder(model.module)
        self.bank, self.model, self.tokenizer, self.source = bank, model, tokenizer, source
        # Tokenizers change when they encode; while one thread does, another may decode.
        self._decoder, self._encoding = deepcopy(tokenizer), threading.Lock()
        # Not only those that training used: a base that ends in several ways may do so as it pleases.
        own = model.module.generation_config.eos_token_id
        self._ends = list(
            dict.fromkeys([*stop_ids(tokenizer), *([own] if isinstance(own, int) else own or [])])
        )
        self._fill = pad_id(tokenizer)
        # What the request says counts alone; `generate` would fill in a base's own temperature or penalties.
        model.module.generation_config = type(model.module.generation_config)()
        self._deltas = DeltaCache(bank, model, source.cache_gib * 2**30)
        self._lock = threading.RLock()
        self._held: str | None = None
        self._holder: int | None = None  # the thread that holds it
        self._watched = Watched(bank)
        self._finder = self._found_by()
        self.fingerprint = fingerprint(model.module)
        """Of the weights as they were loaded."""

    @classmethod
    def open(cls, bank: Any, base: Any, **options: Any) -> Router:
        """Open a bank and load its base model.

        Args:
            bank: folder of the bank.
            base: the bank's base model: folder or hub id.
            options: the other fields of ``serving.options.Source``: dtype, quantize, backend, representation, candidates, reject,
                blend, batch_size, cache_gib, trust_remote_code.

        Raises:
            ValueError: there is no such bank or model, the model is not the bank's base, or a value makes no sense.
        """
        return cls.of(Source(str(bank), str(base), **options))

    @classmethod
    def of(cls, source: Source) -> Router:
        """``open``, with the options as one value."""
        dist.init_distributed()
        bank = DeltaBank(source.bank)
        if AUTO in bank.tasks:
            logger.warning(
                "bank %s: a task called %s is answered where it is retrieved, and cannot be asked for by name; rename it "
                "(`trace-dist bank rename`)",
                source.bank,
                AUTO,
            )
        if source.trust_remote_code:
            trust(source.base)
        check_same(bank.base, fingerprint(source.base, together=True), f"bank {source.bank}")
        if source.representation == "adapted":
            bank.check_adapted()
        dtype = _dtype_of(bank) if source.dtype == "auto" else source.dtype
        quantize = learned_on(bank) if source.quantize == "auto" else source.quantize
        warn_of_others(bank, quantize)
        model = load_sharded(source.base, dtype, source.backend, quantize)
        return cls(bank, model, load_tokenizer(source.base), source)

    @property
    def tasks(self) -> list[str]:
        """What can be asked for by name: the base and the tasks of the bank."""
        return [BASE, *(task for task in self.bank.tasks if task != BASE)]

    @property
    def context(self) -> int | None:
        """Positions of the model; None where it states no limit."""
        return context_length(self.model.config)

    def ask(
        self,
        prompts: Sequence[Prompt],
        tasks: Sequence[str | None] | None = None,
        sampling: Sampling | None = None,
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Answer]:
        """Answer prompts.

        Args:
            prompts: texts, which are put to the model as in training, or conversations (lists of role and content).
            tasks: name of each prompt's task, or None to retrieve it; retrieves all when not given.
            sampling: greedy when not given.
            on_text: is told the number of a prompt and the next piece of its answer, as it is written.

        Returns:
            One answer per prompt, in their order.

        Raises:
            ValueError: no such task, or a prompt that is none or does not fit the model.
        """
        sampling = Sampling() if sampling is None else sampling
        names = [None] * len(prompts) if tasks is None else list(tasks)
        if len(names) != len(prompts):
            raise ValueError(
                f"tasks: {len(names)} names for {len(prompts)} prompts; give one per prompt, or None"
            )
        ids = self.encode(prompts)
        rows = [
            self.row(
                each, sampling, None if on_text is None else partial(on_text, number), f"prompt {number}"
            )
            for number, each in enumerate(ids)
        ]
        # Somebody may listen on one rank alone.
        listened = dist.max_over_ranks(float(on_text is not None)) > 0
        with self._lock:
            routes = self.routes(ids, names)
            for held in dict.fromkeys((route.task, route.shares) for route in routes):
                mine = [
                    row for row, route in zip(rows, routes, strict=True) if (route.task, route.shares) == held
                ]
                if not (sampling.draws or listened):
                    with self.holding(*held):
                        write_out(self.model.module, mine, self.source.batch_size, self._ends, self._fill)
                    continue
                for first in range(0, len(mine), self.source.batch_size):
                    self.write(held[0], mine[first : first + self.source.batch_size], sampling, held[1])
            return [self.answer(row, route) for row, route in zip(rows, routes, strict=True)]

    def stream(self, prompt: Prompt, task: str | None = None, sampling: Sampling | None = None) -> Stream:
        """Answer a prompt piece by piece, as it is written.

        Args:
            prompt: a text or a conversation.
            task: its task; retrieved when not given.
            sampling: as ``ask``.

        Returns:
            The pieces, to be iterated over; its ``answer`` is the whole.

        Raises:
            ValueError: as ``ask``, at once.
        """
        sampling = Sampling() if sampling is None else sampling
        if self._holder == threading.get_ident():
            # The thread that writes would wait for this one.
            raise ValueError("prompt: the model holds a task here; ask outside of the block that holds it")
        (ids,) = self.encode([prompt])
        pieces = Pieces()
        row = self.row(ids, sampling, pieces.add)
        (route,) = self.routes([ids], [task])
        return Stream(
            row,
            pieces,
            partial(self.write, route.task, [row], sampling, route.shares),
            partial(self.answer, row, route),
        )

    def encode(self, prompts: Sequence[Prompt]) -> list[list[int]]:
        """Token ids of prompts, as in training. Raises ValueError as ``ask``."""
        checked = [check_prompt(prompt, f"prompt {number}") for number, prompt in enumerate(prompts)]
        with self._encoding:
            return encode_prompt(checked, self.tokenizer) if checked else []

    def limit(self, num_prompt: int, asked: int | None, where: str, most: int | None = None) -> int:
        """Tokens that an answer may have.

        Args:
            num_prompt: tokens of its prompt.
            asked: how many are asked for; None is as many as fit.
            where: begins the message.
            most: what is given where None is asked for; ``MOST_TOKENS`` when not given.

        Raises:
            ValueError: prompt and answer have more tokens than the model has positions.
        """
        context, most = self.context, MOST_TOKENS if most is None else most
        # The last token of an answer is not read again.
        room = most if context is None else context - num_prompt + 1
        if room < (asked or 1):
            raise ValueError(
                f"{where}: {num_prompt} tokens and an answer of {asked or 1} do not fit the model's {context} positions; "
                "shorten the prompt or lower max_new_tokens"
            )
        return min(room, most) if asked is None else asked

    def routes(self, ids: Sequence[list[int]], tasks: Sequence[str | None]) -> list[Route]:
        """Who answers each prompt; the model must be the base.

        Raises:
            UnknownTask: a task is named that the bank does not hold.
        """
        known = set(self.tasks)
        for task in tasks:
            if task is not None and task not in known:
                raise self._unknown(task)
        asked = [each for each, task in zip(ids, tasks, strict=True) if task is None]
        retrieved = iter(self._retrieved(asked))
        return [next(retrieved) if task is None else Route(task) for task in tasks]

    def _retrieved(self, ids: list[list[int]]) -> list[Route]:
        with self._lock:
            self._check_base("prompts")
            return self._finder.routes(ids)

    def row(
        self,
        ids: list[int],
        sampling: Sampling,
        on_text: Callable[[str], None] | None = None,
        where: str = "prompt",
    ) -> Row:
        """An answer that is yet to be written. Raises ValueError as ``limit``."""
        limit = self.limit(len(ids), sampling.max_new_tokens, where)
        return Row(ids, limit, sampling.stop, self._ends, self._decode, on_text)

    def write(self, task: str, rows: Sequence[Row], sampling: Sampling, shares: Shares = ()) -> None:
        """Write answers with a task's delta, or a blend of several, in one batch.

        Args:
            task: name of a task, or ``base``.
            rows: at most as many as fit the device's memory.
            sampling: what the rows have in common (``Sampling.way`` and the seed).
            shares: of their ``Route``.
        """
        with self.holding(task, shares):
            write(self.model.module, rows, sampling, self._ends, self._fill)

    @contextmanager
    def holding(self, task: str, shares: Shares = ()) -> Iterator[None]:
        """Inside the block the model holds a task's weights, for this thread alone; afterwards its own, bit for bit.

        Args:
            task: name of a task, or ``base``.
            shares: of a ``Route``; where there are some, the weights are the blend of those tasks.

        Raises:
            UnknownTask: the bank does not hold it.
            ValueError: another block holds a task's weights already.
        """
        with self._lock, self._activated(task, shares):
            yield

    def _delta(self, task: str) -> Swap | None:
        """Raises UnknownTask where the bank no longer holds a task that it held when it was looked at."""
        if task not in self.tasks:
            raise self._unknown(task)
        try:
            return self._deltas.get(task)
        except ValueError:
            if not self.refresh():
                raise
        return self._delta(task)

    def _unknown(self, task: str) -> UnknownTask:
        shown = ", ".join(self.tasks[:20]) + (", ..." if len(self.tasks) > 20 else "")
        return UnknownTask(f"task={task!r:.200}: the bank does not hold it; it holds {shown}")

    def answer(self, row: Row, route: Route) -> Answer:
        """What has been written."""
        if row.finish is None:
            raise AssertionError("a row was not written to its end")
        return Answer(
            row.text,
            route.task,
            route.margin,
            route.rejected,
            self._finder.bound(route.task),
            row.finish,
            len(row.prompt),
            len(row.tokens),
            dict(route.shares),
        )

    def refresh(self) -> bool:
        """See what was added to the bank, or taken out of it, since; whether that is anything.

        Raises:
            ValueError: the index, or what is new, is damaged, or the bank is one of another base now; what was seen before is
                still there, until the index is replaced again.
        """
        with self._lock:
            before = self.bank.index
            if not self._watched.refresh():
                return False
            try:
                check_same(self.bank.base, before.base, f"bank {self.bank.folder}")
                self._finder = self._found_by()
            except ValueError:
                self.bank.reload(before)
                raise
        logger.info(
            "bank %s: generation %d, %d tasks", self.bank.folder, self.bank.generation, len(self.tasks)
        )
        return True

    def _found_by(self) -> Finder:
        return Finder(self.bank, self.model, self.source, self._fill, self._activated)

    @contextmanager
    def _activated(self, task: str, shares: Shares = ()) -> Iterator[None]:
        self._check_base(f"task={task!r:.200}")
        before, held = (self._held, self._holder), self._weights_of(task, shares)
        self._held, self._holder = task, threading.get_ident()
        try:
            with held:
                yield
        finally:
            self._held, self._holder = before

    def _weights_of(self, task: str, shares: Shares) -> AbstractContextManager[None]:
        """A block with a task's weights, or with those of several by their shares."""
        if shares:
            return applied(self.model, weighed(self.bank, self.model, dict(shares), self.source.blend))
        swap = self._delta(task)
        return nullcontext() if swap is None else swap.applied()

    def _check_base(self, what: str) -> None:
        """Raise ValueError inside a block that holds a task's weights."""
        if self._held not in (None, BASE):
            raise ValueError(
                f"{what}: the model holds task {self._held!r} here; ask outside of the block that holds it"
            )

    def holds_base(self) -> bool:
        """Whether the weights are those that were loaded, by their fingerprint."""
        with self._lock:
            return fingerprint(self.model.module) == self.fingerprint

    def _decode(self, ids: Sequence[int]) -> str:
        return str(
            self._decoder.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )


def _dtype_of(bank: DeltaBank) -> str:
    """The data type that the bank's deltas were trained in; some families keep a few tensors in fp32 beside it."""
    found = {dtype_of(bank.facts(task)) for task in bank.tasks}
    return "bfloat16" if "bfloat16" in found else "float32"
