"""The small run, made once: bases, examples, a probed run, and one of all methods that nobody interrupted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from continual.small import METHODS, make_config, prepare

from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Holds the runs ``probed``, to be copied, and ``whole``, to be left as it is."""
    root = tmp_path_factory.mktemp("continual")
    prepare(root)
    shutil.copytree(root / "probed", root / "whole")
    run_continual(make_config(root, METHODS, "whole"))
    return root


@pytest.fixture
def whole(folder: Path) -> RunConfig:
    """The run of all methods."""
    return make_config(folder, METHODS, "whole")


@pytest.fixture
def fresh(folder: Path, request: pytest.FixtureRequest) -> RunConfig:
    """A probed run of the method ``retrieved``, of its own for each test."""
    run = request.node.name.replace("[", "-").rstrip("]")
    shutil.copytree(folder / "probed", folder / run)
    return make_config(folder, ["retrieved"], run)
