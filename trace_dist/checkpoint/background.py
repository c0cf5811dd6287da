"""Checkpoints that are written while training goes on: it waits for a copy of the states in host memory, and for nothing else.

A thread of every rank writes that rank's file, as ``writer.Draft`` does, one checkpoint at a time: the next one, and the end of
training, wait for it.

[Note: agreement] Rank 0 may name a checkpoint whole only when every rank has written. The threads do not ask each other: a
collective of theirs would need connections of its own, or meet those of training in another order on another rank. The main
threads ask between two steps, where all ranks are at the same place, and only while a checkpoint is on its way. So an error
of one rank's thread is raised in all main threads, before the next step. A checkpoint bears its name a step after the last file
was written; what a killed job loses by that is this one step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trace_dist.checkpoint.retention import KEEP
from trace_dist.checkpoint.writer import Contents, Draft, check_values
from trace_dist.utils import dist
from trace_dist.utils.together import on_all

FAILED = "failed"


class Background:
    """Writes the checkpoints of one training. Every rank has one, and calls the same methods at the same places."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._draft: Draft | None = None
        self._work: Future[Any]
        """What this rank's thread does for ``_draft``."""
        self._is_last = False
        """Whether the checkpoint is whole once this work is done on every rank."""
        self._buffers: dict[str, Tensor] = {}

    def save(
        self, root: Path, step: int, contents: Contents, state: dict[str, Any], keep: int = KEEP
    ) -> Path:
        """Copy the tensors and begin to write. Collective. Arguments as ``write_checkpoint``.

        Returns:
            The folder that will be there.

        Raises:
            ValueError: the state is not JSON, the disk has no room, or an earlier checkpoint could not be written.
        """
        self.finish()
        draft = Draft.begin(root, step, self._copied(contents), state, keep)
        alone = dist.world_size() == 1
        self._begin(draft, lambda: _write_alone(draft) if alone else _write(draft), is_last=alone)
        return draft.final

    def attend(self) -> None:
        """Go on with what is on its way, without waiting for it. Collective.

        Raises:
            ValueError: it could not be written: a value is not finite, the disk is full. On every rank.
            RuntimeError: the thread of a rank raised something else. On every rank.
        """
        self._go_on(waits=False)

    def finish(self) -> None:
        """Wait until what is on its way is whole. Collective; errors as ``attend``."""
        while self._draft is not None:
            self._go_on(waits=True)

    def close(self) -> None:
        """Wait for this rank's thread, and end it. Not collective: what is on its way stays without a name if ranks share it."""
        self._thread.shutdown()
        self._buffers.clear()

    def _begin(self, draft: Draft, work: Callable[[], Any], is_last: bool) -> None:
        self._draft, self._is_last, self._work = draft, is_last, self._thread.submit(work)

    def _go_on(self, waits: bool) -> None:
        draft = self._draft
        if draft is None:
            return
        if waits:
            wait([self._work])
        words = dist.gather_objects(_word(self._work))
        if FAILED in words:
            self._fail(draft)
        if None in words:
            return
        if self._is_last:
            self._draft = None
            return
        files = dict(word for (word,) in words)
        self._begin(draft, lambda: draft.announce(files) if dist.is_main() else None, is_last=True)

    def _fail(self, draft: Draft) -> None:
        """Raise the error of a thread on every rank, once none of them writes."""
        self._draft = None
        wait([self._work])
        try:
            on_all(self._work.result)
        finally:
            if dist.is_main():
                draft.abandon()

    def _copied(self, contents: Contents) -> Contents:
        """The contents, the tensors as they are now, in host memory that is used again and again."""
        tensors = {name: self._copy(name, tensor.detach()) for name, tensor in contents.tensors.items()}
        _await_copies(contents.tensors.values())
        return replace(contents, tensors=tensors)

    def _copy(self, name: str, tensor: Tensor) -> Tensor:
        buffer = self._buffers.get(name)
        if buffer is None or (buffer.shape, buffer.dtype) != (tensor.shape, tensor.dtype):
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._buffers[name] = buffer
        return buffer.copy_(tensor, non_blocking=True)


def _await_copies(tensors: Iterable[Tensor]) -> None:
    """Wait until copies of some tensors are there: they run where the tensors are, which need not be the current device."""
    for device in {tensor.device for tensor in tensors if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _write(draft: Draft) -> tuple[str, dict[str, Any]]:
    check_values(draft.step, draft.contents)
    return draft.write()


def _write_alone(draft: Draft) -> None:
    """All of it, where there is no other rank to wait for."""
    draft.announce(dict([_write(draft)]))


def _word(work: Future[Any]) -> Any:
    """What the other ranks need to know of some work: None while it is being done."""
    if not work.done():
        return None
    return FAILED if work.exception() is not None else (work.result(),)
