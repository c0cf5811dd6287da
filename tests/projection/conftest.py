"""One launch of two ranks per backend for all tests of placements on shards."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch
from projection import rank_script

from trace_dist.utils.files import load_tensors


@dataclass(frozen=True)
class Found:
    """What the ranks wrote, by rank."""

    tensors: list[dict[str, torch.Tensor]]
    facts: list[dict[str, Any]]

    def part(self, kind: str) -> dict[str, torch.Tensor]:
        """Rank 0's tensors of one kind, without the kind's name."""
        return {k.removeprefix(f"{kind}/"): v for k, v in self.tensors[0].items() if k.startswith(f"{kind}/")}


def collect(out: Path, num_ranks: int) -> Found:
    files = [load_tensors(out / f"found.{rank}.safetensors", "found")[0] for rank in range(num_ranks)]
    facts = [json.loads((out / f"facts.{rank}.json").read_text()) for rank in range(num_ranks)]
    return Found(files, facts)


@pytest.fixture(scope="session")
def single(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """The same script in this process, on the backend ``single``."""
    out = tmp_path_factory.mktemp("single")
    rank_script.main(out, "single")
    return collect(out, 1)


def on_two_ranks(backend: str, factory: pytest.TempPathFactory) -> Found:
    out = factory.mktemp(backend)
    launch(Path(rank_script.__file__), 2, out, backend, launcher="torchrun")
    return collect(out, 2)


@pytest.fixture(scope="session")
def zero3(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two ranks under ZeRO-3."""
    return on_two_ranks("zero3", tmp_path_factory)


@pytest.fixture(scope="session")
def fsdp2(tmp_path_factory: pytest.TempPathFactory) -> Found:
    """Two ranks under FSDP2."""
    return on_two_ranks("fsdp2", tmp_path_factory)
