"""A stream of classes that is cut goes on, whatever the method."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from continual.cuts import FROZEN, cut_at_every_border
from continual.small import OF_THE_CLOCK
from modality.small import make_config

from trace_dist.config import RunConfig
from trace_dist.continual.driver import run_continual


@pytest.mark.parametrize("name", [*FROZEN, "lora_retrieved"])
def test_it_ends_as_the_uncut_one(run: RunConfig, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(run.run_dir).parent
    cut = make_config(folder, [name], f"cut-{name}")
    # Adapters are retrieved by the bank's signatures.
    shutil.copytree(run.folder.root / "probe", cut.folder.root / "probe")
    cut_at_every_border(cut, monkeypatch)
    run_continual(cut)
    one, other = (json.loads(cfg.folder.method(name).read_text()) for cfg in (run, cut))
    assert {key: one[key] for key in one.keys() - OF_THE_CLOCK} == {
        key: other[key] for key in other.keys() - OF_THE_CLOCK
    }
