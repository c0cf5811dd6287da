"""Two tasks of two digits each, a base of 3,000 parameters, and a run of it that nobody interrupted."""

from __future__ import annotations

from pathlib import Path

import pytest
from modality.small import make_config

from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual
from trace_dist.stages.base import prepare_base
from trace_dist.stages.probe import run_probe

METHODS = ("retrieved", "nearest_mean", "random_features", "lora_retrieved")


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished run; its folder lies beside the base, and is to be left as it is."""
    folder: Path = tmp_path_factory.mktemp("images")
    cfg = make_config(folder, METHODS)
    prepare_base(cfg, "target")
    run_probe(cfg)
    run_continual(cfg)
    return cfg
