"""Several ranks, started once per session and number of ranks."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import Launcher, launch
from safetensors.torch import load_file

TESTS = Path(__file__).parent
RANKS = TESTS / "engine" / "ranks.py"
WORLD = "world"
"""All files that read a world together: they go to one worker."""
LONGEST = [
    "test_readme.py",
    WORLD,
    "kernels/test_aot.py",
    "kernels/test_interpreter.py",
    "stages/test_learn.py",
    "stages/test_pipeline.py",
    "stages/test_killed.py",
    "continual/test_resuming.py",
    "benchmarks/test_stream.py",
    "continual/test_rivals.py",
    "models/test_zero3_loading.py",
    "continual/test_ranks.py",
    "cli/test_bench.py",
    "cli/test_errors.py",
    "cli/test_ranks.py",
    "bank/test_changes.py",
    "test_examples.py",
    "cli/test_memory.py",
    "projection/test_placements.py",
]
"""The files that take longest, the longest first, as ``pytest --durations=80`` told; then come those that start launchers."""
SECTIONS: dict[int, tuple[Launcher, list[str]]] = {
    1: ("python", ["parity", "fsdp2", "toy"]),
    2: (
        "deepspeed",
        [
            *(
                "parity",
                "fsdp2",
                "traps",
                "interleaving",
                "attaching",
                "reduction",
                "withheld",
                "shared",
                "toy",
                "depth",
                "gathering",
                "gathering_over_gloo",
                "holding",
                "by_weight",
                "unreached",
                "wire",
                "nf4",
            ),
            *(
                "cut_and_continue",
                "damaged",
                "background",
                "hand_over",
                "other_backends",
                "looking",
                "spoilt",
            ),
            *("deltas", "exporting", "loading", "shared_memory"),
        ],
    ),
    3: (
        "torchrun",
        [
            *("parity", "fsdp2", "prepared", "attaching", "reduction", "shared", "toy"),
            *("gathering_over_gloo", "wire", "nf4", "take_over"),
        ],
    ),
}


@dataclass(frozen=True)
class World:
    """What the ranks of one launch found: ``reports[rank][section]``, and files in ``folder``."""

    folder: Path
    reports: list[dict[str, Any]]

    def section(self, name: str) -> Any:
        """A section's findings on rank 0."""
        return self.reports[0][name]

    def state(self, name: str) -> dict[str, torch.Tensor]:
        """Tensors that rank 0 wrote."""
        return load_file(self.folder / f"{name}.safetensors")


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], World]:
    """``world(n)``: the findings of ``n`` ranks (engine/ranks.py). The checkpoints in ``relay`` go from 2 ranks to 1 to 3."""
    found: dict[int, World] = {}

    def start(num_ranks: int) -> World:
        if num_ranks in found:
            return found[num_ranks]
        folder = tmp_path_factory.mktemp(f"ranks{num_ranks}")
        if num_ranks == 3:
            (folder / "relay").symlink_to(start(2).folder / "relay")
            continue_alone(folder / "relay")
        launcher, sections = SECTIONS[num_ranks]
        # Two ranks import what they need in the order that a rank does; the others may be forks.
        launch(RANKS, num_ranks, folder, *sections, launcher=launcher, warm=num_ranks != 2)
        reports = [json.loads((folder / f"rank{rank}.json").read_text()) for rank in range(num_ranks)]
        found[num_ranks] = World(folder, reports)
        return found[num_ranks]

    return start


def continue_alone(relay: Path) -> None:
    """The middle leg of the relay: one process continues from step 3 and dies after step 7."""
    from engine.resuming import PLAIN, run

    from trace_dist import shard

    run(shard(PLAIN.model(), "single"), PLAIN, relay, last=7)


@pytest.fixture(autouse=True)
def records_propagate() -> None:
    """A command that ran in an earlier test has set up logging of its own, past pytest's handlers."""
    logging.getLogger("trace_dist").propagate = True


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Several workers: a file's tests stay together, and so do all files that read a world, which is started once."""
    if config.getoption("dist") != "load":  # somebody wants it otherwise
        return None
    from xdist.scheduler import LoadScopeScheduling

    class Together(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return WORLD if reads_world(config.rootpath / file) else file

    # xdist would begin with the files of many tests; the long ones have few.
    config.option.loadscopereorder = False
    return Together(config, log)


def reads_world(file: Path) -> bool:
    """Whether a file's tests read what a world found."""
    return "world(" in file.read_text()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files come first: a long one at the end would leave one of two workers idle."""
    files = {item.path for item in items}
    launching = {item.path for item in items if item.get_closest_marker("launcher")}
    places: dict[Path, int] = {}
    for file in files:
        name = WORLD if reads_world(file) else file.relative_to(TESTS).as_posix()
        places[file] = LONGEST.index(name) if name in LONGEST else len(LONGEST) + (file not in launching)
    items.sort(key=lambda item: places[item.path])


def pytest_collection_finish() -> None:
    """Modules and collected tests are no garbage: later collections need not walk through them."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """What triton's modules hold wants to be collected at the end; it complains otherwise."""
    gc.unfreeze()


@pytest.fixture
def torch_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """CPU tensors take the torch path, which has torch's bits; the C++ path rounds square roots correctly, torch does not."""
    from trace_kernels import cpu

    monkeypatch.setenv("TRACE_KERNELS_CPU", "torch")
    cpu.library.cache_clear()
    yield
    cpu.library.cache_clear()


@pytest.fixture(autouse=True)
def _no_process_group_left() -> Iterator[None]:
    yield
    from trace_dist.utils import dist

    dist.close()
