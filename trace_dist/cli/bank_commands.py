"""``trace-dist bank``: look into a bank of deltas, keep it in order, export from it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta
from trace_dist.bank.prompts import load_prompts
from trace_dist.bank.signature import Signature
from trace_dist.bank.sketch import Sketch
from trace_dist.models.trust import trust
from trace_dist.run_folder import ADAPTED, DELTA, PROMPTS, SIGNATURE, SKETCH


def bank_command(values: Any) -> None:
    """One action of ``bank``, with the parsed arguments.

    Raises:
        ValueError: the folder is no bank, or as the action says.
    """
    arguments = values[values.action]
    ACTIONS[values.action](DeltaBank(arguments.folder), arguments)


def _show(bank: DeltaBank, arguments: Any) -> None:
    table = Table("task", "clusters", "delta", "entries", "density", "granularity", "dtype")
    for name in bank.tasks:
        facts, size = bank.facts(name), bank.delta_bytes(name)
        delta = ["-"] * 5
        if size is not None:
            delta = [f"{size / 2**20:.2f} MiB", str(facts.get("entries", "-"))]
            delta += [f"{facts.get('density', math.nan):.5f}"]
            delta += [facts.get("granularity", "-"), facts.get("dtype", "-")]
        table.add_row(name, str(facts.get("clusters", "-")), *delta)
    Console(markup=False).print(table)
    print(f"generation {bank.generation}, layer {bank.layer}, base model {bank.base}")


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
    source = Path(arguments.source)
    sketch = Sketch.load(source / SKETCH) if (source / SKETCH).is_file() else None
    prompts = load_prompts(source / PROMPTS) if (source / PROMPTS).is_file() else None
    adapted = Signature.load(source / ADAPTED) if (source / ADAPTED).is_file() else None
    signature, delta = Signature.load(source / SIGNATURE), Delta.load(source / DELTA)
    bank.add(signature, delta, sketch, prompts=prompts, adapted=adapted)


def _remove(bank: DeltaBank, arguments: Any) -> None:
    bank.remove(arguments.task)


def _rename(bank: DeltaBank, arguments: Any) -> None:
    bank.rename(arguments.task, arguments.name)


def _merge(bank: DeltaBank, arguments: Any) -> None:
    from trace_dist.bank.merge import merge

    merge(bank, DeltaBank(arguments.other), arguments.out)


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


ACTIONS = {
    "show": _show,
    "verify": _verify,
    "add": _add,
    "remove": _remove,
    "rename": _rename,
    "merge": _merge,
    "export": _export,
}
