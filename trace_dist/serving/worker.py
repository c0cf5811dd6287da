"""One thread owns the model: it takes in what is asked, finds the tasks, and answers task by task in batches.

Jobs wait in the order in which they came. The oldest decides whose turn it is; with it go those that can be answered in one
batch: of the same task, drawn in the same way. A batch that is not full waits a moment for others. Before each round the bank is
looked at again, so that a task that was added is answered by the next request.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from trace_dist.serving.finding import Route
from trace_dist.serving.options import Listening, Sampling
from trace_dist.serving.router import Answer, Router, UnknownTask
from trace_dist.serving.row import Row
from trace_dist.serving.tally import Tally
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
T = TypeVar("T")


class Busy(Exception):
    """As many prompts as may wait are waiting."""


@dataclass(eq=False)
class Job:
    """Answers to one prompt.

    Attributes:
        prompt: token ids.
        task: its name; None retrieves it.
        sampling: how the answers are written.
        num: how many answers.
        on_text: is told the number of an answer and the next piece of it.
        done: will hold the answers.
    """

    prompt: list[int]
    task: str | None
    sampling: Sampling
    num: int = 1
    on_text: Callable[[int, str], None] | None = None
    done: Future[list[Answer]] = field(default_factory=Future)
    route: Route | None = None
    rows: list[Row] = field(default_factory=list)
    arrived: float = field(default_factory=time.monotonic)
    unwanted: bool = False

    @property
    def key(self) -> tuple[Any, ...]:
        """What those of one batch have in common; draws from a seed of one's own are made alone."""
        held = None if self.route is None else (self.route.task, self.route.shares)
        seeded = bool(self.sampling.way) and self.sampling.seed is not None
        return (held, self.sampling.way, id(self) if seeded else None)

    @property
    def answered_by(self) -> set[str]:
        """Tasks whose deltas will answer, as far as they are known."""
        return set() if self.route is None else {self.route.task, *dict(self.route.shares)}

    def cancel(self) -> None:
        """Nobody waits for it any more."""
        self.unwanted = True
        for row in self.rows:
            row.cancel()


