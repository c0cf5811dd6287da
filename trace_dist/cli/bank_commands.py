"""``trace-dist bank``: look into a bank of deltas, keep it in order, export from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.table import Table

from trace_dist.bank.bank import BASE, DeltaBank
from trace_dist.models.trust import trust
from trace_dist.utils.tables import print_table


def bank_command(values: Any) -> None:
    """One action of ``bank``, with the parsed arguments.

    Raises:
        ValueError: the folder is no bank, or as the action says.
    """
    arguments = values[values.action]
    ACTIONS[values.action](DeltaBank(arguments.folder), arguments)


def _show(bank: DeltaBank, arguments: Any) -> None:
    columns = ["task", "clusters", "delta", "entries", "density", "granularity", "dtype"]
    needs = {name: _needs(bank, name) for name in bank.tasks}
    # Of the own part of a task that is kept as a recipe.
    table = Table(*columns, *(["recipe over"] if any(needs.values()) else []))
    for name in bank.tasks:
        facts, size = bank.facts(name), bank.delta_bytes(name)
        delta = ["-"] * 5
        if size is not None:
            delta = [f"{size / 2**20:.2f} MiB", str(facts.get("entries", "-"))]
            delta += [f"{facts.get('density', math.nan):.5f}"]
            delta += [facts.get("granularity", "-"), facts.get("dtype", "-")]
        over = [needs[name] or "-"] if any(needs.values()) else []
        table.add_row(name, str(facts.get("clusters", "-")), *delta, *over)
    print_table(table, markup=False)
    pooling = "" if bank.pooling == "mean" else f", pooling {bank.pooling}"
    print(f"generation {bank.generation}, layer {bank.layer}{pooling}, base model {bank.base}")


def _needs(bank: DeltaBank, task: str) -> str:
    """The tasks that a recipe is made of; a damaged one hides no other task."""
    try:
        return ", ".join(bank.needs(task))
    except ValueError:
        return "damaged"


def _verify(bank: DeltaBank, arguments: Any) -> None:
    from trace_dist.bank.verify import verify

    problems = verify(bank)
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(
            f"bank {bank.folder}: {len(problems)} problems, listed above; restore what is damaged"
        )
    print(f"{len(bank.tasks)} signatures and their deltas are as they were written")


def _add(bank: DeltaBank, arguments: Any) -> None:
    from trace_dist.bank.folder import read_task

    task, before = read_task(Path(arguments.source), bank, arguments.name), bank.generation
    bank.add(task.signature, task.delta, task.sketch, task.facts, task.prompts, task.adapted, task.recipe)
    name = task.signature.task
    _say(bank, f"added {name}" if bank.generation > before else f"{name} was there already, the very same")


def _remove(bank: DeltaBank, arguments: Any) -> None:
    bank.remove(arguments.task)
    _say(bank, f"removed {arguments.task}")


def _rename(bank: DeltaBank, arguments: Any) -> None:
    bank.rename(arguments.task, arguments.name)
    _say(bank, f"renamed {arguments.task} to {arguments.name}")


def _merge(bank: DeltaBank, arguments: Any) -> None:
    from trace_dist.bank.merge import merge

    _say(
        merge(bank, DeltaBank(arguments.other), arguments.out), f"merged {bank.folder} and {arguments.other}"
    )


def _say(bank: DeltaBank, done: str) -> None:
    """Print what was done, and how many tasks a bank holds now."""
    count = sum(name != BASE for name in bank.tasks)
    print(f"{done}: the bank {bank.folder} holds {count} task{'' if count == 1 else 's'}")


def _export(bank: DeltaBank, arguments: Any) -> None:
    from trace_dist.bank.export import export

    if arguments.trust_remote_code:
        trust(arguments.base)
    options = None if arguments.composition is None else {"composition": arguments.composition}
    export(
        bank,
        arguments.task,
        arguments.out,
        arguments.base,
        arguments.dtype,
        arguments.format,
        options,
        arguments.delta,
    )
    print(f"written: {arguments.out}")


ACTIONS = {
    "show": _show,
    "verify": _verify,
    "add": _add,
    "remove": _remove,
    "rename": _rename,
    "merge": _merge,
    "export": _export,
}
