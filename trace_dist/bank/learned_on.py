"""What a bank says of the base that its tasks were learned on: their values suit its linear layers as they were kept then.

Each delta that is extracted from a base with 4-bit codes says so (``quantize`` in the meta of its mask), and the index with it.
Banks of earlier releases do not.
"""

from __future__ import annotations

from collections.abc import Iterable

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.config.model import Quantize
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def learned_on(bank: DeltaBank, tasks: Iterable[str] | None = None) -> Quantize:
    """How the linear layers of the base were kept where tasks were learned; all tasks unless some are named.

    Raises:
        ValueError: some were learned on a 4-bit base, and others not.
    """
    coded, plain = _kinds(bank, bank.tasks if tasks is None else tasks)
    if coded and plain:
        raise ValueError(
            f"quantize='auto': of the bank {bank.folder} {_shown(coded)} were learned on a 4-bit base, and {_shown(plain)} not; "
            "name tasks of one kind, or set quantize to nf4 or none"
        )
    return "nf4" if coded else "none"


def warn_of_others(bank: DeltaBank, quantize: Quantize) -> None:
    """Say which tasks of a bank were learned on a base that was kept otherwise."""
    coded, plain = _kinds(bank, bank.tasks)
    if coded and quantize == "none":
        logger.warning(
            "quantize='none': %s of the bank %s were learned on a 4-bit base, and their values suit that one alone; use nf4",
            _shown(coded),
            bank.folder,
        )
    if plain and quantize != "none":
        logger.warning(
            "quantize=%r: the bank %s does not say that %s were learned on a 4-bit base; where they were not, use none",
            quantize,
            bank.folder,
            _shown(plain),
        )


def _kinds(bank: DeltaBank, tasks: Iterable[str]) -> tuple[list[str], list[str]]:
    """Those that were learned on a 4-bit base, and the others."""
    records = [record for task in tasks if task != BASE and (record := bank.index.get(task)) is not None]
    coded = [record.name for record in records if "quantize" in record.facts]
    return coded, [record.name for record in records if record.name not in coded]


def _shown(tasks: list[str]) -> str:
    return ", ".join(tasks[:5]) + (f" and {len(tasks) - 5} more" if len(tasks) > 5 else "")