class Worker:
    """The thread.

    Args:
        router: which it has for itself from ``start`` on.
        limits: how many jobs may wait, and for how long.
        tally: counts what it does.
    """

    def __init__(self, router: Router, limits: Listening, tally: Tally) -> None:
        self._router, self._limits, self._tally = router, limits, tally
        self._arrivals: queue.SimpleQueue[Job | Callable[[], None] | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._open, self._lock = 0, threading.Lock()
        self._closing = False
        self._thread = threading.Thread(target=self._work, name="model", daemon=True)
        self.broken: str | None = None
        """Why no more is answered; None while all is well."""

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def close(self) -> None:
        """Answer what waits, and end."""
        self._arrivals.put(None)
        self._thread.join()

    @property
    def num_open(self) -> int:
        """Prompts that wait or are being answered."""
        return self._open

    def submit(self, jobs: Sequence[Job]) -> None:
        """Take on jobs, all or none.

        Raises:
            Busy: too many wait.
        """
        with self._lock:
            self.check_room(len(jobs))
            self._open += len(jobs)
        for job in jobs:
            self._arrivals.put(job)

    def check_room(self, num: int) -> None:
        """Raises Busy where so many jobs more would be too many."""
        if self._open + num > self._limits.max_waiting:
            raise Busy(f"{self._open} prompts are waiting, {self._limits.max_waiting} may; ask again later")

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Have something done with the model between two batches."""
        done: Future[T] = Future()

        def carry_out() -> None:
            if not done.set_running_or_notify_cancel():
                return  # nobody waits for it any more
            try:
                done.set_result(work())
            except Exception as error:
                done.set_exception(error)

        self._arrivals.put(carry_out)
        return done

    def _work(self) -> None:
        while self._jobs or not self._closing:
            self._take(None if not self._jobs else 0)
            while (pause := self._pause()) > 0 and not self._closing:
                self._take(pause)
            self._look()
            if batch := self._batch():
                self._answer(batch)

    def _take(self, timeout: float | None) -> None:
        """Take in what has come, and find its tasks; waits for something to come (None) or for so many seconds at most."""
        new: list[Job] = []
        with suppress(queue.Empty):
            item = self._arrivals.get(timeout=timeout) if timeout != 0 else self._arrivals.get_nowait()
            while True:
                if isinstance(item, Job):
                    new.append(item)
                elif item is None:
                    self._closing = True
                else:
                    item()
                item = self._arrivals.get_nowait()
        new = self._wanted(new)
        if new:
            self._look()
            self._find_tasks(new)
            self._jobs += [job for job in new if not job.done.done()]

    def _look(self) -> None:
        """See the bank as it is now; where the task that was found for a prompt is there no more, find another."""
        try:
            self._router.refresh()
        # What was there before is still there, and this thread must not end.
        except Exception as error:
            logger.warning("the bank cannot be looked at anew: %s", error)
        held = set(self._router.tasks)
        lost = [job for job in self._jobs if job.task is None and not job.answered_by <= held]
        if lost:
            self._find_tasks(lost)
            self._jobs = [job for job in self._jobs if not job.done.done()]

    def _find_tasks(self, jobs: list[Job]) -> None:
        # One by one where the name is given, so that a wrong name is the trouble of its own job alone.
        for some in (
            *([job] for job in jobs if job.task is not None),
            [job for job in jobs if job.task is None],
        ):
            if some:
                self._guarded(some, partial(self._assign, some))

    def _assign(self, jobs: list[Job]) -> None:
        begin = time.monotonic()
        routes = self._router.routes([job.prompt for job in jobs], [job.task for job in jobs])
        # A prompt whose first task has gone was counted with that one.
        first = [route for job, route in zip(jobs, routes, strict=True) if job.route is None]
        for job, route in zip(jobs, routes, strict=True):
            job.route = route
        if jobs[0].task is None and first:
            self._tally.retrieved(first, time.monotonic() - begin)

    def _batch(self) -> list[Job]:
        """The oldest job, and those that go with it."""
        self._jobs = self._wanted(self._jobs)
        batch: list[Job] = []
        room = self._router.source.batch_size
        for job in self._jobs:
            if not batch or (job.key == batch[0].key and job.num <= room):
                batch.append(job)
                room -= job.num
        return batch

    def _pause(self) -> float:
        """Seconds that the oldest job still waits for others; 0 where its batch is full."""
        batch = self._batch()
        if not batch or sum(job.num for job in batch) >= self._router.source.batch_size:
            return 0.0
        return batch[0].arrived + self._limits.max_wait_ms / 1000 - time.monotonic()

    def _answer(self, jobs: list[Job]) -> None:
        taken = set(map(id, jobs))
        self._jobs = [job for job in self._jobs if id(job) not in taken]
        self._guarded(jobs, partial(self._write_or_wait, jobs))

    def _write_or_wait(self, jobs: list[Job]) -> None:
        """Write answers; where the task has gone since it was found, prompts that name none wait for another."""
        try:
            self._write(jobs)
        except UnknownTask:
            self._jobs = [job for job in jobs if job.task is None] + self._jobs
            # The others hear of it.
            jobs[:] = [job for job in jobs if job.task is not None]
            raise

    def _write(self, jobs: list[Job]) -> None:
        begin, route = time.monotonic(), jobs[0].route
        if route is None:
            raise AssertionError("a job is answered before its task is known")
        for job in jobs:
            job.rows = [self._row(job, number) for number in range(job.num)]
            if job.unwanted:
                # Cancelled before there were rows to cancel.
                job.cancel()
        rows = [row for job in jobs for row in job.rows]
        self._router.write(route.task, rows, jobs[0].sampling, route.shares)
        self._tally.wrote(route.task, rows, time.monotonic() - begin)
        for job in jobs:
            if job.route is not None:
                found = [self._router.answer(row, job.route) for row in job.rows]
                self._close(job, partial(job.done.set_result, found))

    def _row(self, job: Job, number: int) -> Row:
        told = None if job.on_text is None else partial(job.on_text, number)
        return self._router.row(job.prompt, job.sampling, told)

    def _guarded(self, jobs: Sequence[Job], work: Callable[[], None]) -> None:
        """Do something for jobs; where it fails they hear of it, and the weights are looked at."""
        try:
            if self.broken is not None:
                raise RuntimeError(self.broken)
            work()
        # Whatever a model or a request makes of it, the next request shall be answered.
        except Exception as error:
            for job in jobs:
                self._close(job, partial(job.done.set_exception, error))
            if not isinstance(error, ValueError):
                logger.error("answering failed", exc_info=error)
            # A wrong name is found out before a weight is touched, and to look at all weights takes a while.
            if not isinstance(error, UnknownTask):
                self.check_weights()

    def check_weights(self) -> None:
        """Look whether the model holds the base; nothing more is answered where it does not. Called between batches."""
        try:
            if self.broken is None and not self._router.holds_base():
                self.broken = "the weights are no longer those of the base; start the server again"
        except Exception as error:
            self.broken = f"the weights cannot be read ({error}); start the server again"
        if self.broken is not None:
            logger.error("%s", self.broken)

    def _wanted(self, jobs: list[Job]) -> list[Job]:
        """Without those that nobody waits for."""
        for job in jobs:
            if job.unwanted:
                self._close(job, job.done.cancel)
        return [job for job in jobs if not job.unwanted]

    def _close(self, job: Job, end: Callable[[], object]) -> None:
        """Give a job its end, once."""
        if job.done.done():
            return
        with self._lock:
            self._open -= 1
        with suppress(InvalidStateError):
            end()
