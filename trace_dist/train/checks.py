"""What makes a run impossible, found in its data before anything is trained."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trace_dist.bank.signature import MIN_PROMPTS
from trace_dist.config import BankConfig, DataConfig, EvalConfig
from trace_dist.config.checks import AUTO, check
from trace_dist.data.modality import TEXT, load_modality
from trace_dist.data.tasks import Task
from trace_dist.data.vocabulary import check_ids
from trace_dist.evaluation.metric import check_metric, load_metric
from trace_dist.run_folder import BankFolder


@dataclass(frozen=True)
class Reader:
    """A model that will read the tasks, as far as it is known before it is loaded.

    ``role``: target or proxy. ``tokenizer``: what reads examples (``Modality.load_reader``); None where it is not made yet.
    ``context``: positions; None without a limit. ``num_layers``: layers; None where unknown. ``scored``: whether it
    reads test examples as well. ``vocab_size``: token ids that it has an embedding for; None where its tokenizer is made for it.
    """

    role: str
    tokenizer: Any
    context: int | None
    num_layers: int | None
    scored: bool
    vocab_size: int | None = None


def check_tasks(
    tasks: Sequence[Task],
    general: Sequence[Task],
    readers: Sequence[Reader],
    *,
    data: DataConfig,
    evaluation: EvalConfig,
    bank: BankConfig,
) -> None:
    """Check metrics, and counts, empty texts and lengths of all examples.

    Args:
        tasks: what is learned.
        general: the general sets.
        readers: the models that will read them; none that is not made yet and not known.
        data: longest example and truncation.
        evaluation: generation cap.
        bank: number of prompts and layer of signatures.

    Raises:
        ValueError: the first fault found, with its task.
    """
    modality = load_modality(data.modality)
    for task in (*tasks, *general):
        _check_scored(task, data.modality)
        check_metric(task)
        _check_texts(task)
    _check_counts(tasks, general, bank)
    _check_choosable([*tasks, *general], bank)
    known = (AUTO, *modality.poolings)
    rule = f"examples of data.modality={data.modality!r} are not represented so"
    check(bank.pooling in known, "bank.pooling", bank.pooling, rule, f"choose among {', '.join(known)}")
    for reader in readers:
        _check_layer(reader, bank)
        for task in (*tasks, *general):
            with _of(task):
                modality.check_size(
                    task, reader.tokenizer, reader.role, reader.context, reader.scored, data, evaluation
                )
                if reader.vocab_size is not None:
                    check_ids(task, reader.tokenizer, reader.role, reader.vocab_size, reader.scored)


@contextmanager
def _of(task: Task) -> Iterator[None]:
    """Names the task in an error."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{task.where}: {error}") from error


def _check_scored(task: Task, modality: str) -> None:
    """A metric reads the answers of one modality; of text where it says nothing."""
    scores = getattr(load_metric(task).module, "modality", TEXT)
    if scores != modality:
        raise ValueError(
            f"{task.where}.metric={task.metric!r}: scores tasks of data.modality {scores}, but this run's is {modality}; "
            "use top1 for images, and any other metric for texts"
        )


def _check_texts(task: Task) -> None:
    empty = [i for i, answer in enumerate(task.test["answer"][:]) if not answer]
    if task.metric == "bits_per_byte" and empty:
        raise ValueError(
            f"{task.where}: the answer of test example {empty[0]} is empty, so it has no bits per byte; "
            "drop it or choose another metric"
        )


def _check_counts(tasks: Sequence[Task], general: Sequence[Task], bank: BankConfig) -> None:
    """A signature needs prompts; the general sets share one."""
    for group, name in [*(([task], task.where) for task in tasks), (general, "general")]:
        share = -(-bank.num_prompts // max(1, len(group)))
        found = sum(min(share, len(task.train)) for task in group)
        if group and found < MIN_PROMPTS:
            raise ValueError(
                f"{name}: {found} training prompts for its signature, must be at least {MIN_PROMPTS}; "
                f"add examples, and keep bank.num_prompts={bank.num_prompts} and num_train above"
            )


def _check_choosable(sets: Sequence[Task], bank: BankConfig) -> None:
    """Layer and pooling are chosen by telling sets of prompts apart, when a bank is begun."""
    begun = bank.path is not None and BankFolder(Path(bank.path)).index.is_file()
    for name, cure in (("layer", "give a layer (-1 is the last)"), ("pooling", "name one (mean)")):
        if getattr(bank, name) == AUTO and len(sets) < 2 and not begun:
            raise ValueError(
                f"bank.{name}='auto': is chosen by telling sets of prompts apart, and there is one; add a general set, or {cure}"
            )


def _check_layer(reader: Reader, bank: BankConfig) -> None:
    last = reader.num_layers
    if bank.layer == AUTO or not reader.scored or last is None:
        return
    if not -last - 1 <= bank.layer <= last:
        raise ValueError(
            f"bank.layer={bank.layer}: must lie in [{-last - 1}, {last}] for the {reader.role} (0 is the embedding); "
            "use -1 for the last"
        )
