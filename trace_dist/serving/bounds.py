"""How often does retrieval go wrong? What the held-out prompts of a bank say of it; read as it is asked for."""

from __future__ import annotations

from trace_dist.bank.bound import clopper_pearson_upper, heldout_errors
from trace_dist.bank.retrieval import Retriever


class Bounds:
    """Limits on the error of each task.

    Args:
        retriever: the bank's; nothing may be added to it afterwards.
    """

    def __init__(self, retriever: Retriever) -> None:
        self._retriever = retriever
        self._index = {task: index for index, task in enumerate(retriever.tasks)}
        self._bounds: dict[str, float] = {}

    def of(self, task: str) -> float | None:
        """Upper 95 % limit (Clopper-Pearson) on the share of the task's prompts that another task is retrieved for.

        None for a task without a signature.
        """
        index = self._index.get(task)
        if index is None:
            return None
        if task not in self._bounds:
            trials = len(self._retriever.signatures[index].heldout)
            self._bounds[task] = clopper_pearson_upper(heldout_errors(self._retriever, index), trials)
        return self._bounds[task]
