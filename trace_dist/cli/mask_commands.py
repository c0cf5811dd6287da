"""``trace-dist mask``: look at mask files and combine them."""

from __future__ import annotations

import json
from typing import Any

from rich.console import Console
from rich.table import Table

from trace_dist.masks.mask import Mask, combine


def mask_command(values: Any) -> None:
    """``show`` or ``combine``, with the parsed arguments.

    Raises:
        ValueError: a file is no mask, or two masks do not belong to one model.
    """
    arguments = values[values.action]
    if values.action == "combine":
        left, right = Mask.load(arguments.left), Mask.load(arguments.right)
        combine(left, right, arguments.operation).save(arguments.out)
        return
    mask = Mask.load(arguments.file)
    table = Table("tensor", "units", "density")
    for name in mask.layouts:
        table.add_row(name, str(len(mask.units.get(name, ()))), f"{mask.tensor_density(name):.4f}")
    Console(markup=False).print(table)
    facts = f"{mask.granularity} mask, density {mask.density:.5f}, {mask.num_entries} entries"
    print(f"{facts}, {json.dumps(dict(mask.meta))}")
