"""Tasks of a bank in the form that other tools read, by an exporter of this room or of a module of one's own.

An exporter ([Note: drop-in parts]) is a module with ``label`` and ``write(deltas, out, base, dtype)``, which also takes
``options`` where the module has ``Options``. It is given deltas and not tasks, since one set of weights that a method has made is
no task. Where the form cannot hold every tensor, ``check(deltas, base)`` says so by name, before any weights are read; where it
keeps values as they are, ``same_dtype = True`` has other dtypes refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import Delta, check_base
from trace_dist.bank.export.folder import replaced
from trace_dist.bank.export.together import held_dtypes
from trace_dist.bank.learned_on import learned_on
from trace_dist.config.checks import check
from trace_dist.config.model import Dtype
from trace_dist.models.fingerprint import check_same, fingerprint
from trace_dist.models.weight_files import resolve
from trace_dist.parts import EXPORTERS
from trace_dist.sharding.build import load_sharded
from trace_dist.utils.files import check_apart, check_folder
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)


def export(
    bank: DeltaBank,
    tasks: Sequence[str],
    out: Path | str,
    base: str,
    dtype: str = "auto",
    kind: str = "hf",
    options: Mapping[str, Any] | None = None,
    files: Sequence[Path | str] = (),
) -> None:
    """Write tasks of a bank for another tool.

    Args:
        bank: the bank.
        tasks: whose deltas; the base model's are none.
        out: folder to write.
        base: the bank's base model: folder or hub id.
        dtype: of the weights: float32, bfloat16, or auto for that of the deltas, which most forms must have.
        kind: name of an exporter, or the path of a module.
        options: its options.
        files: deltas beside those of the tasks, such as the one set of weights that a method has made.

    Raises:
        ValueError: a task is not in the bank, a file is no delta, or the same is given twice; the base is not the bank's; the
            folder is the base's or the bank's, lies in it or holds it, or holds a model that no export wrote; the folder
            cannot be written; there is no such exporter, or its form cannot hold the deltas. Nothing is written then.
    """
    exporter = EXPORTERS.load(kind)
    chosen = EXPORTERS.options(kind, options)
    out = Path(out)
    if not tasks and not files:
        raise ValueError("task: none is given to export; name at least one, or a delta")
    for number, task in enumerate(tasks):
        bank.path(task)
        check(task not in tasks[:number], "task", task, "is given twice", "name it once")
    if out.exists() and not out.is_dir():
        raise ValueError(f"out={str(out)!r}: is a file; give a folder")
    check_apart(out, {"the base model": resolve(base), "the bank": bank.folder})
    replaced(out)
    check_folder(out)
    deltas = _deltas(bank, tasks, base)
    for path in files:
        delta = Delta.load(Path(path))
        check_base(delta.mask, bank.base, str(path))
        twice = any(delta.task == each.task and delta.mask == each.mask for each in deltas)
        check(not twice, "delta", str(path), f"task {delta.task!r} is given twice", "name it once")
        deltas.append(delta)
    found = _dtype(deltas, dtype)
    held = held_dtypes(deltas)
    if getattr(exporter, "same_dtype", False) and held and found not in held:
        raise ValueError(
            f"dtype={dtype!r}: the deltas hold {' and '.join(held)}, and {kind} keeps values as they are; leave it out, or "
            "export as hf"
        )
    if hasattr(exporter, "check"):
        exporter.check(deltas, base)
    check_same(bank.base, fingerprint(base), f"bank {bank.folder}")
    coded = [delta.task for delta in deltas if "quantize" in delta.mask.meta]
    if coded:
        logger.warning(
            "%s: learned on a 4-bit base, whose other weights the values were fitted to; beside the base's own, in %s, answers "
            "differ from those that were scored",
            ", ".join(coded),
            found,
        )
    extra = {} if chosen is None else {"options": chosen}
    exporter.write(deltas, out, base, found, **extra)


def _deltas(bank: DeltaBank, tasks: Sequence[str], base: str) -> list[Delta]:
    """The tasks' deltas, whole; the base's weights are read where one is kept as a recipe."""
    made = [task for task in tasks if bank.recipe(task)]
    if not made:
        return [delta for task in tasks if (delta := bank.delta(task)) is not None]
    check_same(bank.base, fingerprint(base), f"bank {bank.folder}")
    own = [delta for task in tasks if (delta := bank.own_delta(task)) is not None]
    # What a recipe makes depends on the base's values.
    model = load_sharded(base, _dtype(own, "auto"), "single", learned_on(bank, made))
    return [delta for task in tasks if (delta := bank.delta_on(task, model)) is not None]


def _dtype(deltas: Sequence[Delta], asked: str) -> str:
    """The dtype of the weights. Raises ValueError where it is none, or the deltas hold several."""
    known = get_args(Dtype)
    if asked not in (*known, "auto"):
        raise ValueError(f"dtype={asked!r}: unknown; use auto, {' or '.join(known)}")
    held = held_dtypes(deltas)
    if len(held) > 1:
        raise ValueError(f"dtype={asked!r}: the deltas hold {' and '.join(held)}; export those of one dtype")
    if asked != "auto":
        return asked
    return next(iter(held), "float32")
