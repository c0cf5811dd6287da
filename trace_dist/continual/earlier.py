"""What a new task finds of those before it: the masks in a run and its bank, and how far tasks in a bank moved their entries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from trace_dist.bank.bank import DeltaBank
from trace_dist.bank.delta import extract_delta
from trace_dist.config import RunConfig
from trace_dist.config.checks import AUTO
from trace_dist.config.mask import ShareOf
from trace_dist.continual.isolation.base import Change, load_isolation
from trace_dist.masks.layouts import layouts_for
from trace_dist.masks.mask import Mask
from trace_dist.masks.room import free_elements
from trace_dist.masks.select import Units
from trace_dist.masks.units import UnitLayout
from trace_dist.models.architecture import empty_model, read_config
from trace_dist.models.fingerprint import check_same
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils.names import BASE
from trace_dist.utils.together import on_main


def bank_before(cfg: RunConfig, method: str, fingerprint: str) -> tuple[DeltaBank | None, list[str]]:
    """A method's bank and its tasks that are not of this run; None where there is no bank yet. Collective.

    Raises:
        ValueError: the bank is damaged, or of another base.
    """
    folder = cfg.bank_of(method)
    if not on_main(folder.index.is_file):
        return None, []
    bank, own = DeltaBank(folder.root), {task.name for task in cfg.tasks}
    check_same(bank.base, fingerprint, f"bank {folder.root}")
    return bank, [name for name in bank.tasks if name != BASE and name not in own]


def changes_in(bank: DeltaBank, model: ShardedModel, names: Iterable[str], task: str) -> Iterator[Change]:
    """How far tasks of a bank moved their entries, one at a time. Collective.

    Args:
        bank: holds the tasks.
        model: holds the base.
        names: of the tasks.
        task: the new one, for errors.

    Raises:
        ValueError: the bank has lost a task since the new one's mask was made.
    """
    for name in names:
        if name not in bank.tasks:
            raise ValueError(
                f"mask.isolation: the mask of {task!r} was made beside {name!r}, which the bank {bank.folder} no longer "
                "holds; put it back, or delete the mask's file to make it anew"
            )
        after = bank.delta_on(name, model)
        if after is None:
            raise AssertionError(f"{name}: the base model is no earlier task")
        yield Change.between(extract_delta(model, after.mask, name), after)


def check_room(
    layouts: Mapping[str, UnitLayout],
    density: float,
    refused: Units,
    task: str,
    isolation: str,
    share_of: ShareOf = "elements",
    num_tasks: int = 1,
) -> None:
    """Raise ValueError where the masks of a task, or of the first of ``num_tasks`` that share nothing, do not fit beside those
    before it; before they are looked for."""
    if share_of == "tensors":
        total, room, what = len(layouts), len(layouts) - len(refused), "tensors"
    else:
        total, what = sum(layout.numel for layout in layouts.values()), "entries"
        room = sum(free_elements(layouts, refused).values())
    wanted = int(density * total + 0.5)
    if num_tasks * wanted > room:
        lower = f"lower mask.density to {_rounded_down(room / total / num_tasks)} at most, " if room else ""
        others = "" if num_tasks == 1 else f" and each of {num_tasks - 1} after it"
        raise ValueError(
            f"mask.isolation={isolation!r}: task {task!r}{others} needs {wanted:,} {what}, and of {total:,} earlier tasks "
            f"have left {room:,}; {lower}widen mask.maskable, or set mask.isolation: soft"
        )


def _rounded_down(share: float) -> str:
    """With three digits, never more than it is."""
    step = 10.0 ** (math.floor(math.log10(share)) - 2)
    return f"{math.floor(share / step) * step:.3g}"


def check_room_beside(cfg: RunConfig, bank: DeltaBank) -> None:
    """Raise ValueError where a run's masks find no room beside the tasks of other runs in its bank; before any work.

    Reads the bank's masks, and of the target its config alone; of a target that is not made yet nothing is known.
    """
    of, path = cfg.mask, Path(cfg.target.path)
    names = [task.name for task in cfg.tasks]
    earlier = [name for name in bank.tasks if name not in (BASE, *names)]
    unmade = cfg.target.made and not (path / "config.json").is_file()
    if of.isolation == "shared" or unmade or not earlier:
        return
    what = f"target.path={cfg.target.path!r}"
    config = read_config(path if path.exists() else cfg.target.path, what)
    module = empty_model(config, torch.float32, what)
    layouts = layouts_for(module, of.granularity, of.block, of.maskable)
    isolation = load_isolation(of)
    refused = isolation.refused(layouts, (bank.mask(name) for name in earlier))
    count = len(names) if isolation.disjoint else 1
    # A race may choose the smallest one.
    density = min(cfg.race.densities) if of.density == AUTO else of.share
    check_room(layouts, density, refused, names[0], of.isolation, of.share_of, count)


def check_apart(mask: Mask, refused: Units, what: str, isolation: str) -> None:
    """Raise ValueError where a mask that was given, or made before other tasks came, takes what is refused."""
    taken = 0
    for name in set(mask.units).intersection(refused):
        units = mask.units[name].long()
        common = units[torch.isin(units, refused[name].long())]
        taken += int(mask.layouts[name].sizes(common).sum())
    if taken:
        raise ValueError(
            f"{what}: {taken:,} of its {mask.num_entries:,} entries are earlier tasks', which mask.isolation={isolation!r} "
            "refuses; give another mask, delete the file to have one made, or set mask.isolation: soft"
        )
