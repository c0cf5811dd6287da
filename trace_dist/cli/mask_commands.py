"""``trace-dist mask``: look at mask files, compare them and combine them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any

from rich.table import Table

from trace_dist.masks.mask import Mask, check_combinable, combine
from trace_dist.masks.ops import overlap
from trace_dist.masks.select import SetOperation, combined_units
from trace_dist.masks.stats import Count, summed, tensor_counts
from trace_dist.utils.files import check_writable
from trace_dist.utils.tables import print_table


def mask_command(values: Any) -> None:
    """One action of ``mask``, with the parsed arguments.

    Raises:
        ValueError: a file is no mask, masks do not belong together, or nothing is left.
    """
    ACTIONS[values.action](values[values.action])


def _show(arguments: Any) -> None:
    file, picture = arguments.file, arguments.picture
    mask = Mask.load(file) if picture is None else _drawn(file, Path(picture))
    table = Table("tensor", "units", "density")
    for name in mask.layouts:
        table.add_row(name, str(len(mask.units.get(name, ()))), f"{mask.tensor_density(name):.4f}")
    print_table(table, markup=False)
    _say(mask)


def _drawn(file: str, picture: Path) -> Mask:
    """A mask, of which a picture is written."""
    from trace_dist.report.mask_picture import check_picture, mask_picture
    from trace_dist.stages.report import mask_heat_map

    check_picture(picture)
    check_writable(picture, "picture")
    mask = Mask.load(file)
    mask_picture(mask_heat_map(mask), str(mask.meta.get("task") or Path(file).stem), picture)
    return mask


def _say(mask: Mask) -> None:
    facts = f"{mask.granularity} mask, density {mask.density:.5f}, {mask.num_entries} entries"
    print(f"{facts}, {json.dumps(dict(mask.meta))}")


def _stats(arguments: Any) -> None:
    mask = Mask.load(arguments.file)
    tensors = tensor_counts(mask)
    layers = summed(tensors, lambda each: each.layer)
    inside = {layer: layers[layer] for layer in sorted(layer for layer in layers if layer is not None)}
    outside = {"outside": layers[None]} if None in layers else {}
    _print_counts("role", summed(tensors, lambda each: each.role), mask.num_entries)
    _print_counts("layer", {**inside, **outside}, mask.num_entries)
    _print_counts("tensor", {each.name: each.count for each in tensors}, mask.num_entries)
    _say(mask)


def _print_counts(what: str, counts: Mapping[Any, Count], total: int) -> None:
    table = Table(what, "tensors", "units", "entries", "density", "% of the mask")
    for column in table.columns[1:]:
        column.justify = "right"
    for key, count in counts.items():
        shares = f"{count.density:.5f}", f"{100 * count.entries / total:.2f}"
        table.add_row(
            str(key), f"{count.touched}/{count.tensors}", str(count.units), str(count.entries), *shares
        )
    print_table(table, markup=False)


def _diff(arguments: Any) -> None:
    left, right = _load([arguments.left, arguments.right])
    parts = {
        "only the first": _entries(left, right, "difference"),
        "only the second": _entries(right, left, "difference"),
        "both": _entries(left, right, "intersection"),
    }
    table = Table("tensor", *parts, title="entries")
    for column in table.columns[1:]:
        column.justify = "right"
    for name in left.layouts:
        numbers = [part.get(name, 0) for part in parts.values()]
        if any(numbers[:2]):
            table.add_row(name, *map(str, numbers))
    if table.row_count:
        print_table(table, markup=False)
    totals = {what: sum(part.values()) for what, part in parts.items()}
    same = "" if table.row_count else "; they select the same"
    print(", ".join(f"{total} entries in {what}" for what, total in totals.items()) + same)


def _entries(left: Mask, right: Mask, operation: SetOperation) -> dict[str, int]:
    """Parameter -> entries that an operation selects; none where it selects nothing."""
    units = combined_units(left.units, right.units, left.layouts, operation)
    return {name: int(left.layouts[name].sizes(chosen).sum()) for name, chosen in units.items()}


def _overlap(arguments: Any) -> None:
    from trace_dist.bank.overlap import mask_overlap

    masks, names = _load(arguments.masks), _names(arguments.masks)
    table = Table("% of the row's entries", *names)
    for name, row in zip(names, mask_overlap(masks).tolist(), strict=True):
        table.add_row(name, *(f"{100 * share:.2f}" for share in row))
    print_table(table, markup=False)
    for (first, one), (second, other) in combinations(zip(names, masks, strict=True), 2):
        print(f"{first} and {second}: {overlap(one, other):.5f} of the entries of either are in both")


def _names(files: list[str]) -> list[str]:
    """The files in short: without folders, where that tells them apart."""
    stems = [Path(file).stem for file in files]
    return stems if len(set(stems)) == len(stems) else list(files)


def _load(files: list[str]) -> list[Mask]:
    """Masks of one model. Raises ValueError where there are too few, or they do not belong together."""
    if len(files) < 2:
        raise ValueError(f"masks={files}: there is nothing to compare with; name two files at least")
    masks = [Mask.load(file) for file in files]
    for file, mask in zip(files[1:], masks[1:], strict=True):
        check_combinable(masks[0], mask, (files[0], file))
    return masks


def _operate(operation: SetOperation, arguments: Any) -> None:
    """Combine masks from left to right, and write the result."""
    files, out = arguments.masks, arguments.out
    if Path(out).resolve() in [Path(file).resolve() for file in files]:
        raise ValueError(f"out={out!r}: is one of the masks that are combined; name another file")
    check_writable(out, "out")
    masks = _load(files)
    names = (" and ".join(files[:-1]), files[-1])
    result = reduce(lambda left, right: combine(left, right, operation, names), masks)
    result.with_meta(of=_names(files)).save(out)
    print(out, end=": ")
    _say(result)


ACTIONS: dict[str, Callable[[Any], None]] = {
    "show": _show,
    "stats": _stats,
    "diff": _diff,
    "overlap": _overlap,
    "union": partial(_operate, "union"),
    "intersect": partial(_operate, "intersection"),
    "subtract": partial(_operate, "difference"),
}
