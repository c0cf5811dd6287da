"""Commands that look at files: ``trace-dist mask`` and ``trace-dist bank``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def mask_command(values: Any) -> None:
    """``show`` or ``combine``, with the parsed arguments.

    Raises:
        ValueError: a file is no mask, or two masks do not belong to one model.
    """
    from trace_dist.masks.format import Mask
    from trace_dist.masks.ops import combine

    arguments = values[values.action]
    if values.action == "combine":
        left, right = Mask.load(arguments.left), Mask.load(arguments.right)
        combine(left, right, arguments.operation).save(arguments.out)
        return
    mask = Mask.load(arguments.file)
    table = Table("tensor", "units", "density")
    for name in mask.layouts:
        table.add_row(name, str(len(mask.units.get(name, ()))), f"{mask.tensor_density(name):.4f}")
    Console().print(table)
    facts = f"{mask.granularity} mask, density {mask.density:.5f}, {mask.num_entries} entries"
    print(f"{facts}, {json.dumps(dict(mask.meta))}")


def bank_command(values: Any) -> None:
    """``show`` or ``export``, with the parsed arguments.

    Raises:
        ValueError: the folder is no bank, or it belongs to another base.
    """
    from trace_dist.bank.bank import DeltaBank

    arguments = values[values.action]
    bank = DeltaBank(arguments.folder)
    if values.action == "export":
        _export(bank, arguments)
        return
    table = Table("task", "clusters", "delta", "entries")
    for signature in bank.retriever.signatures:
        delta = bank.delta(signature.task)
        size = ("-", "-")
        if delta is not None:
            size = (f"{delta.nbytes / 2**20:.2f} MiB", str(delta.mask.num_entries))
        table.add_row(signature.task, str(len(signature.weights)), *size)
    Console().print(table)


def _export(bank: Any, arguments: Any) -> None:
    from trace_dist.models.fingerprint import check_same, fingerprint
    from trace_dist.models.loading import load_tokenizer
    from trace_dist.sharding.build import load_sharded

    check_same(bank.base, fingerprint(arguments.base), "bank")
    model = load_sharded(arguments.base, arguments.dtype)
    with bank.activated(model, arguments.task):
        model.save_pretrained(Path(arguments.out))
    load_tokenizer(arguments.base).save_pretrained(arguments.out)
