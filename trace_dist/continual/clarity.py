"""How clearly prompts find their task, for the report: margins of retrieval, and how typical prompts are of what they find."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from trace_dist.bank.retrieval import Retriever

MOST = 100
"""Values that are kept of a group, evenly spaced by rank; both ends are among them."""
NONE = torch.empty(0, dtype=torch.float64)


def margins(retriever: Retriever, prompts: Mapping[str, Tensor]) -> dict[str, Any]:
    """Margins of the tasks' prompts between their own task and the best other.

    Args:
        retriever: of the bank.
        prompts: task -> [N, D] representations under the base; a task that the bank does not hold has no margins.

    Returns:
        JSON-ready: ``right`` and ``wrong``, per task the margins above 0 and the others (nats, rising, at most MOST), and
        ``num_right`` and ``num_wrong``; empty where the bank holds one task.
    """
    if len(retriever.tasks) < 2:
        return {}
    leads = [retriever.lead(x, task) if task in retriever.tasks else NONE for task, x in prompts.items()]
    return _split(leads, "right", "wrong", [lead > 0 for lead in leads])


def typicality(retriever: Retriever, prompts: Mapping[str, Tensor], rate: float) -> dict[str, Any]:
    """How much more typical prompts are of the task that they retrieve than its threshold of rejection.

    Args:
        retriever: of the bank.
        prompts: as of ``margins``.
        rate: ``bank.reject``.

    Returns:
        JSON-ready: ``rate``; ``kept`` and ``rejected``, per task the log densities above the threshold and below (nats, rising,
        at most MOST), and ``num_kept`` and ``num_rejected``. Where no threshold can be told, a prompt is kept and has no value.
    """
    above = [
        retriever.excess(x, retriever.predict(x), rate) if task in retriever.tasks else NONE
        for task, x in prompts.items()
    ]
    return {"rate": rate, **_split(above, "kept", "rejected", [~(each < 0) for each in above])}


def _split(values: list[Tensor], first: str, second: str, chosen: list[Tensor]) -> dict[str, Any]:
    parts = {
        first: [each[mine] for each, mine in zip(values, chosen, strict=True)],
        second: [each[~mine] for each, mine in zip(values, chosen, strict=True)],
    }
    numbers = {f"num_{name}": [len(part) for part in found] for name, found in parts.items()}
    return {name: [ranked(part) for part in found] for name, found in parts.items()} | numbers


def ranked(values: Tensor) -> list[float]:
    """At most MOST of the finite values, rising, evenly spaced by rank, to 4 digits."""
    rising = values[values.isfinite()].sort().values
    if len(rising) > MOST:
        rising = rising[torch.linspace(0, len(rising) - 1, MOST).round().long()]
    return [float(f"{value:.4g}") for value in rising.tolist()]
