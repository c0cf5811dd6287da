"""Of which prompts a signature is made."""

from __future__ import annotations

from functools import cache as once
from typing import Any

from trace_dist.bank.signature import MIN_PROMPTS
from trace_dist.data.examples import different
from trace_dist.data.tasks import Task
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def seen_once(task: Task, most: int) -> list[Any]:
    """A task's first training prompts, each once, for a signature.

    A prompt that is held out and fitted as well is no unseen one: limits on errors, and what is rejected, would rest on it. Where
    hardly any differ, all are taken as they stand.
    """
    prompts = task.train["prompt"]
    found = different(prompts, most)
    if len(found) >= min(most, MIN_PROMPTS):
        return found
    _say_few(task.where, len(found))
    return list(prompts[:most])


@once
def _say_few(task: str, num: int) -> None:
    logger.warning(
        "%s: has %d different prompts, so that none can be held out of its signature: the limits on errors, and the "
        "share of its prompts that is rejected, hold for these alone",
        task, num,
    )  # fmt: skip
