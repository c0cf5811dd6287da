"""How long until another task can be answered: a delta beside a merged checkpoint and PEFT's adapters, and what bounds it.

A swap puts a task's delta into the weights and takes it out again, which is what it takes from task to task. Its alternatives
are to load the task's merged checkpoint, and to switch PEFT's LoRA adapters of as many parameters, which changes no weight and
costs two more products in every layer instead. All take turns.

[Note: loading] Loading is as fast as it can be: the files are in the page cache, transformers maps them and copies nothing (on a
CPU; an accelerator gets a copy), and it ends when one value of each page has been read, since only then the weights can be used
without a page fault. One model after the other is let go of within the time.

[Note: moved bytes] In each direction a server's swap on a CPU reads values, the delta's or the base's own, and writes every cache
line of the weights that holds a masked entry; a line that holds others too is read before. Of single elements at 5 % in bf16
those are four lines out of five.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trace_dist.bank.delta import Delta, made_ready
from trace_dist.benchmarks.contestants import Race
from trace_dist.benchmarks.peers import with_adapters
from trace_dist.benchmarks.timing import now
from trace_dist.masks.mask import Mask
from trace_dist.masks.ops import layouts_for, random_mask
from trace_dist.models.loading import load_model
from trace_dist.serving.router import Router
from trace_dist.sharding.base import ShardedModel
from trace_dist.utils import dist
from trace_dist.utils.log import get_logger

logger = get_logger(__name__)
TURNS = 5
"""Measurements of each in one round: single ones take milliseconds."""
SIZES = tuple((granularity, density) for granularity in ("row", "element") for density in (0.05, 0.01, 0.001))
LINE, PAGE = 64, 4096
"""Bytes of a cache line, and of a page."""
COPIED = 1 << 27
"""Bytes of the copy beside which swaps are put: larger than caches."""


def medians(works: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Seconds of each, in turns; the first turn is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds + 1):
        for name, work in works.items():
            begin = now()
            work()
            times[name].append(now() - begin)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def random_delta(model: ShardedModel, granularity: str, density: float, number: int) -> Delta:
    """A delta of a random mask of the linear layers."""
    mask = random_mask(layouts_for(model, granularity, 1, "linear"), granularity, density, number)
    generator = torch.Generator().manual_seed(number)
    values = {
        name: 0.02 * torch.randn(int(sizes.sum()), generator=generator, dtype=torch.bfloat16)
        for name, sizes in ((name, mask.layouts[name].sizes(units)) for name, units in mask.units.items())
    }
    return Delta(mask, values, f"task{number}")


def load_merged(folder: Path) -> object:
    """A merged checkpoint, which is as large as the base, until it can be used ([Note: loading])."""
    model: Any = load_model(folder / "base", torch.bfloat16)
    model.to(dist.local_device())
    return sum(float(each.data.view(-1)[:: PAGE // each.element_size()].sum()) for each in model.parameters())


def measure_swaps(router: Router, race: Race, folder: Path, rounds: int) -> list[dict[str, Any]]:
    """Seconds from one task to another; the ratio is a delta's time over this one's."""
    names = ["default", "other"]
    peer: Any = with_adapters("LoRA", race.model(), race.density)
    peer.add_adapter("other", peer.peft_config["default"])

    def swap() -> None:
        with router.holding("task0"):
            pass

    def swap_from_disk() -> None:
        with router.bank.activated(router.model, "task0"):
            pass

    def switch() -> None:
        peer.set_adapter(names[0])
        names.reverse()

    works: dict[str, Callable[[], object]] = {
        "delta": swap,
        "delta, from disk": swap_from_disk,
        "merged checkpoint": lambda: load_merged(folder),
        "LoRA adapter": switch,
    }
    seconds = medians(works, TURNS * rounds)
    for name, each in seconds.items():
        logger.info("%s: %.2f ms", name, 1e3 * each)
    return [
        {"name": name, "seconds": each, "ratio": seconds["delta"] / each} for name, each in seconds.items()
    ]


def measure_sizes(model: ShardedModel, loading: float, rounds: int) -> list[dict[str, Any]]:
    """What a swap takes at several sizes, beside loading and beside the bandwidth of a copy.

    Args:
        model: the base.
        loading: seconds that a merged checkpoint takes.
        rounds: of ``TURNS`` measurements; the median counts.
    """
    rows = [_size("copy", None, 2 * COPIED, _copying(rounds), loading, 2 * COPIED)]
    for granularity, density in SIZES:
        delta = random_delta(model, granularity, density, 0)
        ready = made_ready(model, delta)
        ready.keep_own()  # as the router's do

        def swap(ready: Any = ready) -> None:
            with ready.applied():
                pass

        seconds = medians({"swap": swap}, TURNS * rounds)["swap"]
        rows.append(_size(granularity, density, moved_bytes(delta.mask, 2), seconds, loading, ready.nbytes))
    return rows


def _copying(rounds: int) -> float:
    """Seconds of a copy."""
    source = torch.ones(COPIED, dtype=torch.uint8, device=dist.local_device())
    target = torch.empty_like(source)
    return medians({"copy": lambda: target.copy_(source)}, TURNS * rounds)["copy"]


def _size(
    name: str, density: float | None, moved: int, seconds: float, loading: float, kept: int
) -> dict[str, Any]:
    logger.info("%s, %s: %.2f ms, %.3f of loading", name, density, 1e3 * seconds, seconds / loading)
    return {
        "name": name,
        "density": density,
        "seconds": seconds,
        "share_of_loading": seconds / loading,
        "moved_bytes": moved,
        "gb_per_s": moved / seconds / 1e9,
        "kept_bytes": kept,
    }


def moved_bytes(mask: Mask, item_bytes: int) -> int:
    """The least that a swap moves, there and back ([Note: moved bytes])."""
    total = 0
    for name, units in mask.units.items():
        entries = mask.layouts[name].elements(units)
        lines, held = torch.unique_consecutive(entries * item_bytes // LINE, return_counts=True)
        num_shared = int((held * item_bytes < LINE).sum())
        total += 2 * (len(entries) * item_bytes + (len(lines) + num_shared) * LINE)
    return total
